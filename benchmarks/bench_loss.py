"""Times the pruned transducer loss on the CPU, beside k2 or fast_rnnt where one of them can be imported.

    python benchmarks/bench_loss.py

The inputs are random tensors. One step is the forward and backward pass of simple / 2 + pruned on one thread, once with
the joiner's matrix products inside ("joiner 512") and once on given logits, which is the loss alone. The sides take
steps in turn. Times are processor times, since other programs may run; the table has medians, and for the ratio the
median of the ratios within turns. Memory is the most that a side's process held above what it held once its inputs
were made.

fast_rnnt is on PyPI as source. If its build does not find Python's headers or asks for a later C++, this helps:
    CPATH=PYTHON_INCLUDE_DIRECTORY FT_CMAKE_ARGS="-DCMAKE_BUILD_TYPE=Release -DFT_BUILD_TESTS=OFF -DFT_WITH_CUDA=OFF
        -DCMAKE_CXX_STANDARD=20 -DFETCHCONTENT_SOURCE_DIR_PYBIND11=UNPACKED_PYBIND11_3_SOURCE"
        pip install --no-build-isolation --no-deps fast_rnnt==1.3
"""

import argparse
import importlib
import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from ssm_asr.cli.program import positive, run
from ssm_asr.transducer import pruned_loss
from ssm_asr.transducer.predictor import Joiner

PEERS = ("k2", "fast_rnnt")


class Case(NamedTuple):
    """A case has B utterances of T frames and S symbols, a vocabulary of V, and logits given if joiner_dim is 0."""

    batch_size: int
    frames: int
    symbols: int
    vocab_size: int
    joiner_dim: int

    def __str__(self) -> str:
        loss = f"joiner {self.joiner_dim}" if self.joiner_dim else "given logits"
        return f"B{self.batch_size} T{self.frames} S{self.symbols} V{self.vocab_size} {loss}"


SHAPES = ((8, 300, 80, 500), (30, 400, 100, 500), (30, 400, 100, 3266))
PRUNE_RANGE = 5


def importable_peer() -> str | None:
    """Returns the first peer that can be imported; one that was built for another PyTorch cannot."""
    for name in PEERS:
        try:
            importlib.import_module(name)
        except (ImportError, OSError):
            continue
        return name
    return None


def resident_mb() -> float:
    """Returns the MB of this process that are in RAM."""
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * resource.getpagesize() / 1e6


class Side:
    """A side is one library on one case. It has a process of its own, so that its memory can be measured."""

    def __init__(self, case: Case, library: str, flush_denormal: bool) -> None:
        self._process = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
        self.memory_mb: float = self._process.submit(_prepare, case, library, flush_denormal).result()

    def step_ms(self) -> float:
        """Returns the milliseconds that another step takes."""
        return self._process.submit(_step_ms).result()

    def close(self) -> None:
        """Ends the process."""
        self._process.shutdown()


_step: Any = None  # in the process of a side, `_prepare` puts its step here


def _prepare(case: Case, library: str, flush_denormal: bool) -> float:
    """Makes the step, takes it once, and returns the MB that it needed."""
    global _step
    torch.set_num_threads(1)
    torch.set_flush_denormal(flush_denormal)
    torch.manual_seed(0)
    _step = make_step(case, library)
    before_mb = resident_mb()
    _step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6 - before_mb


def _step_ms() -> float:
    start = time.process_time()
    _step()
    return (time.process_time() - start) * 1000


def measure(case: Case, libraries: list[str], options: argparse.Namespace) -> str:
    """Returns a row of the table."""
    sides = [Side(case, library, options.flush_denormal) for library in libraries]
    times_ms = [[side.step_ms() for side in sides] for _ in range(options.repeats)]
    for side in sides:
        side.close()
    row = f"{case!s:<38}"
    for side, side_ms in zip(sides, zip(*times_ms, strict=True), strict=True):
        row += f"{statistics.median(side_ms):13.0f}{side.memory_mb:13.0f}"
    if len(sides) > 1:
        ratio = statistics.median(ours_ms / peer_ms for ours_ms, peer_ms in times_ms)
        row += f"{ratio:13.2f}{sides[0].memory_mb / sides[1].memory_mb:13.2f}"
    return row


