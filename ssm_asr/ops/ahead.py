"""Compiles Triton kernels before they are needed, so that many processes can share the work.

Triton compiles a kernel when it is first launched, one after the other, in half a second or more each. Here launches
are noted and not made (`recording`), and what they would have compiled is compiled from the notes (`compile_kernel`),
in any process and without a GPU. Triton keeps compiled kernels on disk, where the later launch finds them.
"""

import importlib
import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple


class Kernel(NamedTuple):
    """One version of a kernel, as Triton describes it.

    Attributes:
        module, name: where the kernel is defined.
        specialization: Triton's own text on types, constants and options.
        target: of the GPU: kind, architecture and threads of a warp.
    """

    module: str
    name: str
    specialization: str
    target: tuple[str, int, int]


@contextmanager
def recording() -> Iterator[set[Kernel]]:
    """Returns a context in which kernels that are not loaded are noted in a set, and neither compiled nor launched.

    What these kernels would have written is left as it is, so whatever follows from it must not be looked at.
    """
    from triton import knobs
    from triton.runtime import driver

    target = driver.active.get_current_target()
    noted: set[Kernel] = set()

    def note(*, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        place = (target.backend, target.arch, target.warp_size)
        noted.add(Kernel(fn.module, fn.name, compile["specialization_data"], place))
        return True  # this keeps Triton from going on

    before, knobs.runtime.jit_cache_hook = knobs.runtime.jit_cache_hook, note
    try:
        yield noted
    finally:
        knobs.runtime.jit_cache_hook = before


def cache_directory() -> str:
    """Returns where Triton keeps compiled kernels; the environment variable TRITON_CACHE_DIR sets it."""
    from triton import knobs

    return str(knobs.cache.dir)


def compile_kernel(kernel: Kernel) -> None:
    """Compiles a kernel, and the C code that launches it, into Triton's cache on disk, unless they are there."""
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.driver import CudaLauncher, library_dirs
    from triton.compiler import compile as triton_compile

    source, options = _source_and_options(kernel)
    compiled = triton_compile(source, target=GPUTarget(*kernel.target), options=options)
    try:
        library_dirs()
    except (AssertionError, OSError, subprocess.CalledProcessError):
        return  # nothing is launched without a driver, to which the C code would be linked
    CudaLauncher(compiled.src, compiled.metadata)


def _source_and_options(kernel: Kernel) -> tuple[Any, dict[str, Any]]:
    """Returns what Triton compiles."""
    import triton.language as tl
    from triton.compiler import ASTSource

    function: Any = importlib.import_module(kernel.module)
    for part in kernel.name.split("."):
        function = getattr(function, part)
    given = json.loads(kernel.specialization)

    def constant(value: Any) -> Any:
        if isinstance(value, dict) and "constexpr" in value:
            return tl.constexpr(value["constexpr"])
        return tl.dtype(value) if tl.dtype.is_dtype(value) else value

    constants = {tuple(k): constant(v) for k, v in zip(given["constant_keys"], given["constant_vals"], strict=True)}
    attributes = {tuple(k): v for k, v in zip(given["attrs_keys"], given["attrs_vals"], strict=True)}
    options = {name: tuple(v) if isinstance(v, list) else v for name, v in given["options"].items()}
    signature = {name: _as_tuple(v) for name, v in given["signature"].items()}
    return ASTSource(function, signature, constants, attributes), options


def _as_tuple(value: Any) -> Any:
    return tuple(map(_as_tuple, value)) if isinstance(value, list) else value
