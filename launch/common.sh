# shellcheck shell=bash disable=SC2154 # read_arguments sets them
# What the launchers and worker.sh share: arguments, --dry-run, and the command line that a worker starts from. Sourced;
# runs on bash 3.2 and newer.

# shellcheck source=launch/environment.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"

overrides=() # --config.FIELD=VALUE arguments, for `hmar-jax train`
dry_run="" setup=""

read_arguments() { # read_arguments "REQUIRED NAMES" "OPTIONAL NAMES" "$@": --tpu-type=X sets $tpu_type, and so on.
    local required="$1" optional="$2" word key
    shift 2
    for word in "$@"; do
        [[ "$word" != --dry-run ]] || word=--dry-run=yes
        key="${word%%=*}"
        key="${key#--}"
        case "$word" in
        --help)
            sed '1d; /^# shellcheck/,$d; s/^# \{0,1\}//' "$0" # the comment at the top of the script
            exit 0
            ;;
        --config.*=*) overrides+=("$word") ;;
        --workdir=*://* | --bucket=*://*) stop "$word is a URL; expected the name of a bucket, and a path in it." ;;
        --*=*)
            [[ " $required $optional " == *" $key "* ]] || stop "${0##*/} has no argument --$key; --help lists all."
            printf -v "${key//-/_}" '%s' "${word#*=}"
            ;;
        *) stop "${0##*/} cannot read the argument $word; write --name=value; --help lists all." ;;
        esac
    done
    for key in $required; do
        word="${key//-/_}"
        [[ -n "${!word:-}" ]] || stop "${0##*/} needs --$key=…; --help says what it is."
    done
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

worker_command() { # worker_command ARGUMENTS…: one line that runs worker.sh from there, until the training is finished.
    printf '%s' "exec bash code/launch/worker.sh " \
        "$(quote "$@" --config="$config" --workdir="$workdir" ${overrides[@]+"${overrides[@]}"})"
}

train_on_tpu_vm() { # Runs worker.sh on all workers, attached. Where one runs already, the lock makes this wait for it.
    local work
    work="mkdir -p ~/hmar && cd ~/hmar && exec 9>lock && flock 9 && ( ${setup:+($setup) 9>&- && }$(fetch_command) && "
    work+="$(worker_command --accelerator=tpu --root=bucket --bucket="$bucket")) >>train.log 2>&1"
    work+=" || { status=\$?; tail -n 40 ~/hmar/train.log; exit \$status; }"
    run gcloud compute tpus tpu-vm ssh "$name" --project="$project" --zone="$zone" --worker=all --quiet \
        --command="$work"
}
