# Gives recipes numbered, resumable stages and options. A run.sh begins with `source recipes_lib/recipe.sh` and goes on:
#
#   recipe "Trains and tests a recogniser on this corpus." 3
#   option corpus "" DIR "directory of the corpus; made when not given"
#   flag   on_the_fly    "compute features while training"
#   list   set A.B=C     "override a value of the configuration; repeatable"
#   parse_options "$@"                       # this sets $corpus, $on_the_fly (true or false), "${set[@]}"
#
#   run_stage 1 features --inputs "$corpus" --outputs data/fbank -- python -m my.features "$corpus" data/fbank
#
# A stage is skipped if all its outputs exist and its last run finished with an equal command and equal inputs. A record
# of its last run is in .stages/ beside the first output. The commands run under `set -euo pipefail`.

set -euo pipefail
shopt -s inherit_errexit

declare -A _option_kind=()     # maps the name of an option to value, flag or list
declare -A _stage_of_output=() # maps a path to the number of the stage that makes it
_option_help=""
_running_stage=""

# _recipe_fail MESSAGE: ends the recipe with this error.
_recipe_fail() {
    echo "$(basename "$0"): error: $*" >&2
    exit 2
}

# recipe DESCRIPTION STAGES: sets the text that --help begins with, and the number of the last stage.
recipe() {
    _recipe_description="$1"
    _num_stages="$2"
    option stage 1 N "first stage to run"
    option stop_stage "$_num_stages" N "last stage to run"
}

# _declare_option NAME KIND METAVAR HELP: adds an option to --help.
_declare_option() {
    _option_kind["$1"]="$2"
    local shown="--${1//_/-}${3:+ $3}"
    _option_help+="$(printf '  %-22s %s' "$shown" "$4")"$'\n'
}

# option NAME DEFAULT METAVAR HELP: lets --name VALUE set $name.
option() {
    _declare_option "$1" value "$3" "$4${2:+ (default: $2)}"
    printf -v "$1" '%s' "$2"
}

# flag NAME HELP: lets --name set $name to true; it is false otherwise.
flag() {
    _declare_option "$1" flag "" "$2"
    printf -v "$1" false
}

# list NAME METAVAR HELP: lets each --name VALUE add to the array $name.
list() {
    _declare_option "$1" list "$2" "$3"
    local -n _values="$1"
    _values=()
}

# parse_options "$@": sets the declared variables, or prints them for --help; anything unknown is an error.
parse_options() {
    local name
    while [ $# -gt 0 ]; do
        if [ "$1" = --help ] || [ "$1" = -h ]; then
            printf 'Usage: bash %s [options]\n\n%s\n\n%s' "$0" "$_recipe_description" "$_option_help"
            exit 0
        fi
        [[ "$1" =~ ^--[a-z][a-z0-9-]*$ ]] || _recipe_fail "unexpected argument '$1' (see --help)"
        name="${1#--}"
        name="${name//-/_}"
        case "${_option_kind[$name]-}" in
            flag)
                printf -v "$name" true
                shift
                continue
                ;;
            value | list) [ $# -ge 2 ] || _recipe_fail "$1 needs a value (see --help)" ;;
            *) _recipe_fail "unknown option $1 (see --help)" ;;
        esac
        if [ "${_option_kind[$name]}" = list ]; then
            local -n _list="$name"
            _list+=("$2")
        else
            printf -v "$name" '%s' "$2"
        fi
        shift 2
    done
    for name in stage stop_stage; do
        [[ "${!name}" =~ ^[0-9]+$ ]] && [ "${!name}" -le "$_num_stages" ] ||
            _recipe_fail "--${name//_/-} ${!name}: give a number up to $_num_stages"
    done
}

# _path_state PATH: prints what identifies the state of a path. A file of up to 1 MiB is identified by its content, so
# that touching it changes nothing; a larger one, and each file below a directory, by its size and time.
_path_state() {
    if [ -d "$1" ]; then
        find -L "$1" -type f ! -path '*/.stages/*' -printf '%P\t%s\t%T@\n' | LC_ALL=C sort
    elif [ "$(stat -L -c %s "$1")" -le 1048576 ]; then
        cat "$1"
    else
        stat -L -c '%s %Y' "$1"
    fi
}

# _fingerprint INPUTS... -- COMMAND...: prints a hash of the command and the states of its inputs.
_fingerprint() {
    {
        printf '%q ' "$@"
        while [ "$1" != -- ]; do
            _path_state "$1" | sha256sum
            shift
        done
    } | sha256sum
}

# _stage_ended is the trap of EXIT: it says in which stage a recipe failed or was interrupted.
_stage_ended() {
    local status=$?
    if [ -n "$_running_stage" ]; then
        echo "$_running_stage stopped after $((SECONDS - _stage_start_s)) s (status $status);" \
            "the same command goes on from here" >&2
    fi
}
trap _stage_ended EXIT
# A command may catch Ctrl-C, tidy up and end without error. Its stage does not count as finished.
trap 'exit 130' INT

# _all_exist PATH...: tells whether all of these exist.
_all_exist() {
    local path
    for path in "$@"; do
        [ -e "$path" ] || return 1
    done
}

# run_stage NUMBER NAME [--inputs PATH...] --outputs PATH... -- COMMAND...: runs the command if the stage is asked for
# and not up to date.
run_stage() {
    local number="$1" name="$2" part="" fingerprint record path maker
    local label="[stage $1/$_num_stages $2]"
    local inputs=() outputs=()
    shift 2
    while [ $# -gt 0 ] && [ "$1" != -- ]; do
        if [ "$1" = --inputs ] || [ "$1" = --outputs ]; then
            part="$1"
        elif [ "$part" = --inputs ]; then
            inputs+=("$1")
        elif [ "$part" = --outputs ]; then
            outputs+=("$1")
        else
            _recipe_fail "run_stage $number $name: '$1' stands before --inputs or --outputs"
        fi
        shift
    done
    if [ $# -lt 2 ] || [ ${#outputs[@]} -eq 0 ]; then
        _recipe_fail "run_stage $number $name: needs --outputs PATH... and -- COMMAND..."
    fi
    shift

    for path in "${outputs[@]}"; do
        _stage_of_output["$path"]="$number"
    done
    if [ "$number" -lt "$stage" ] || [ "$number" -gt "$stop_stage" ]; then
        return
    fi
    for path in "${inputs[@]}"; do
        maker="${_stage_of_output[$path]-}"
        [ -e "$path" ] || _recipe_fail "$label needs $path, which is missing${maker:+: stage $maker makes it}"
    done

    record="$(dirname "${outputs[0]}")/.stages/$name-$(basename "${outputs[0]}")"
    fingerprint="$(_fingerprint "${inputs[@]}" -- "$@")"
    if _all_exist "${outputs[@]}" && [ -f "$record" ] && [ "$(<"$record")" = "$fingerprint" ]; then
        echo "$label up to date"
        return
    fi

    mkdir -p "$(dirname "$record")"
    rm -f "$record"
    echo "$label running"
    _stage_start_s=$SECONDS
    _running_stage="$label"
    "$@" # this must not be in a condition, which would switch off `set -e` in a function
    _running_stage=""
    _all_exist "${outputs[@]}" || _recipe_fail "$label ended without making all of: ${outputs[*]}"
    echo "$fingerprint" >"$record.new"
    mv "$record.new" "$record"
    echo "$label done in $((SECONDS - _stage_start_s)) s"
}
