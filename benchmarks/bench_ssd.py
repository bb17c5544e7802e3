"""Times Mamba-2's operation on one GPU, forward and backward, at the layer shapes of Sammo M for 600 s of audio.

    python benchmarks/bench_ssd.py [--peer FOLDER]

The inputs are random tensors. The sides are the Triton kernels, the chunked form in PyTorch, and the scan of the
package mamba_ssm if --peer gives the folder that holds it; its folders ops/triton and utils are enough. "graph" is the
time of a captured CUDA graph's replay, which is what the GPU needs; "eager" includes the launches by the host. "floor"
is the time to read and write every input and output once in each direction. Values and gradients are compared with the
recurrence in float64 first.

Shapes: T frames, P channels of a head, G groups, N states.
"""

import argparse
import functools
import importlib
import statistics
import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssm_asr.cli.program import positive, run
from ssm_asr.ops.devices import find_device
from ssm_asr.ops.ssd import ssd, ssd_chunked, ssd_recurrent

HEADS = 16
FRAMES_DIMS = [(750, 192), (375, 256), (188, 384), (94, 512)]
GROUPS_STATES = [(8, 16), (4, 32), (2, 64), (1, 128)]
COPY_BYTES_A_MS = 3.0e9  # an H100 was measured to read and write this many bytes in a ms
PEER_CONFIGS = 3  # this many configurations of each peer kernel are tried: the smallest, which fit in float32
PEER_FRAMES = 750  # the peer is timed at this length
NAMES = ("y", "end", "dx", "ddt", "dA", "dB", "dC", "dD", "dstate")

Operation = Callable[..., tuple[Tensor, Tensor]]


def operands(batch_size: int, T: int, P: int, G: int, N: int, dtype: torch.dtype) -> list[Tensor]:
    """Returns random x, dt, A, B, C, D and state, as a new layer has them, with gradients."""
    inputs = [
        torch.randn(batch_size, T, HEADS, P),
        torch.empty(batch_size, T, HEADS).uniform_(1e-3, 0.1),
        -torch.empty(HEADS).uniform_(1.0, 16.0),
        torch.randn(batch_size, T, G, N),
        torch.randn(batch_size, T, G, N),
        torch.randn(HEADS),
        torch.randn(batch_size, HEADS, P, N),
    ]
    return [x.to("cuda", dtype).requires_grad_() for x in inputs]


def peer_operation(folder: Path) -> Operation:
    """Returns mamba_ssm's scan. The package is not imported whole, since it needs compiled extensions."""
    module: Any = types.ModuleType("mamba_ssm")
    module.__path__ = [str(folder / "mamba_ssm")]
    sys.modules["mamba_ssm"] = module
    scan = importlib.import_module("mamba_ssm.ops.triton.ssd_combined").mamba_chunk_scan_combined
    for name in [name for name in sys.modules if name.startswith("mamba_ssm.ops.triton")]:
        for kernel in vars(sys.modules[name]).values():
            if hasattr(kernel, "configs"):  # trying all of them would take minutes for each shape
                kernel.configs = kernel.configs[-PEER_CONFIGS:]

    def operation(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        x, dt, A, B, C, D, state = inputs
        y, end = scan(x, dt, A, B, C, chunk_size=64, D=D, initial_states=state, return_final_states=True)
        return y, end

    return operation


def with_gradients(operation: Operation, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Returns the outputs and the gradients of the inputs, for fixed gradients of the outputs."""
    outputs = operation(*inputs)
    generator = torch.Generator().manual_seed(2)
    weights = [torch.randn(y.shape, generator=generator).to(y) for y in outputs]
    return [*outputs, *torch.autograd.grad(outputs, list(inputs), weights)]


def forward_backward(operation: Operation, inputs: list[Tensor], weights: list[Tensor]) -> None:
    """Runs an operation forward and backward; `weights` are the gradients of its outputs."""
    torch.autograd.grad(operation(*inputs), inputs, weights)


def worst_error(operation: Operation, inputs: list[Tensor]) -> tuple[float, str]:
    """Returns the largest relative distance from the float64 recurrence, and the value or gradient that has it."""
    expected = with_gradients(ssd_recurrent, inputs)
    actual = with_gradients(operation, [x.detach().float().requires_grad_() for x in inputs])
    errors = [float((a - e).detach().norm() / e.detach().norm()) for a, e in zip(actual, expected, strict=True)]
    return max(zip(errors, NAMES, strict=True))


def time_ms(step: Callable[[], Any], repeats: int = 30) -> float:
    """Returns the median time of a step by the GPU's own clock."""
    for _ in range(3):
        step()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        step()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def graph_of(step: Callable[[], Any]) -> Callable[[], Any]:
    """Captures a step in a CUDA graph and returns the function that replays it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def floor_ms(inputs: Sequence[Tensor]) -> float:
    """Returns the time to move x, dt, B and C three times, and y and its gradient once each."""
    x, dt, _, B, C, _, _ = inputs
    numbers = 3 * (x.numel() + dt.numel() + B.numel() + C.numel()) + 2 * x.numel()
    return 4 * numbers / COPY_BYTES_A_MS


def main() -> None:
    """Runs the program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", type=Path, help="folder that holds the package mamba_ssm (default: no peer)")
    parser.add_argument("--sides", default="kernels,chunked,mamba_ssm", help="which to time (default: all)")
    parser.add_argument("--states", type=int, nargs="+", default=[16, 32, 64, 128], help="N to time (default: all)")
    parser.add_argument("--peer-states", type=int, nargs="+", default=[16, 128], help="N to time the peer at")
    parser.add_argument("--batch-size", type=positive, default=40, help="utterances of 15 s (default: 40)")
    options = parser.parse_args()
    try:
        find_device("cuda")
    except ValueError as missing:
        parser.error(str(missing))
    sides: dict[str, Operation] = {"kernels": ssd, "chunked": ssd_chunked}
    if options.peer:
        sides["mamba_ssm"] = peer_operation(options.peer)
    sides = {name: side for name, side in sides.items() if name in options.sides.split(",")}
    torch.manual_seed(0)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, batch {options.batch_size}, forward + backward")
    print(f"{'shape':<26}{'side':<11}{'worst error':>16}{'eager ms':>10}{'graph ms':>10}{'floor ms':>10}{'/floor':>8}")
    for T, dim in FRAMES_DIMS:
        for G, N in [size for size in GROUPS_STATES if size[1] in options.states]:
            P = dim * 3 // 4 // HEADS
            small = operands(2, T, P, G, N, torch.float64)
            inputs = operands(options.batch_size, T, P, G, N, torch.float32)
            floor = floor_ms(inputs)
            weights = [torch.ones_like(inputs[0]), torch.ones_like(inputs[6])]
            for name, operation in sides.items():
                if name == "mamba_ssm" and (T != PEER_FRAMES or N not in options.peer_states):
                    continue
                error, whose = worst_error(operation, small)
                step = functools.partial(forward_backward, operation, inputs, weights)
                eager = time_ms(step)
                graph = time_ms(graph_of(step))
                row = f"T {T:<4} P {P:<3} G {G} N {N:<8}"
                print(
                    f"{row:<26}{name:<11}{error:>9.1e} {whose:<6}{eager:10.3f}{graph:10.3f}{floor:10.3f}"
                    f"{graph / floor:8.1f}",
                    flush=True,
                )


if __name__ == "__main__":
    sys.exit(run(main))
