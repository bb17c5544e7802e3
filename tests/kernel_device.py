"""Where the tests of kernels run: on a GPU where there is one, else on the CPU by Triton's interpreter."""

import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # read where kernels are defined: import this module before theirs
interpreter: Any = pytest.importorskip(
    "triton.runtime.interpreter", reason="Triton is not installed (it comes with PyTorch for GPUs)"
)

LAUNCH_OPTIONS = {"num_warps", "num_stages", "maxnreg"}
_launch = interpreter.GridExecutor.__call__


def _launch_strictly(self: Any, *args: Any, **kwargs: Any) -> Any:
    """The interpreter passes over arguments that a kernel does not have; on a GPU they are an error."""
    unknown = set(kwargs) - set(self.arg_names) - LAUNCH_OPTIONS
    if unknown:
        raise TypeError(f"{self.fn.__name__} has no {', '.join(sorted(unknown))}")
    return _launch(self, *args, **kwargs)


interpreter.GridExecutor.__call__ = _launch_strictly


if DEVICE == "cpu":
    # The interpreter puts its own functions into Triton's language anew at each call of a kernel and of each function
    # that a kernel calls, and computes whether sums of integers overflow, but looks at that in debugging alone. Without
    # both, kernels run more than twice as fast. The language stays the interpreter's: nothing compiles in this process.
    language = interpreter.tl
    interpreter._patch_lang(SimpleNamespace(__globals__={"tl": language, "core": language.core}))
    interpreter._patch_lang = lambda function: interpreter._LangPatchScope()
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)
