#!/usr/bin/env bash
# Compares the project's transducer losses with k2 1.23.4 in a virtual environment of its own; usage() says how.
set -euo pipefail

usage() {
    cat <<'USAGE'
Usage: tools/check_k2.sh [--venv DIR] [--bench]

Fails if a function of the transducer loss differs from k2's (1.23.4, with PyTorch 1.13.1). The environment takes
3.5 GB; pip fetches it from the package index, which takes some minutes.

  --venv DIR  make the environment in DIR, or use the one that is there (default: a temporary folder, removed)
  --bench     also time both losses, with benchmarks/bench_loss.py

PYTHON names the Python 3.11 to use (default: python3.11).
USAGE
}

venv=""
bench=false
while [[ $# -gt 0 ]]; do
    case "$1" in
        --venv)
            venv="${2:?--venv needs a folder}"
            shift 2
            ;;
        --bench)
            bench=true
            shift
            ;;
        -h | --help)
            usage
            exit
            ;;
        *)
            echo "check_k2.sh: unknown argument $1" >&2
            usage >&2
            exit 2
            ;;
    esac
done

root="$(cd "$(dirname "$0")/.." && pwd)"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
venv="${venv:-$work/venv}"

if ! "$venv/bin/python" -c "import k2" 2>/dev/null; then
    echo "installing k2 and its PyTorch into $venv (3.5 GB)"
    "${PYTHON:-python3.11}" -m venv "$venv"
    "$venv/bin/pip" install --quiet torch==1.13.1 "numpy<2" tqdm
    # PyPI has several wheels of this version, and without the hash pip would take one for another PyTorch.
    echo "k2==1.23.4 --hash=sha256:5b5f709b12b9cd092b583984d0b7d940c9f898101259c998d68d1f4adefa48d4" \
        >"$work/requirements.txt"
    "$venv/bin/pip" install --quiet --no-deps --require-hashes -r "$work/requirements.txt"
fi

export PYTHONPATH="$root"
"$venv/bin/python" "$root/tools/check_k2.py"
if "$bench"; then
    "$venv/bin/python" "$root/benchmarks/bench_loss.py"
fi
