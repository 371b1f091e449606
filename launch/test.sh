#!/usr/bin/env bash
# A fresh clone → an environment → lint, types, tests. Arguments go to pytest: `bash launch/test.sh -k glyphs`.
set -euo pipefail
# shellcheck source=launch/environment.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"

workers=2 # pytest-xdist processes; 0 runs the tests in one process

stage() { # stage NAME COMMAND…
    local name="$1"
    shift
    printf '== %s\n' "$name"
    "$@" || {
        local status=$?
        printf '%s failed: %s\n' "launch/test.sh" "$name" >&2
        exit "$status"
    }
}

prepare_environment test
cd "$checkout"
# The tools' caches lie in the environment too, so that a read-only checkout can be tested.
export RUFF_CACHE_DIR="$environment/cache/ruff" MYPY_CACHE_DIR="$environment/cache/mypy"
export HYPOTHESIS_STORAGE_DIRECTORY="$environment/cache/hypothesis"
stage "lint" "$python" -m ruff check .
stage "format" "$python" -m ruff format --check .
stage "types" "$python" -m mypy
stage "tests" "$python" -m pytest -o cache_dir="$environment/cache/pytest" -n "$workers" --dist loadfile \
    --no-loadscope-reorder "$@"
