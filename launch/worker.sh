#!/usr/bin/env bash
# What the launchers run on every machine: makes an environment, then runs `hmar-jax train` until it is finished.
#
#   bash launch/worker.sh --accelerator=tpu --root=DIR --config=configs/imagenet256_d16.py --workdir=runs/a_run
#
#   --accelerator    tpu, cuda or cuda,triton
#   --root           a folder that all machines share; --workdir and paths in the config are relative to it
#   --bucket         a Cloud Storage bucket to mount there, with a hierarchical namespace: without one, folders cannot
#                    be renamed as a whole, which is how checkpoints appear
#   --config         a config of this checkout, or an absolute path; --config.FIELD=VALUE changes a field
#   --workdir        of the training, which is finished when there is WORKDIR/model
#
# A trainer that fails is started again. Three in a row that save no checkpoint are enough (exit code 1), and two where the
# last says that the input is bad (2): what passes, such as a disk that does not answer, looks like that once.
# TERM, which announces the machine's end, is passed on to the trainer; when that has saved, the exit code is 143. In a
# Slurm job the trainer gets TERM from Slurm itself, and the job is queued again.
# shellcheck disable=SC2154 # read_arguments sets them
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

bucket=""
read_arguments "accelerator root config workdir" "bucket" "$@"
[[ "$config" == /* ]] || config="$checkout/$config"
[[ "$root" == /* ]] || root="$PWD/$root"

mount_bucket() {
    type -P gcsfuse >/dev/null ||
        stop "This machine has no gcsfuse to mount $bucket with: use an image that has it, or install it by --setup='…'."
    mkdir -p "$root"
    # What other machines write is seen at once. A file that is read in part, as token caches are, is copied here whole.
    # The daemon must not keep descriptor 9, the lock that a second launch waits for.
    mountpoint -q "$root" || gcsfuse --implicit-dirs --metadata-cache-ttl-secs=0 --cache-dir="$HOME/.cache/gcsfuse" \
        --file-cache-max-size-mb=60000 --file-cache-cache-file-for-range-read "$bucket" "$root" 9>&-
}

provide_python() { # TPU VMs come with an older Python than JAX needs.
    PATH="$HOME/.local/bin:$PATH"
    [[ -x "$python" ]] || (find_python) >/dev/null 2>&1 || {
        python3 -m pip install --quiet --user uv
        uv python install 3.12
    }
}

checkpoints() { # The names of those that are whole.
    find "$workdir/checkpoints" -maxdepth 1 -regex '.*/[0-9]+' 2>/dev/null | sort || true
}

train_once() { # Sets $status. In the background, because bash handles a signal during `wait` alone.
    local srun=()
    if [[ -n "${SLURM_JOB_ID:-}" ]]; then
        srun=(srun --kill-on-bad-exit=1 --cpus-per-task="$SLURM_CPUS_PER_TASK")
    fi
    ${srun[@]+"${srun[@]}"} "$environment/bin/hmar-jax" train --config="$config" --workdir="$workdir" \
        ${overrides[@]+"${overrides[@]}"} &
    trainer=$!
    [[ -z "$stopping" ]] || kill -TERM "$trainer"
    status=0
    wait "$trainer" || status=$?
    while kill -0 "$trainer" 2>/dev/null; do # it was a signal that ended the wait
        status=0
        wait "$trainer" || status=$?
    done
}

train() { # Trains until there is a model.
    local before fruitless=0
    until [[ -d "$workdir/model" ]]; do
        before="$(checkpoints)"
        train_once
        if [[ -n "$stopping" ]]; then
            exit 143
        elif [[ -d "$workdir/model" ]]; then
            break
        elif [[ "$(checkpoints)" != "$before" ]]; then
            fruitless=0
            ((status)) || [[ -z "${SLURM_JOB_ID:-}" ]] || exec scontrol requeue "$SLURM_JOB_ID"
        elif ((++fruitless >= 2 && status == 2)); then
            exit 2
        elif ((fruitless == 3)); then
            give_up "Three trainers in a row saved no checkpoint; the last one exited with $status."
        fi
        sleep 20
    done
}

trainer="" stopping=""
trap 'stopping=yes; [[ -z "$trainer" ]] || kill -TERM "$trainer" 2>/dev/null || true' TERM
trap '' HUP # a connection that is lost does not end the training
[[ -z "$bucket" ]] || mount_bucket
cd "$root"
provide_python
prepare_environment "$accelerator"
train
printf 'Trained. The model is in %s\n' "$PWD/$workdir/model"
