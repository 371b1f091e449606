#!/usr/bin/env bash
# Prepares a training on this machine, submits it to Slurm, one process a GPU, and returns.
#
#   bash launch/slurm_gpu.sh --root=DIR --name=NAME --nodes=4 --gpus-per-node=8 --repository=URL --revision=COMMIT \
#       --config=configs/imagenet256_d16.py --workdir=runs/imagenet256_d16 [--config.FIELD=VALUE …] [--dry-run]
#
#   --root                             a folder that all nodes share; --workdir and paths in the config are in it
#   --name                             of the job; code, environment and log go to ROOT/jobs/NAME
#   --nodes, --gpus-per-node           how many
#   --accelerator                      what to install; cuda by default. cuda,triton adds the kernels in Triton, with which
#                                      README's times on H200 were taken; on GPUs before Hopper they have not run yet
#   --cpus-per-task                    for a process, that is, for a GPU; 8 by default
#   --partition, --account, --time     as for sbatch, where the cluster wants them
#   --repository, --revision           what to clone, by a URL or a path; a commit, tag or branch
#   --config, --workdir, --dry-run     as for tpu_vm.sh
#
# Before the time limit, and when it is preempted, the job saves and is queued again.
# shellcheck disable=SC2154 # read_arguments sets them
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

accelerator=cuda cpus_per_task=8 partition="" account="" time=""
read_arguments "root name nodes gpus-per-node repository revision config workdir" \
    "accelerator cpus-per-task partition account time dry-run" "$@"
[[ "$root" == /* ]] || root="$PWD/$root"
folder="$root/jobs/$name"

run mkdir -p "$folder"
run cd "$folder"
run bash -c "$(fetch_command)"
# Here, because nodes may have no internet.
run bash -eu -c "source code/launch/environment.sh; prepare_environment $(quote "$accelerator")"
# JAX takes the GPU of a process's number on its node, so every process must see all of them: no --gpus-per-task.
run sbatch --job-name="$name" --nodes="$nodes" --ntasks-per-node="$gpus_per_node" --gpus-per-node="$gpus_per_node" \
    --cpus-per-task="$cpus_per_task" ${partition:+"--partition=$partition"} ${account:+"--account=$account"} \
    ${time:+"--time=$time"} --requeue --signal=TERM@300 --chdir="$folder" --output=%j.log --open-mode=append \
    --wrap="$(worker_command --accelerator="$accelerator" --root="$root")"
