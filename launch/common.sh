# shellcheck shell=bash disable=SC2154 # read_arguments sets them
# What the launchers and worker.sh share: arguments, --dry-run, and the command line that a worker starts from. Sourced;
# runs on bash 3.2 and newer.

# shellcheck source=launch/environment.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"

overrides=()    # --config.FIELD=VALUE arguments, for `hmar-jax train`
command_words=() # what follows --: another command of hmar-jax, with its arguments
dry_run="" setup="" config="" workdir=""

read_arguments() { # read_arguments "REQUIRED NAMES" "OPTIONAL NAMES" "$@": --tpu-type=X sets $tpu_type, and so on.
    local required="$1" optional="$2 config workdir dry-run" word key
    shift 2
    while (($#)); do
        word="$1"
        shift
        [[ "$word" != --dry-run ]] || word=--dry-run=yes
        key="${word%%=*}"
        key="${key#--}"
        case "$word" in
        --help)
            sed '1d; /^# shellcheck/,$d; s/^# \{0,1\}//' "$0" # the comment at the top of the script
            exit 0
            ;;
        --)
            (($#)) || stop "${0##*/} needs a command of hmar-jax after --, such as export tokens --config=FILE --model=M --output=O."
            while (($#)); do
                read_path "$1"
                command_words+=("$checked")
                shift
            done
            ;;
        --config.*=*)
            read_path "$word"
            overrides+=("$checked")
            ;;
        --*=*)
            [[ "$key" =~ ^[a-z-]+$ && " $required $optional " == *" $key "* ]] || stop "${0##*/} has no argument --$key; --help lists all."
            case "$key" in
            config | workdir | root | bucket) read_path "$word" ;;
            repository) read_home "$word" ;;
            *) checked="$word" ;;
            esac
            printf -v "${key//-/_}" '%s' "${checked#*=}"
            ;;
        *) stop "${0##*/} cannot read the argument $word; write --name=value; --help lists all." ;;
        esac
    done
    if [[ -z "${command_words[*]-}" ]]; then
        required+=" config workdir"
    elif [[ -n "$config$workdir${overrides[*]-}" ]]; then
        stop "--config, --workdir and --config.FIELD are for the command after --; write them there."
    fi
    for key in $required; do
        word="${key//-/_}"
        [[ -n "${!word:-}" ]] || stop "${0##*/} needs --$key=…; --help says what it is."
    done
}

read_path() { # Sets $checked to an argument, `--name=PATH` or `PATH`, with ~ expanded; stops at URLs.
    local value="${1#--*=}"
    if [[ "$value" =~ ^[A-Za-z][A-Za-z0-9+.-]*:/ && "$1" != --storage=* ]]; then
        [[ "$1" != --bucket=* ]] || stop "$1 is a URL; expected the name of a bucket."
        stop "$1 is a URL; expected a path on the machines, where a bucket is mounted as a folder."
    fi
    read_home "$1"
}

read_home() { # Sets $checked to an argument, `--name=PATH` or `PATH`, with ~ and ~USER expanded, which bash leaves alone.
    local value="${1#--*=}" user home
    checked="$1"
    [[ "$value" =~ ^~[A-Za-z0-9._-]*(/|$) ]] || return 0
    user="${value%%/*}"
    eval "home=$user" # letters, digits and -._ alone
    [[ "$home" != "~"* ]] || stop "$1 begins with the home of a user who does not exist here; write the whole path."
    checked="${1%"$value"}$home${value#"$user"}"
}

give_up() { # One sentence, and the exit code for what went wrong on the way.
    printf '%s\n' "$1" >&2
    exit 1
}

quote() { # The words on one line, as a shell reads them back.
    local word line="" single="'" escaped="'\\''"
    for word in "$@"; do
        [[ "$word" =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]] || word="'${word//$single/$escaped}'"
        line+="${line:+ }$word"
    done
    printf '%s\n' "$line"
}

run() { # The command; with --dry-run, the line that would run it.
    if [[ -n "$dry_run" ]]; then
        quote "$@"
    else
        "$@"
    fi
}

fetch_command() { # One line that puts the repository, at the revision, into the folder `code`.
    printf '%s' "git init -q code && git -C code fetch -q --depth=1 $(quote "$repository" "$revision")" \
        " && git -C code checkout -q --detach FETCH_HEAD"
}

worker_command() { # worker_command ARGUMENTS…: one line that runs worker.sh from there, until the command is finished.
    if [[ -n "${command_words[*]-}" ]]; then
        set -- "$@" -- "${command_words[@]}"
    else
        set -- "$@" --config="$config" --workdir="$workdir" ${overrides[@]+"${overrides[@]}"}
    fi
    printf '%s' "exec bash code/launch/worker.sh $(quote "$@")"
}

tpu_hosts() { # tpu_hosts TYPE: the number of hosts of a slice such as v5litepod-256; nothing where that is not known.
    local size="${1##*-}"
    [[ "$size" =~ ^[0-9]+$ ]] || return 0
    case "$1" in
    v[234]-* | v5p-*) echo $(((size + 7) / 8)) ;; # cores, eight a host
    v5litepod-[1-4] | v6e-[1-4]) echo 1 ;;
    v5litepod-8 | v6e-8) ;; # one host of eight chips, or two of four
    v5litepod-* | v6e-*) echo $((size / 4)) ;;
    esac
}

run_on_tpu_vm() { # run_on_tpu_vm TYPE: worker.sh on all workers, attached. Where one runs, the lock makes this wait.
    local work hosts
    hosts="$(tpu_hosts "$1")"
    work="mkdir -p ~/hmar && cd ~/hmar && exec 9>lock && flock 9 && ( ${setup:+($setup) 9>&- && }$(fetch_command) && "
    work+="$(worker_command --accelerator=tpu --root=bucket --bucket="$bucket" ${hosts:+"--processes=$hosts"}))"
    work+=" >>train.log 2>&1"
    work+=" || { status=\$?; tail -n 40 ~/hmar/train.log; exit \$status; }"
    run gcloud compute tpus tpu-vm ssh "$name" --project="$project" --zone="$zone" --worker=all --quiet \
        --command="$work"
}
