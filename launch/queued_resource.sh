#!/usr/bin/env bash
# Queues for a TPU, trains on it or runs another command, and deletes it, however that ends. A preempted one is queued
# for again.
#
#   bash launch/queued_resource.sh --project=P --zone=Z --name=NAME --accelerator-type=v5litepod-256 \
#       --runtime-version=v2-alpha-tpuv5-lite --provisioning=spot --bucket=B --repository=URL --revision=COMMIT \
#       --config=configs/imagenet256_d16.py --workdir=runs/imagenet256_d16 [--config.FIELD=VALUE …] [--dry-run]
#   bash launch/queued_resource.sh … [--dry-run] -- export tokens --config=FILE --model=M --output=O
#
#   --project, --zone                         where there is quota
#   --name                                    of the queued resource and its TPU VM, which must not exist
#   --accelerator-type, --runtime-version     of the TPU VM
#   --provisioning                            spot or reserved; on demand by default
#   --bucket … --setup, --dry-run, --         as for tpu_vm.sh
#
# Ends with 0 when the command is finished. Deletes the TPU when this script is interrupted, too: run it where it can
# stay, such as in tmux.
# shellcheck disable=SC2154 # read_arguments sets them
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

provisioning=""
read_arguments "project zone name accelerator-type runtime-version bucket repository revision" \
    "provisioning setup" "$@"
case "$provisioning" in
"" | spot | reserved) ;;
*) stop "--provisioning is $provisioning; expected spot or reserved." ;;
esac

resource() { # resource VERB ARGUMENTS…
    local verb="$1"
    shift
    run gcloud compute tpus queued-resources "$verb" "$name" --project="$project" --zone="$zone" --quiet "$@"
}

create() { # From here on, every way out goes through `delete`. A resource of that name that was there is left alone.
    resource create --node-id="$name" --accelerator-type="$accelerator_type" --runtime-version="$runtime_version" \
        ${provisioning:+"--$provisioning"}
    trap finish EXIT
}

finish() {
    local status=$?
    trap - EXIT
    resource delete --force || {
        printf '%s could not be deleted: look after it, it may still be there and be paid for.\n' "$name" >&2
        ((status)) || status=1
    }
    exit "$status"
}

read_state() { # Sets $state. One failure to ask, in days of asking, is no reason to give up.
    for _ in 1 2 3 4 5; do
        if [[ -n "$dry_run" ]]; then
            resource describe --format='value(state.state)'
            state=ACTIVE
            return
        fi
        state="$(resource describe --format='value(state.state)')" && return
        sleep 60
    done
    give_up "The state of $name could not be read."
}

wait_until_active() {
    read_state
    until [[ "$state" == ACTIVE ]]; do
        [[ "$state" != FAILED && "$state" != SUSPENDED ]] ||
            give_up "The request for $name is $state; the console says why."
        sleep 60
        read_state
    done
}

run_while_active() { # Returns when the TPU is lost.
    local lost=0 started status
    while [[ "$state" == ACTIVE ]]; do
        started=$SECONDS status=0
        run_on_tpu_vm "$accelerator_type" & # in the background, because bash handles a signal during `wait` alone
        wait $! || status=$?
        ((status)) || exit 0
        sleep 60 # it takes a while until a TPU that is lost is called so
        read_state
        if [[ "$state" == ACTIVE ]]; then
            ((status == 143 || status == 255)) || exit "$status" # these: a worker was stopped, or is out of reach
            ((SECONDS - started < 600)) || lost=0
            ((++lost < 10)) || give_up "The workers of $name were lost ten times in a row, but it is still active."
        fi
    done
}

trap 'exit 130' INT
trap 'exit 143' TERM HUP
while true; do
    create
    wait_until_active
    run_while_active
    printf '%s is %s: queueing again.\n' "$name" "$state"
    resource delete --force
    trap - EXIT
done