def make_step(case: Case, library: str) -> Callable[[], None]:
    """Makes the inputs of a case and returns a function that computes the losses and their gradients."""
    B, T, S, V, J = case
    am_BTV, lm_BUV = torch.randn(B, T, V, requires_grad=True), torch.randn(B, S + 1, V, requires_grad=True)
    symbols_BS = torch.randint(1, V, (B, S))
    frames_B = torch.linspace(0.7 * T, T, B).long()
    symbols_lens_B = torch.linspace(0.7 * S, S, B).long()
    if J > 0:
        encoder_out_BTJ = torch.randn(B, T, J, requires_grad=True)
        decoder_out_BUJ = torch.randn(B, S + 1, J, requires_grad=True)
        joiner = Joiner(1, 1, J, V)  # its projections are not used
        inputs = [am_BTV, lm_BUV, encoder_out_BTJ, decoder_out_BUJ, *joiner.output_linear.parameters()]
        if library != "ssm_asr":
            sys.modules["k2"] = importlib.import_module(library)  # fast_rnnt has the functions of k2

        def losses() -> tuple[Tensor, Tensor]:
            return pruned_loss.pruned_transducer_loss(
                am_BTV,
                lm_BUV,
                encoder_out_BTJ,
                decoder_out_BUJ,
                joiner,
                symbols_BS,
                frames_B,
                symbols_lens_B,
                PRUNE_RANGE,
                backend="torch" if library == "ssm_asr" else "k2",
            )
    else:
        functions: Any = pruned_loss if library == "ssm_asr" else importlib.import_module(library)
        logits_BTRV = torch.randn(B, T, PRUNE_RANGE, V, requires_grad=True)
        inputs = [am_BTV, lm_BUV, logits_BTRV]
        zeros_B = torch.zeros_like(frames_B)
        boundary_B4 = torch.stack([zeros_B, zeros_B, symbols_lens_B, frames_B], 1)
        common = dict(symbols=symbols_BS, termination_symbol=0, boundary=boundary_B4, reduction="none")

        def losses() -> tuple[Tensor, Tensor]:
            simple_B, occupations = functions.rnnt_loss_smoothed(
                lm_BUV, am_BTV, lm_only_scale=0.25, am_only_scale=0.0, return_grad=True, **common
            )
            ranges = functions.get_rnnt_prune_ranges(*occupations, boundary_B4, PRUNE_RANGE)
            return simple_B, functions.rnnt_loss_pruned(logits_BTRV, ranges=ranges, **common)

    def step() -> None:
        simple_B, pruned_B = losses()
        torch.autograd.grad((0.5 * simple_B + pruned_B).sum(), inputs)

    return step


def main() -> None:
    """Runs the program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=positive, default=5, help="steps timed of each side (default: 5)")
    parser.add_argument("--joiner-dim", type=int, default=512, help="width of the joiner (default: 512)")
    parser.add_argument("--flush-denormal", action="store_true", help="let the CPU take denormal numbers for zero")
    options = parser.parse_args()

    peer = importable_peer()
    if peer is None:
        print(f"neither of {', '.join(PEERS)} can be imported: ssm_asr alone")
    libraries = ["ssm_asr"] + ([peer] if peer else [])
    cases = [Case(*shape, joiner_dim) for shape in SHAPES for joiner_dim in (0, options.joiner_dim)]
    print(f"torch {torch.__version__}, 1 thread, flush denormal: {options.flush_denormal}")
    print(f"{'case':<38}" + "".join(f"{name + ' ms':>13}{name + ' MB':>13}" for name in libraries), end="")
    print(f"{'time ratio':>13}{'memory ratio':>13}" if peer else "")
    for case in tqdm(cases, leave=False, disable=None):
        tqdm.write(measure(case, libraries, options))


if __name__ == "__main__":
    sys.exit(run(main))
