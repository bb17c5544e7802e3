#!/usr/bin/env bash
# Checks style and types and runs the tests, on as many cores as there are, 8 at most. Arguments go to pytest:
#   bash tools/test.sh -k optim -n 0
# runs those tests in one process. With SSM_ASR_ENV=current, the tests run in the environment of the caller, and nothing
# is installed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

source tools/environment.sh
kind="${SSM_ASR_ENV:-venv}"
enter_environment "$kind" dev,corpus,export
# Tests compare with the package of the Zipformer's authors, and run kernels for GPUs on a CPU by Triton's interpreter.
# Both are installed without what they require, which takes gigabytes and is not needed here.
for package in zipformer==0.1.3 triton==3.6.0; do
    name="${package%==*}"
    if python -c "from importlib.metadata import version; version('$name')" 2>/dev/null; then
        continue
    elif [ "$kind" = venv ]; then
        python -m pip install --quiet --disable-pip-version-check --no-deps "$package"
    else
        echo "test: $name is not installed, so the tests that need it are skipped"
    fi
done

echo "test: ruff check"
python -m ruff check .
echo "test: ruff format --check"
python -m ruff format --check .
echo "test: mypy"
python -m mypy
echo "test: pytest"
python -m pytest -n auto --maxprocesses 8 --dist loadfile "$@"
