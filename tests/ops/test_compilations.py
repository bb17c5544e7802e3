"""A batch of another shape runs by the kernels that those before had compiled, each of which takes a second or more."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed (it comes with PyTorch for GPUs)")

TESTS = Path(__file__).parent.parent
CONFIGS = TESTS.parent / "egs/librispeech/conf"
# 400, 464 and 304 encoder frames. (Attention weights whose rows end at a multiple of 16 are loaded by a kernel of their
# own, so that a shape of 352, of which the half is one, would compile two more.)
SHAPES = ["8,30,12", "9,26,11", "6,28,15"]


@pytest.mark.parametrize("name", ["zipformer_tiny", "sammo_tiny", "conformer_tiny", "ssmformer_tiny"])
def test_further_shapes_compile_nothing(name):
    environment = {k: x for k, x in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, str(TESTS / "compilations.py"), str(CONFIGS / f"{name}.yaml"), *SHAPES]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    first, *further = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(first) > 20
    assert further == [[], []]
