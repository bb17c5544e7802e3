"""Where the tests of kernels run: on a GPU where there is one, else on the CPU by Triton's interpreter."""

import os

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # read where kernels are defined: import this module before theirs
pytest.importorskip("triton", reason="Triton is not installed (it comes with PyTorch for GPUs)")
