#!/usr/bin/env bash
# Checks style and types and runs the tests. Arguments go to pytest: bash tools/test.sh -k optim
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash tools/setup.sh --extras dev,corpus
source .venv/bin/activate

echo "test: ruff check"
ruff check .
echo "test: ruff format --check"
ruff format --check .
echo "test: mypy"
mypy
echo "test: pytest"
python -m pytest "$@"
