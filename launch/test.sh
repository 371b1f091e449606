#!/usr/bin/env bash
# A fresh clone → an environment → lint, types, tests. Arguments go to pytest: `bash launch/test.sh -k glyphs`.
#
# `bash launch/test.sh --full` tries many more examples of damaged and hostile input, which takes hours.
#
# `bash launch/test.sh --newest[=PYTHON] …` runs the tests alone, with the newest versions that setup.py allows, of the newest
# Python here or of PYTHON.
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

newest=""
case "${1-}" in
    --newest | --newest=*)
        newest=yes
        python_asked="${1#--newest}"
        shift
        prepare_newest "${python_asked#=}"
        ;;
    *) prepare_environment test ;;
esac
cd "$checkout"
# The tools' caches lie in the environment too, so that a read-only checkout can be tested.
export RUFF_CACHE_DIR="$environment/cache/ruff" MYPY_CACHE_DIR="$environment/cache/mypy"
export HYPOTHESIS_STORAGE_DIRECTORY="$environment/cache/hypothesis"
if [[ -z "$newest" ]]; then # other versions of these tools have other rules
    stage "lint" "$python" -m ruff check .
    stage "format" "$python" -m ruff format --check .
    stage "types" "$python" -m mypy
fi
stage "tests" "$python" -m pytest -o cache_dir="$environment/cache/pytest" -n "$workers" --dist loadfile \
    --no-loadscope-reorder "$@"
