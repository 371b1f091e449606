#!/usr/bin/env bash
# Trains, or runs another command, on all workers of a TPU VM that is there, and returns when it is finished.
#
#   bash launch/tpu_vm.sh --project=P --zone=Z --name=TPU --bucket=B --repository=URL --revision=COMMIT \
#       --config=configs/imagenet256_d16.py --workdir=runs/imagenet256_d16 [--config.FIELD=VALUE …] [--dry-run]
#   bash launch/tpu_vm.sh … [--dry-run] -- export tokens --config=FILE --model=M --output=O
#
#   --project, --zone, --name    of the TPU VM
#   --bucket                     its worker's data and work directories: a Cloud Storage bucket with a hierarchical
#                                namespace, which the workers may read and write; paths in the config and --workdir are
#                                in it
#   --repository, --revision     what the workers clone, by a URL that they can read; a commit, tag or branch
#   --config, --workdir          as for `hmar-jax train`, which takes a config by its name, too; --config.FIELD=VALUE
#                                changes a field
#   --                           instead, any command of hmar-jax with its arguments: configs are those of the clone,
#                                other paths are in the bucket
#   --setup                      a line of shell that every worker runs first, such as one that installs gcsfuse where
#                                the image of the TPU VM has none
#   --dry-run                    prints what would be run, and runs nothing
#
# It goes on when the connection is lost; the same command again waits for it. The workers write to
# ~/hmar/train.log, a training to WORKDIR/metrics.jsonl.
# shellcheck disable=SC2154 # read_arguments sets them
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

read_arguments "project zone name bucket repository revision" "setup" "$@"
describe() {
    run gcloud compute tpus tpu-vm describe "$name" --project="$project" --zone="$zone" --quiet \
        --format='value(acceleratorType)'
}

# From its type the workers know how many they have to be; where it cannot be had, they trust what JAX finds.
accelerator_type=""
if [[ -n "$dry_run" ]]; then
    describe
else
    accelerator_type="$(describe)" || accelerator_type=""
fi
run_on_tpu_vm "$accelerator_type"
