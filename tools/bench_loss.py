"""Times the pruned transducer loss on the CPU, beside k2 or fast_rnnt where one of them can be imported.

One measurement is forward and backward of simple / 2 + pruned, on two threads unless told otherwise: once with
the joiner's matrix product inside ("joiner 512") and once on given logits, which is the loss alone. Memory is the
most that a process of its own held above what it held once its inputs were made. Needs no data.
"""

import argparse
import importlib
import multiprocessing
import resource
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ssm_asr.transducer import pruned_loss

PEERS = ("k2", "fast_rnnt")


class Case(NamedTuple):
    """B utterances of T frames and S symbols of a vocabulary of V; joiner_dim 0: logits given."""

    batch_size: int
    frames: int
    symbols: int
    vocab_size: int
    joiner_dim: int

    def __str__(self) -> str:
        loss = f"joiner {self.joiner_dim}" if self.joiner_dim else "given logits"
        return f"B{self.batch_size} T{self.frames} S{self.symbols} V{self.vocab_size} {loss}"


class Cost(NamedTuple):
    time_ms: float
    memory_mb: float


SHAPES = ((8, 300, 80, 500), (30, 400, 100, 500), (30, 400, 100, 3000))
PRUNE_RANGE = 5


class Joiner(nn.Module):
    def __init__(self, dim: int, vocab_size: int) -> None:
        super().__init__()
        self.output_linear = nn.Linear(dim, vocab_size)

    def forward(self, encoder_out: Tensor, decoder_out: Tensor, project_input: bool) -> Tensor:
        assert not project_input
        logits: Tensor = self.output_linear(torch.tanh(encoder_out + decoder_out))
        return logits


def importable_peer() -> str | None:
    for name in PEERS:
        try:
            importlib.import_module(name)
        except (ImportError, OSError):
            continue
        return name
    return None


def resident_mb() -> float:
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * resource.getpagesize() / 1e6


def measure(case: Case, library: str, threads: int, flush_denormal: bool, repeats: int) -> Cost:
    """Cost of one step by "ssm_asr" or a peer. Call it in a process of its own."""
    torch.set_num_threads(threads)
    torch.set_flush_denormal(flush_denormal)
    torch.manual_seed(0)
    step = make_step(case, library)
    before_mb = resident_mb()
    step()
    memory_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6 - before_mb
    times_ms = []
    for _ in range(repeats):
        start = time.perf_counter()
        step()
        times_ms.append((time.perf_counter() - start) * 1000)
    return Cost(min(times_ms), memory_mb)


def make_step(case: Case, library: str) -> Any:
    B, T, S, V, J = case
    am_BTV, lm_BUV = torch.randn(B, T, V, requires_grad=True), torch.randn(B, S + 1, V, requires_grad=True)
    symbols_BS = torch.randint(1, V, (B, S))
    frames_B = torch.linspace(0.7 * T, T, B).long()
    symbols_lens_B = torch.linspace(0.7 * S, S, B).long()
    if J > 0:
        encoder_out_BTJ = torch.randn(B, T, J, requires_grad=True)
        decoder_out_BUJ = torch.randn(B, S + 1, J, requires_grad=True)
        joiner = Joiner(J, V)
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
        (0.5 * simple_B + pruned_B).sum().backward()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch (default: 2)")
    parser.add_argument("--repeats", type=int, default=3, help="the least time counts (default: 3)")
    parser.add_argument("--joiner-dim", type=int, default=512, help="of the joiner (default: 512)")
    parser.add_argument("--flush-denormal", action="store_true", help="let the CPU take denormal numbers for zero")
    args = parser.parse_args()

    peer = importable_peer()
    if peer is None:
        print(f"neither of {', '.join(PEERS)} can be imported: ssm_asr alone")
    libraries = ["ssm_asr"] + ([peer] if peer else [])
    cases = [Case(*shape, joiner_dim) for shape in SHAPES for joiner_dim in (0, args.joiner_dim)]
    print(f"torch {torch.__version__}, {args.threads} threads, flush denormal: {args.flush_denormal}")
    print(f"{'case':<38}" + "".join(f"{name + ' ms':>13}{name + ' MB':>13}" for name in libraries), end="")
    print(f"{'time ratio':>13}{'memory ratio':>13}" if peer else "")
    for case in tqdm(cases, leave=False):
        costs = []
        for library in libraries:
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
                job = process.submit(measure, case, library, args.threads, args.flush_denormal, args.repeats)
                costs.append(job.result())
        row = f"{case!s:<38}" + "".join(f"{cost.time_ms:13.0f}{cost.memory_mb:13.0f}" for cost in costs)
        if peer:
            ours, theirs = costs
            row += f"{ours.time_ms / theirs.time_ms:13.2f}{ours.memory_mb / theirs.memory_mb:13.2f}"
        tqdm.write(row)


if __name__ == "__main__":
    main()
