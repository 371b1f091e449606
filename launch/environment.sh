# shellcheck shell=bash
# A checkout → a virtual environment with the pinned set. Sourced by demo.sh, test.sh and common.sh; runs on bash 3.2
# and newer.
#
#   source launch/environment.sh
#   prepare_environment demo    # or test, which holds all of demo; tpu; cuda
#
# sets $checkout, $environment and $python. The environment is .venv in the checkout, or $HMAR_VENV. A stamp inside it
# holds a checksum of what was installed, so that later runs start at once and a changed pin is picked up.
#
#   prepare_newest [PYTHON]
#
# does so beside it, in .venv-newest-3.N, without the pins: the newest versions that setup.py allows, of the newest Python
# here or of PYTHON.

checkout="$(CDPATH="" cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)"
environment="${HMAR_VENV:-$checkout/.venv}"
[[ "$environment" == /* ]] || environment="$PWD/$environment"
python="$environment/bin/python"

stop() { # One sentence, and the exit code for "this machine or this request does not fit".
    local said="${1//[[:cntrl:]]/?}" # an argument may have what moves a terminal's cursor, or thousands of letters
    ((${#said} <= 600)) || said="${said:0:300} … ${said: -300}"
    printf '%s\n' "$said" >&2
    exit 2
}

# The Pythons that every pinned package has a wheel for (array-record has none for 3.15 yet).
# Exit code 0: fits. 3: the version fits, but it cannot make environments. Anything else: no.
probe='
import sys
if not (3, 12) <= sys.version_info[:2] <= (3, 14):
    sys.exit(1)
from importlib.util import find_spec
if not (find_spec("venv") and find_spec("ensurepip")):
    sys.exit(3)
'

candidates() { # candidates NAME…: every Python worth a try, one per line.
    local name file
    for name; do
        type -P "$name" || true
        for file in "${PYENV_ROOT:-${HOME:-}/.pyenv}/versions/${name#python}".*/bin/python; do
            [[ ! -x "$file" ]] || printf '%s\n' "$file"
        done
    done
    type -P python3 || true
    type -P python || true
    if type -P uv >/dev/null; then
        uv python find --system '>=3.12,<3.15' 2>/dev/null || true
    fi
}

find_python() { # find_python NAME…: sets $base_python. Names prove nothing (pyenv's shims may fail), so each is run.
    local candidate status without_venv=""
    while IFS= read -r candidate; do
        status=0
        "$candidate" -I -c "$probe" </dev/null >/dev/null 2>&1 || status=$?
        if ((status == 0)); then
            base_python="$candidate"
            return
        fi
        ((status != 3)) || without_venv="${without_venv:-$candidate}"
    done < <(candidates "$@")
    if [[ -n "$without_venv" ]]; then
        stop "$without_venv cannot make virtual environments: install its venv package (on Debian and Ubuntu: apt install python3-venv), then run this again."
    fi
    stop "HMAR-JAX needs Python 3.12, 3.13 or 3.14 and found none on PATH, in pyenv or in uv: install one (python3.12 with your package manager, or 'uv python install 3.12'), then run this again."
}

make_environment() { # Leaves a good environment alone, replaces a broken one, refuses to delete anything else.
    local clear=""
    if "$python" -I -c "${probe}import pip" </dev/null >/dev/null 2>&1; then
        return
    fi
    if [[ -f "$environment/pyvenv.cfg" ]]; then
        clear=--clear
    elif [[ -e "$environment" && -n "$(ls -A "$environment")" ]]; then
        stop "$environment exists and is not a virtual environment: move it away, or name another place in HMAR_VENV."
    fi
    [[ -n "${base_python-}" ]] || find_python python3.12 python3.13 python3.14
    if [[ -n "$clear" ]]; then
        printf 'Replacing %s: its Python is missing, broken or not one of 3.12, 3.13 and 3.14.\n' "$environment"
    fi
    "$base_python" -m venv ${clear:+"$clear"} "$environment" ||
        stop "Could not make a virtual environment in $environment: name a place that can be written in HMAR_VENV."
}

checksum() { # Of all that decides what gets installed: setup.py, the pins, the Python, the places.
    "$python" -I -c '
import hashlib, pathlib, sys
parts = [pathlib.Path(name).read_bytes() for name in sys.argv[1:3]] + [" ".join([sys.version, *sys.argv[3:]]).encode()]
print(hashlib.sha256(b"\0".join(parts)).hexdigest())
' "$checkout/setup.py" "$checkout/constraints.txt" "$checkout" "$environment"
}

install() { # install PINS EXTRAS OPTION…: quietly; the whole output goes to install.log in the environment.
    local pins="$1" extras="$2" project="$checkout" log="$environment/install.log" name
    shift 2
    if [[ ! -w "$checkout" ]]; then
        # An editable install writes metadata beside setup.py; in a read-only checkout, beside links to it instead.
        project="$environment/checkout"
        mkdir -p "$project"
        for name in setup.py pyproject.toml constraints.txt README.md LICENSE hmar_jax pallas_kernels; do
            ln -sfn "$checkout/$name" "$project/$name"
        done
    fi
    # Relative paths, because pip splits PIP_CONSTRAINT at spaces; that variable also pins the tools of isolated builds.
    if ! (
        cd "$project" && PIP_CONSTRAINT="$pins" PIP_BUILD_CONSTRAINT="$pins" \
            "$python" -m pip install --disable-pip-version-check --no-input "$@" -e ".[$extras]"
    ) </dev/null >"$log" 2>&1; then
        tail -n 15 "$log" >&2
        printf 'The installation failed; all of its output is in %s.\n' "$log" >&2
        exit 1
    fi
}

prepare_environment() {
    local extras="$1" stamp="$environment/hmar-installed" wanted found=""
    [[ "$extras" != test ]] || extras="demo,test"
    make_environment
    wanted="$(checksum)"
    [[ ! -f "$stamp" ]] || found="$(<"$stamp")"
    if [[ "$found" == "$wanted $extras" || ("$extras" == demo && "$found" == "$wanted demo,test") ]]; then
        return
    fi
    printf 'Installing the pinned packages into %s (about a minute, once) …\n' "$environment"
    rm -f "$stamp" # Written again only after all is in, and by a rename: an interrupted install leaves none.
    install constraints.txt "$extras"
    printf '%s\n' "$wanted $extras" >"$stamp.new"
    mv "$stamp.new" "$stamp"
}

prepare_newest() {
    if [[ -n "${1-}" ]]; then
        "$1" -I -c "$probe" </dev/null >/dev/null 2>&1 ||
            stop "'$1' is no Python 3.12, 3.13 or 3.14 that can make virtual environments: name one, or leave it out for the newest here."
        base_python="$1"
    else
        find_python python3.14 python3.13 python3.12
    fi
    environment="$environment-newest-$("$base_python" -I -c 'import sys; print(*sys.version_info[:2], sep=".")')"
    python="$environment/bin/python"
    make_environment
    printf 'Installing the newest versions that setup.py allows into %s …\n' "$environment"
    install "" demo,test --upgrade --upgrade-strategy=eager
}
