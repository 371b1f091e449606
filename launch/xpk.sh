#!/usr/bin/env bash
# Submits a training, or another command, to a GKE cluster that xpk (pip install xpk) has made, and returns.
#
#   bash launch/xpk.sh --project=P --zone=Z --cluster=C --name=NAME --tpu-type=v5litepod-256 --root=/data \
#       --repository=URL --revision=COMMIT \
#       --config=configs/imagenet256_d16.py --workdir=runs/imagenet256_d16 [--config.FIELD=VALUE …] [--dry-run]
#   bash launch/xpk.sh … [--dry-run] -- export tokens --config=FILE --model=M --output=O
#
#   --project, --zone, --cluster    of the cluster
#   --name                          of the workload
#   --tpu-type                      of a slice
#   --slices                        how many, joined by the data-center network; 1 by default
#   --root                          where the cluster's storage is mounted, that is, the MOUNT of
#                                   xpk storage attach … --mount-point=MOUNT --auto-mount=true --readonly=false;
#                                   a bucket there needs a hierarchical namespace
#   --image                         a container image with git and Python 3.12 to 3.14; python:3.12 by default
#   --repository … --dry-run, --    as for tpu_vm.sh
#
# Slices that are preempted are started again, up to 100 times. `xpk workload list` shows how it goes.
# shellcheck disable=SC2154 # read_arguments sets them
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

slices=1 image=python:3.12
read_arguments "project zone cluster name tpu-type root repository revision" "slices image" "$@"
hosts="$(tpu_hosts "$tpu_type")"

run xpk workload create --project="$project" --zone="$zone" --cluster="$cluster" --workload="$name" \
    --tpu-type="$tpu_type" --num-slices="$slices" --docker-image="$image" \
    --max-restarts=100 --termination-grace-period-seconds=300 \
    --command="$(fetch_command) && $(worker_command --accelerator=tpu --root="$root" \
        ${hosts:+"--processes=$((hosts * slices))"})"
