#!/usr/bin/env bash
# A fresh clone → an environment → the main job on the embedded default. Arguments go to `hmar-jax demo`.
set -euo pipefail
# shellcheck source=launch/environment.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"

prepare_environment demo
exec "$environment/bin/hmar-jax" demo "$@"
