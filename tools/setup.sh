#!/usr/bin/env bash
# Makes the virtual environment .venv with everything that the recipes need; usage() says how.
set -euo pipefail

usage() {
    cat <<'EOF'
Usage: bash tools/setup.sh [--extras NAME,...]

Makes .venv at the root of the repository and installs the project there, with the versions of
tools/constraints.txt. A second call returns at once unless setup.py or those versions changed.

  --extras NAME,...  also install these extras of setup.py: corpus, export, dev. They add up over calls.

PYTHON=/path/to/python3.11 chooses the Python to start from (3.11 or later).
A torch that this Python or .venv already has is kept; otherwise torch 2.13.0 is installed.
EOF
}

say() { echo "setup: $*"; }
fail() {
    echo "setup: error: $*" >&2
    exit 1
}

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$root"
source tools/environment.sh
extras=""
while [ $# -gt 0 ]; do
    case "$1" in
        --extras)
            [ $# -ge 2 ] || fail "--extras needs a value, such as dev,corpus"
            extras="$2"
            shift 2
            ;;
        -h | --help) usage; exit 0 ;;
        *) fail "unknown argument '$1' (see --help)" ;;
    esac
done

constraints=tools/constraints.txt
stamp=.venv/.installed # line 1 has the fingerprint of what is installed, line 2 its extras
log=.venv/setup.log
fingerprint="$({ echo "$root"; cat setup.py "$constraints"; } | sha256sum | cut -d ' ' -f 1)"

installed_fingerprint=""
installed_extras=""
if [ -f "$stamp" ]; then
    { read -r installed_fingerprint && read -r installed_extras; } <"$stamp" || true
fi
extras="$(tr ',' '\n' <<<"$extras,$installed_extras" | sed '/^$/d' | sort -u | paste -s -d ,)"
if [ "$fingerprint" = "$installed_fingerprint" ] && [ "$extras" = "$installed_extras" ]; then
    say ".venv is up to date${extras:+ (extras: $extras)}"
    exit 0
fi

has_torch() { "$1" -c 'import torch' 2>/dev/null; }

find_python() {
    if [ -n "${PYTHON:-}" ]; then
        is_recent "$PYTHON" || fail "PYTHON=$PYTHON is version $(version_of "$PYTHON"): give Python 3.11 or later"
        echo "$PYTHON"
        return
    fi
    local candidate
    for candidate in python3 python3.11 python3.12 python3.13 python; do
        if is_recent "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    fail "needs Python 3.11 or later, python3 is $(version_of python3): install python3.11, or set PYTHON to its path"
}

if .venv/bin/python -c '' 2>/dev/null; then
    is_recent .venv/bin/python || fail ".venv has Python $(version_of .venv/bin/python): delete it and call again"
else
    python="$(find_python)"
    options=(--clear) # an interrupted call may have left files
    if has_torch "$python"; then
        options+=(--system-site-packages)
    fi
    say "making .venv with Python $(version_of "$python")"
    if ! "$python" -m venv "${options[@]}" .venv; then
        rm -rf .venv
        fail "$python cannot make virtual environments: install its venv module (Debian: apt-get install python3-venv)"
    fi
fi
.venv/bin/python -m pip --version >/dev/null 2>&1 || .venv/bin/python -m ensurepip >/dev/null

# These are the constraints, but with the torch that is there already.
pins=.venv/constraints.txt
cp "$constraints" "$pins"
if has_torch .venv/bin/python; then
    torch="$(.venv/bin/python -c 'from importlib.metadata import version; print(version("torch"))')"
    say "keeping torch $torch"
    sed -i '/^torch==/d' "$pins"
    echo "torch==$torch" >>"$pins"
fi

show_progress() {
    local line name
    while IFS= read -r line; do
        if [[ "$line" == "Collecting "* ]]; then
            name="${line#Collecting }"
            printf ' %s' "${name%%[^A-Za-z0-9_.-]*}"
        elif [[ "$line" =~ Downloading\ .*\(([0-9.]+\ [MG]B)\) ]]; then
            printf ' (%s)' "${BASH_REMATCH[1]}"
        elif [[ "$line" == "Installing collected packages"* ]]; then
            printf '\nsetup: unpacking'
        fi
    done
    echo
}

printf '%s\n' unfinished "$installed_extras" >"$stamp" # an install that fails now is done again by the next call
say "installing the project${extras:+ with $extras}; log in $log"
SECONDS=0
printf 'setup: fetching'
if ! .venv/bin/python -m pip install --disable-pip-version-check --no-input --progress-bar off \
    --constraint "$pins" --editable ".${extras:+[$extras]}" 2>&1 | tee "$log" | show_progress; then
    tail -n 15 "$log" >&2
    fail "pip failed: see $log; the next call tries again"
fi
if unknown="$(grep -o "does not provide the extra '[^']*'" "$log")"; then
    fail "setup.py $unknown: give corpus, export or dev"
fi
printf '%s\n' "$fingerprint" "$extras" >"$stamp"
say "done in $SECONDS s; activate with: source .venv/bin/activate"
