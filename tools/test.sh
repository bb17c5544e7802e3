#!/usr/bin/env bash
# Checks style and types and runs the tests, on as many cores as there are, 8 at most. Arguments go to pytest, as in
#   bash tools/test.sh -k optim -n 0
# which runs those tests in one process.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash tools/setup.sh --extras dev,corpus,export
source .venv/bin/activate
# Without what they ask for, which is gigabytes and of no use here: the package of the Zipformer's authors, to compare with,
# and Triton, whose interpreter runs the kernels for GPUs on a CPU.
for package in zipformer==0.1.3 triton==3.6.0; do
    python -m pip show --quiet "${package%==*}" 2>/dev/null ||
        python -m pip install --quiet --disable-pip-version-check --no-deps "$package"
done

echo "test: ruff check"
ruff check .
echo "test: ruff format --check"
ruff format --check .
echo "test: mypy"
mypy
echo "test: pytest"
python -m pytest -n auto --maxprocesses 8 --dist loadfile "$@"
