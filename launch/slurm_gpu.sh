#!/usr/bin/env bash
# Prepares a training, or another command, on this machine, submits it to Slurm, one process a GPU, and returns.
#
#   bash launch/slurm_gpu.sh --root=DIR --name=NAME --nodes=4 --gpus-per-node=8 --repository=URL --revision=COMMIT \
#       --config=configs/imagenet256_d16.py --workdir=runs/imagenet256_d16 [--config.FIELD=VALUE …] [--dry-run]
#   bash launch/slurm_gpu.sh … [--dry-run] -- export tokens --config=FILE --model=M --output=O
#
#   --root                             a folder that all nodes share; --workdir and paths in the config are in it
#   --name                             of the job; code, environment and log go to ROOT/jobs/NAME
#   --nodes, --gpus-per-node           how many; 8, or h100:8 where a node has several kinds
#   --gres                             instead of --gpus-per-node, on clusters that want gpu:8 or gpu:h100:8
#   --accelerator                      what to install; cuda by default. cuda,triton adds the kernels in Triton, with which
#                                      README's times on H200 were taken; on GPUs before Hopper they have not run yet
#   --cpus-per-task                    for a process, that is, for a GPU; 8 by default
#   --partition, --account, --qos, --constraint, --reservation, --nodelist, --exclude, --mem, --time
#                                      as for sbatch, where the cluster wants them
#   --sbatch                           any further ones, such as --sbatch="--exclusive --comment=mine"
#   --repository, --revision           what to clone, by a URL or a path; a commit, tag or branch
#   --config, --workdir, --dry-run, -- as for tpu_vm.sh
#
# Before the time limit, and when it is preempted, the job is queued again; a training saves first.
# shellcheck disable=SC2154 # read_arguments sets them
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

accelerator=cuda cpus_per_task=8 gpus_per_node="" gres="" sbatch=""
as_for_sbatch="partition account qos constraint reservation nodelist exclude mem time"
read_arguments "root name nodes repository revision" "accelerator cpus-per-task gpus-per-node gres sbatch $as_for_sbatch" "$@"
[[ "$root" == /* ]] || root="$PWD/$root"
[[ ! -d "$repository" ]] || repository="$(cd "$repository" && pwd)"
folder="$root/jobs/$name"

[[ -n "$gpus_per_node$gres" ]] || stop "slurm_gpu.sh needs --gpus-per-node=… or --gres=…; --help says what they are."
tasks="$gpus_per_node"
if [[ -z "$tasks" ]]; then # of gpu:h100:8(S:0-1),nvme:1
    [[ ",$gres" =~ ,gpu((:[^,:\(]+)*) ]] || stop "--gres=$gres names no gpu; expected such as gpu:8, or --gpus-per-node=8."
    tasks="${BASH_REMATCH[1]}"
    [[ "$tasks" =~ :[0-9]+$ ]] || tasks=1 # as for Slurm
fi
tasks="${tasks##*:}"
[[ "$nodes" =~ ^[1-9][0-9]*$ && "$tasks" =~ ^[1-9][0-9]*$ ]] ||
    stop "--nodes=$nodes with $tasks GPUs each; expected whole numbers, such as --nodes=4 --gpus-per-node=8."
options=()
for key in $as_for_sbatch; do
    [[ -z "${!key:-}" ]] || options+=("--$key=${!key}")
done
read -r -a further <<<"$sbatch"

run mkdir -p "$folder"
run cd "$folder"
run bash -c "$(fetch_command)"
# Here, because nodes may have no internet.
run bash -eu -c "source code/launch/environment.sh; prepare_environment $(quote "$accelerator")"
# JAX takes the GPU of a process's number on its node, so every process must see all of them: no --gpus-per-task.
gpus="--gpus-per-node=$gpus_per_node"
[[ -z "$gres" ]] || gpus="--gres=$gres"
run sbatch --job-name="$name" --nodes="$nodes" --ntasks-per-node="$tasks" "$gpus" --cpus-per-task="$cpus_per_task" \
    ${options[@]+"${options[@]}"} --requeue --signal=TERM@300 --chdir="$folder" --output=%j.log --open-mode=append \
    ${further[@]+"${further[@]}"} \
    --wrap="$(worker_command --accelerator="$accelerator" --root="$root" --processes=$((nodes * tasks)))"
