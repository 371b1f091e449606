#!/usr/bin/env bash
# Trains on all workers of a TPU VM that is there, and returns when the training is finished.
#
#   bash launch/tpu_vm.sh --project=P --zone=Z --name=TPU --bucket=B --repository=URL --revision=COMMIT \
#       --config=configs/imagenet256_d16.py --workdir=runs/imagenet256_d16 [--config.FIELD=VALUE …] [--dry-run]
#
#   --project, --zone, --name    of the TPU VM
#   --bucket                     its worker's data and work directories: a Cloud Storage bucket with a hierarchical
#                                namespace, which the workers may read and write; paths in the config and --workdir are
#                                in it
#   --repository, --revision     what the workers clone, by a URL that they can read; a commit, tag or branch
#   --config, --workdir          as for `hmar-jax train`; --config.FIELD=VALUE changes a field
#   --setup                      a line of shell that every worker runs first, such as one that installs gcsfuse where
#                                the image of the TPU VM has none
#   --dry-run                    prints what would be run, and runs nothing
#
# The training goes on when the connection is lost; the same command again waits for it. The workers write to
# ~/hmar/train.log, the trainer to WORKDIR/metrics.jsonl.
# shellcheck disable=SC2154 # read_arguments sets them
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

read_arguments "project zone name bucket repository revision config workdir" "setup dry-run" "$@"
train_on_tpu_vm
