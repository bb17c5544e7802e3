"""Compares the project's transducer losses with k2's on random ragged batches, and fails if they differ.

tools/check_k2.sh makes an environment with k2 and runs this program in it. A difference is the largest of
|ours - k2's| / (1 + |k2's|) over all elements and batches.

Shapes: B utterances, T frames, S symbols, U = S+1 predictor outputs, V vocabulary, J joiner dimension.
"""

import argparse
import importlib.metadata
import sys
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

try:
    import k2
except ImportError:
    sys.exit("check_k2.py: k2 is not installed here; tools/check_k2.sh makes an environment that has it")

from ssm_asr.cli.program import positive, run
from ssm_asr.transducer import pruned_loss
from ssm_asr.transducer.predictor import Joiner

RNNT_TYPES = ("regular", "modified", "constrained")
TOLERANCES = {torch.float64: 1e-8, torch.float32: 1e-4}
PRUNE_RANGE = 4
DELAY_PENALTY = 0.0625  # exact in float32, in which k2 computes the penalty even of float64 scores

Row = tuple[str, str, str]  # the function, the RNN-T type and the type of the numbers


class Batch:
    """Holds the random inputs of a comparison; the utterances have different lengths."""

    def __init__(self, seed: int, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(seed)

        def below(low: int, high: int, *shape: int) -> Tensor:
            return torch.randint(low, high, shape, generator=generator)

        def normal(*shape: int) -> Tensor:
            return (3 * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype)

        B, T, S, V, J = (int(below(low, high)) for low, high in ((1, 5), (12, 60), (1, 12), (3, 30), (2, 9)))
        self.frames_B = below(S, T + 1, B)
        self.symbols_lens_B = below(0, S + 1, B)
        self.symbols_BS = below(1, V, B, S)
        zeros_B = torch.zeros_like(self.frames_B)
        self.boundary_B4 = torch.stack([zeros_B, zeros_B, self.symbols_lens_B, self.frames_B], 1)
        self.am_BTV, self.lm_BUV = normal(B, T, V), normal(B, S + 1, V)
        self.encoder_BTJ, self.decoder_BUJ = normal(B, T, J), normal(B, S + 1, J)
        self.logits_BTUV = normal(B, T, S + 1, V)
        self.joiner = Joiner(1, 1, J, V).to(dtype)  # its projections are not used
        self.common: dict[str, Any] = dict(symbols=self.symbols_BS, termination_symbol=0, delay_penalty=DELAY_PENALTY)
        self.common.update(boundary=self.boundary_B4, reduction="none")


def gradients(losses: list[Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """Returns the gradients of the sum of all losses."""
    return list(torch.autograd.grad(torch.stack([loss.sum() for loss in losses]).sum(), inputs))


def step_results(functions: Any, batch: Batch, rnnt_type: str, ranges: Tensor) -> dict[str, list[Tensor]]:
    """Returns values and gradients of each step of the loss by its name, pruned to the given ranges."""
    am, lm = batch.am_BTV.clone().requires_grad_(), batch.lm_BUV.clone().requires_grad_()
    full = batch.logits_BTUV.clone().requires_grad_()
    pruned = batch.logits_BTUV[:, :, : ranges.shape[2]].clone().requires_grad_()
    common = dict(batch.common, rnnt_type=rnnt_type)
    results = {}
    simple, occupations = functions.rnnt_loss_simple(lm, am, return_grad=True, **common)
    results["rnnt_loss_simple"] = [simple, *occupations, *gradients([simple], [am, lm])]
    smoothed, occupations = functions.rnnt_loss_smoothed(
        lm, am, lm_only_scale=0.25, am_only_scale=0.1, return_grad=True, **common
    )
    results["rnnt_loss_smoothed"] = [smoothed, *occupations, *gradients([smoothed], [am, lm])]
    loss = functions.rnnt_loss(full, **common)
    results["rnnt_loss"] = [loss, *gradients([loss], [full])]
    loss = functions.rnnt_loss_pruned(pruned, ranges=ranges, **common)
    results["rnnt_loss_pruned"] = [loss, *gradients([loss], [pruned])]
    results["do_rnnt_pruning"] = list(functions.do_rnnt_pruning(batch.encoder_BTJ, batch.decoder_BUJ, ranges))
    return results


def loss_results(backend: str, batch: Batch, rnnt_type: str) -> list[Tensor]:
    """Returns values and gradients of the whole loss, computed by one backend."""
    am, lm, encoder, decoder = inputs = [
        x.clone().requires_grad_() for x in (batch.am_BTV, batch.lm_BUV, batch.encoder_BTJ, batch.decoder_BUJ)
    ]
    losses = pruned_loss.pruned_transducer_loss(
        am,
        lm,
        encoder,
        decoder,
        batch.joiner,
        batch.symbols_BS,
        batch.frames_B,
        batch.symbols_lens_B,
        # All cells are kept, since windows chosen by nearly equal occupations may differ, and then the losses do.
        prune_range=batch.lm_BUV.shape[1],
        rnnt_type=rnnt_type,
        delay_penalty=DELAY_PENALTY,
        backend=backend,
    )
    finite = [loss[loss.isfinite()] for loss in losses]
    return [*losses, *gradients(finite, [*inputs, *batch.joiner.output_linear.parameters()])]


def difference(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """Returns the largest difference of any element."""
    worst = 0.0
    for x, y in zip(ours, theirs, strict=True):
        equal = x == y  # infinities too, whose difference is no number
        worst = max(worst, float(((x - y).abs() / (1 + y.abs())).masked_fill(equal, 0.0).max()))
    return worst


def compare(batch: Batch, rnnt_type: str) -> dict[str, float]:
    """Returns the difference of each function by its name."""
    common = dict(batch.common, rnnt_type=rnnt_type)
    _, occupations = k2.rnnt_loss_simple(batch.lm_BUV, batch.am_BTV, return_grad=True, **common)
    ranges = k2.get_rnnt_prune_ranges(*occupations, batch.boundary_B4, PRUNE_RANGE)
    px_grad, py_grad = occupations
    our_ranges = pruned_loss.get_rnnt_prune_ranges(px_grad, py_grad, batch.boundary_B4, PRUNE_RANGE)
    theirs = step_results(k2, batch, rnnt_type, ranges)
    ours = step_results(pruned_loss, batch, rnnt_type, ranges)
    differences = {name: difference(ours[name], theirs[name]) for name in ours}
    differences["get_rnnt_prune_ranges"] = difference([our_ranges.double()], [ranges.double()])
    whole = [loss_results(backend, batch, rnnt_type) for backend in ("torch", "k2")]
    return differences | {"pruned_transducer_loss": difference(*whole)}


def main() -> None:
    """Runs the program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=positive, default=20, help="batches of each type of numbers (default: 20)")
    args = parser.parse_args()

    worst: dict[Row, float] = defaultdict(float)
    for seed in tqdm(range(args.batches), leave=False):
        for dtype in TOLERANCES:
            batch = Batch(seed, dtype)
            for rnnt_type in RNNT_TYPES:
                for name, value in compare(batch, rnnt_type).items():
                    row = (name, rnnt_type, str(dtype).removeprefix("torch."))
                    worst[row] = max(worst[row], value)

    k2_version = importlib.metadata.version("k2")
    print(f"k2 {k2_version}, torch {torch.__version__}: worst differences of {args.batches} batches")
    failed = 0
    print(f"{'function':<24}{'type':<13}{'dtype':<9}{'worst':>10}{'allowed':>10}")
    for (name, rnnt_type, type_name), value in sorted(worst.items()):
        tolerance = TOLERANCES[getattr(torch, type_name)]
        bad = not value <= tolerance  # NaN is bad
        failed += bad
        print(f"{name:<24}{rnnt_type:<13}{type_name:<9}{value:10.1e}{tolerance:10.0e}{'  differs' if bad else ''}")
    sys.exit(f"{failed} of {len(worst)} differ" if failed else 0)


if __name__ == "__main__":
    sys.exit(run(main))
