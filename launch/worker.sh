#!/usr/bin/env bash
# What the launchers run on every machine: makes an environment, then runs a command of hmar-jax until it is finished.
#
#   bash launch/worker.sh --accelerator=tpu --root=DIR --config=configs/imagenet256_d16.py --workdir=runs/a_run
#   bash launch/worker.sh --accelerator=tpu --root=DIR -- export tokens --config=configs/imagenet256_tokenizer.py …
#
#   --accelerator    tpu, cuda or cuda,triton
#   --root           a folder that all machines share; --workdir, and all paths but configs, are relative to it
#   --bucket         a Cloud Storage bucket to mount there, with a hierarchical namespace: without one, folders cannot
#                    be renamed as a whole, which is how checkpoints appear
#   --processes      how many the launcher has started on all machines, where it knows; they check that as many meet
#   --config         a config of this checkout, an absolute path, or the name of an installed config;
#                    --config.FIELD=VALUE changes a field
#   --workdir        of the training, which is finished when there is WORKDIR/model
#   --               instead of a training, another command of hmar-jax, which is finished when it ends with 0
#
# A command that fails is run again. Three in a row that get no further are enough (exit code 1), and two that end with 2,
# the input is bad, or with 70, a fault of ours: what passes, such as a disk that does not answer, looks like that once.
# A training gets further by a checkpoint, another command by a file in its --output.
# TERM, which announces the machine's end, is passed on to the command; when that has ended, the exit code is 143. In a
# Slurm job the command gets TERM from Slurm itself, and the job is queued again.
# shellcheck disable=SC2154 # read_arguments sets them
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

bucket="" processes=""
read_arguments "accelerator root" "bucket processes" "$@"
[[ "$root" == /* ]] || root="$PWD/$root"

in_checkout() { # A config's path, absolute; the name of an installed config stays as it is.
    if [[ "$1" == /* || ("$1" != */* && ! -f "$checkout/${1%%:*}") ]]; then
        printf '%s\n' "$1"
    else
        printf '%s\n' "$checkout/$1"
    fi
}

words=() output=""
read_command() { # Sets $words, what hmar-jax is called with, and $output, where it writes.
    local word before=""
    if [[ -z "${command_words[*]-}" ]]; then
        words=(train --config="$(in_checkout "$config")" --workdir="$workdir" ${overrides[@]+"${overrides[@]}"})
    else
        for word in "${command_words[@]}"; do
            [[ "${command_words[0]}" != train || "$word" != --workdir=* ]] || workdir="${word#*=}"
            [[ "$word" != --output=* ]] || output="${word#*=}"
            [[ "$before" != --output ]] || output="$word"
            [[ "$word" != --config=* ]] || word="--config=$(in_checkout "${word#*=}")"
            [[ "$before" != --config ]] || word="$(in_checkout "$word")"
            words+=("$word")
            before="$word"
        done
    fi
    case "${words[*]} " in # those whose processes work together
    "train "* | "export tokens "* | "sample "*"--classes"*) words+=(${processes:+"--processes=$processes"}) ;;
    esac
}

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

progress() { # What is there of the result: the names of whole checkpoints, or how many files.
    if [[ -n "$workdir" ]]; then
        find "$workdir/checkpoints" -maxdepth 1 -regex '.*/[0-9]+' 2>/dev/null | sort || true
    elif [[ -n "$output" ]]; then
        {
            find "$output" "$(dirname -- "$output")/.$(basename -- "$output").partial" -type f ! -name '.*' || true
        } 2>/dev/null | wc -l
    fi
}

is_finished() {
    if [[ -n "$workdir" ]]; then
        [[ -d "$workdir/model" ]]
    else
        [[ "$status" == 0 ]]
    fi
}

run_once() { # Sets $status. In the background, because bash handles a signal during `wait` alone.
    local srun=()
    if [[ -n "${SLURM_JOB_ID:-}" ]]; then
        srun=(srun --kill-on-bad-exit=1 --cpus-per-task="$SLURM_CPUS_PER_TASK")
    fi
    ${srun[@]+"${srun[@]}"} "$environment/bin/hmar-jax" "${words[@]}" &
    child=$!
    [[ -z "$stopping" ]] || kill -TERM "$child"
    status=0
    wait "$child" || status=$?
    while kill -0 "$child" 2>/dev/null; do # it was a signal that ended the wait
        status=0
        wait "$child" || status=$?
    done
}

queue_again_if_stopped() { # In a Slurm job; a training that was told to stop ends with 0, other commands by the signal.
    [[ -n "${SLURM_JOB_ID:-}" ]] || return 0
    [[ "$status" != "$1" ]] || exec scontrol requeue "$SLURM_JOB_ID"
}

run_until_finished() {
    local before fruitless=0 hopeless=0 failures="Three runs in a row got no further"
    [[ -z "$workdir" ]] || failures="Three trainers in a row saved no checkpoint"
    until is_finished; do
        before="$(progress)"
        run_once
        [[ -z "$stopping" ]] || exit 143
        ! is_finished || break
        [[ -n "$workdir" ]] || queue_again_if_stopped 143
        if [[ "$(progress)" != "$before" ]]; then
            fruitless=0 hopeless=0
            [[ -z "$workdir" ]] || queue_again_if_stopped 0
        else
            fruitless=$((fruitless + 1))
            ((status == 2 || status == 70)) && hopeless=$((hopeless + 1)) || hopeless=0
            ((hopeless < 2)) || exit "$status"
            ((fruitless < 3)) || give_up "$failures; the last one exited with $status."
        fi
        sleep 20
    done
}

child="" status="" stopping=""
trap 'stopping=yes; [[ -z "$child" ]] || kill -TERM "$child" 2>/dev/null || true' TERM
trap '' HUP # a connection that is lost does not end the command
read_command
[[ -z "$bucket" ]] || mount_bucket
cd "$root"
provide_python
prepare_environment "$accelerator"
run_until_finished
[[ -z "$workdir" ]] || printf 'Trained. The model is in %s\n' "$PWD/$workdir/model"
