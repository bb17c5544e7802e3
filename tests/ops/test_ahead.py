"""Kernels are noted without a launch, and compiled for a GPU by other processes, on a machine that has none."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed (it comes with PyTorch for GPUs)")

# A process of its own, since Triton is told of a GPU that is not there, and not to interpret.
SCRIPT = """
import json
from pathlib import Path
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from ssm_asr.data.parallel import parallel_map
from ssm_asr.ops import ahead, dispatch
from ssm_asr.ops.swoosh import swoosh

class NoGpu:
    def get_current_target(self): return GPUTarget("cuda", 90, 32)
    def get_current_device(self): return 0
    def get_current_stream(self, device): return 0

def main():
    driver.set_active(NoGpu())
    dispatch.use_kernels = lambda x: True
    with ahead.recording() as kernels:
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.zeros(4, 32, dtype=dtype, requires_grad=True)
            swoosh(x, 4.0, 0.08).sum().backward()
    cubins = lambda: len(list(Path(ahead.cache_directory()).rglob("*.cubin")))
    before = cubins()
    list(parallel_map(ahead.compile_kernel, sorted(kernels), 2, "compiling", "kernel", chunk=1))
    print(json.dumps([[kernel.name for kernel in sorted(kernels)], before, cubins(), ahead.cache_directory()]))

if __name__ == "__main__":
    main()
"""


def test_kernels_are_noted_and_compiled_elsewhere(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    environment = {k: x for k, x in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    names, before, after, directory = json.loads(done.stdout.splitlines()[-1])
    assert len(names) == 4 and len(set(names)) == 2  # forward and backward, in two types
    assert before == 0 and after == 4
    assert directory == str(tmp_path / "cache")
