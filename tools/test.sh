#!/usr/bin/env bash
# Checks style and types and runs the tests. Arguments go to pytest: bash tools/test.sh -k optim
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash tools/setup.sh --extras dev,corpus,export
source .venv/bin/activate
# The encoder's authors' own package, to compare with. Its dependencies fetch gigabytes, and none is needed for that.
peer="$(grep '^zipformer==' tools/constraints.txt)"
python -m pip show --quiet zipformer 2>/dev/null || python -m pip install --quiet --no-deps --disable-pip-version-check "$peer"

echo "test: ruff check"
ruff check .
echo "test: ruff format --check"
ruff format --check .
echo "test: mypy"
mypy
echo "test: pytest"
python -m pytest "$@"
