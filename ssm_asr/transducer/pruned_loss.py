"""The pruned RNN-T loss, in plain PyTorch or computed by k2.

A simple loss, whose joint is only a sum of two projections, covers the whole lattice of frames and symbols. Its
occupations tell which few symbols matter at each frame, and the joiner then runs only at these cells. The functions
that have names of k2 are the single steps. Losses are in nats.

Source: Kuang et al. 2022 (arXiv 2206.13236).

Shapes: B utterances, T frames, S symbols, U = S+1 predictor outputs, R kept cells of a frame, V vocabulary with the
blank, J joiner channels, M frames that count.
"""

import functools
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from ssm_asr.ops.devices import to_device
from ssm_asr.ops.joiner_terms import JoinerTerms
from ssm_asr.ops.lattice import check_boundary
from ssm_asr.ops.linear import linear, linear_padded
from ssm_asr.ops.precision import at_least_float32
from ssm_asr.transducer.prune_ranges import window_length, window_starts
from ssm_asr.transducer.rnnt_loss import (
    do_rnnt_pruning,
    get_rnnt_prune_ranges,
    next_symbols,
    rnnt_loss,
    rnnt_loss_pruned,
    rnnt_loss_simple,
    rnnt_loss_smoothed,
    score_arcs,
    smoothed_terms,
)

__all__ = [
    "do_rnnt_pruning",
    "get_rnnt_prune_ranges",
    "pruned_transducer_loss",
    "require_backend",
    "rnnt_loss",
    "rnnt_loss_pruned",
    "rnnt_loss_simple",
    "rnnt_loss_smoothed",
    "vocabulary_projection",
]

BLANK = 0
BACKENDS = ("torch", "k2")


def require_backend(backend: str) -> None:
    """Refuses a backend that cannot compute the losses in this environment.

    Raises:
        ValueError: if the backend is unknown or not installed.
    """
    if backend not in BACKENDS:
        raise ValueError(f"loss backend {backend!r}: give one of {', '.join(BACKENDS)}")
    if backend == "k2" and _k2() is None:
        raise ValueError("loss backend 'k2': k2 cannot be imported here; install it, or use torch")


@functools.cache
def _k2() -> ModuleType | None:
    """Returns the module k2, or None if it cannot be used here."""
    try:
        import k2
    except (ImportError, OSError):  # OSError: its libraries were built for another PyTorch
        return None
    return k2 if hasattr(k2, "rnnt_loss_smoothed") else None  # a directory named k2 can also be imported


def vocabulary_projection(layer: nn.Linear, x: Tensor, backend: str = "torch") -> Tensor:
    """Projects x (…, D) to the logits (…, V) of the simple loss.

    With the backend "torch" there may be more than V logits: columns of -inf fill up the matrix product, which makes it
    faster on a GPU.
    """
    return (linear_padded if backend == "torch" else linear)(x, layer.weight, layer.bias)


def pruned_transducer_loss(
    simple_am_BTV: Tensor,
    simple_lm_BUV: Tensor,
    encoder_out_BTJ: Tensor,
    decoder_out_BUJ: Tensor,
    joiner: nn.Module,
    symbols_BS: Tensor,
    frames_B: Tensor,
    symbols_lens_B: Tensor,
    prune_range: int = 5,
    lm_scale: float = 0.25,
    am_scale: float = 0.0,
    rnnt_type: str = "regular",
    delay_penalty: float = 0.0,
    backend: str = "torch",
) -> tuple[Tensor, Tensor]:
    """Computes the simple losses (B,) and the pruned losses (B,) of a batch.

    The losses are in float32, or in float64 if the inputs are. An utterance that no alignment fits (it has no frame or,
    in a lattice that is not regular, more symbols than frames) has infinite losses and gradients of zero, so that a
    trainer can leave it out and count it. Under autocast only the matrix products of the joiner run in the lower
    precision.

    Args:
        simple_am_BTV: the encoder's logits in the simple joint.
        simple_lm_BUV: the predictor's logits in the simple joint.
        encoder_out_BTJ: the encoder's output, projected to the joiner's channels.
        decoder_out_BUJ: the predictor's output, projected to the joiner's channels.
        joiner: joiner(encoder, decoder, project_input=False) is output_linear(tanh(encoder + decoder)).
        symbols_BS: ids, of which 0 is the blank; padding may be any valid id.
        frames_B: lengths in frames of the encoder's output. If they are on the CPU, the host need not wait for a GPU.
        symbols_lens_B: lengths of the transcripts in symbols, on the CPU for the same reason.
        prune_range: cells kept of a frame; see `get_rnnt_prune_ranges`.
        lm_scale: `lm_only_scale` of `rnnt_loss_smoothed`.
        am_scale: `am_only_scale` of `rnnt_loss_smoothed`.
        rnnt_type: see `rnnt_loss_smoothed`.
        delay_penalty: see `rnnt_loss_smoothed`; it is added in both losses.
        backend: "torch", or "k2" if k2 is installed.

    Raises:
        ValueError: if the numbers of lengths and utterances differ; as in `Lattices.from_lengths`; as in
            `require_backend`.
    """
    if not len(frames_B) == len(symbols_lens_B) == len(symbols_BS):
        raise ValueError(
            f"{len(frames_B)} and {len(symbols_lens_B)} lengths for {len(symbols_BS)} utterances: give one each"
        )
    size = (simple_am_BTV.shape[1], symbols_BS.shape[1])
    return LatticeLosses(
        simple_am_BTV,
        simple_lm_BUV,
        encoder_out_BTJ,
        decoder_out_BUJ,
        joiner,
        symbols_BS,
        Lattices.from_lengths(frames_B, symbols_lens_B, *size, prune_range, rnnt_type, simple_am_BTV.device),
        lm_scale,
        am_scale,
        rnnt_type,
        delay_penalty,
    ).compute(backend)


class Lattices(NamedTuple):
    """What the losses need to know about the lengths in a batch.

    Attributes:
        boundary_B4: [0, 0, symbols, frames] of each utterance; [0, 0, 0, 1] for an utterance without an alignment.
        feasible_B: whether an utterance has an alignment.
        cells: R.
        frame_M: indices, into the B·T frames, of the frames that are not padding. None computes the joiner at all
            frames, so that shapes do not depend on the lengths.
    """

    boundary_B4: Tensor
    feasible_B: Tensor
    cells: int
    frame_M: Tensor | None

    @classmethod
    def from_lengths(
        cls,
        frames_B: Tensor,
        symbols_lens_B: Tensor,
        num_frames: int,
        num_symbols: int,
        prune_range: int,
        rnnt_type: str,
        device: torch.device,
        every_frame: bool = False,
    ) -> "Lattices":
        """Makes the lattices of a batch.

        Args:
            frames_B: lengths in frames of the encoder's output. If they are on the CPU, the host need not wait for a
                GPU.
            symbols_lens_B: lengths of the transcripts in symbols, on the CPU for the same reason.
            num_frames: T, to which the batch is padded.
            num_symbols: S, to which the batch is padded.
            prune_range: cells kept of a frame; see `get_rnnt_prune_ranges`.
            rnnt_type: see `rnnt_loss_smoothed`.
            device: where the losses are computed.
            every_frame: whether `frame_M` is None.

        Raises:
            ValueError: as in `check_boundary`; for a prune_range that lets no symbol through.
        """
        boundary_B4, feasible_B = _feasible_boundary(frames_B.cpu(), symbols_lens_B.cpu(), rnnt_type)
        check_boundary(boundary_B4, num_frames, num_symbols, rnnt_type)
        cells = window_length(boundary_B4, max(1, num_symbols), prune_range, rnnt_type == "regular")
        if rnnt_type == "regular" and cells < 2:
            raise ValueError(f"prune_range of {prune_range} lets no symbol through a regular lattice: give 2 or more")
        counts_BT = torch.arange(num_frames) < boundary_B4[:, 3:]
        frame_M = None if every_frame else to_device(counts_BT.flatten().nonzero()[:, 0], device)
        return cls(to_device(boundary_B4, device), to_device(feasible_B, device), cells, frame_M)


class LatticeLosses(NamedTuple):
    """The arguments of `pruned_transducer_loss`, with `Lattices` in place of the lengths."""

    simple_am_BTV: Tensor
    simple_lm_BUV: Tensor
    encoder_out_BTJ: Tensor
    decoder_out_BUJ: Tensor
    joiner: Any
    symbols_BS: Tensor
    lattices: Lattices
    lm_scale: float
    am_scale: float
    rnnt_type: str
    delay_penalty: float

    def compute(self, backend: str = "torch") -> tuple[Tensor, Tensor]:
        """Computes the simple losses (B,) and the pruned losses (B,).

        With the backend "torch" the host never waits for a GPU.

        Raises:
            ValueError: as in `require_backend`.
        """
        require_backend(backend)
        k2 = _k2() if backend == "k2" else None
        given = self
        if self.symbols_BS.shape[1] == 0:  # all transcripts are empty, but a window needs two cells
            given = given._replace(
                symbols_BS=functional.pad(self.symbols_BS, (0, 1)),
                simple_lm_BUV=functional.pad(self.simple_lm_BUV, (0, 0, 0, 1)),
                decoder_out_BUJ=functional.pad(self.decoder_out_BUJ, (0, 0, 0, 1)),
            )
        simple_B, pruned_B = given._by_k2(k2) if k2 else given._by_torch()
        # The mask also cuts off the gradients of infinite losses, for which k2 returns meaningless numbers.
        feasible_B = self.lattices.feasible_B
        simple_B, pruned_B = (
            loss_B.masked_fill(~feasible_B | (loss_B == torch.inf), torch.inf) for loss_B in (simple_B, pruned_B)
        )
        return simple_B, pruned_B

    def _by_torch(self) -> tuple[Tensor, Tensor]:
        """Computes the losses in PyTorch. To save memory the joiner's logits exist for one piece of cells at a time."""
        boundary_B4, _, cells, frame_M = self.lattices
        regular, symbols_BS = self.rnnt_type == "regular", self.symbols_BS
        arcs: Any = dict(
            boundary_B4=boundary_B4,
            num_symbols=symbols_BS.shape[1],
            rnnt_type=self.rnnt_type,
            delay_penalty=self.delay_penalty,
        )
        weight_VJ, bias_V = self.joiner.output_linear.weight, self.joiner.output_linear.bias
        matmul_dtype = functional.linear(self.encoder_out_BTJ[:0], weight_VJ).dtype  # the lower type if autocast is on
        with torch.autocast(symbols_BS.device.type, enabled=False):
            symbol_BTU, blank_BTU = smoothed_terms(
                self.simple_lm_BUV, self.simple_am_BTV, symbols_BS.long(), BLANK, self.lm_scale, self.am_scale
            )
            simple = score_arcs(symbol_BTU, blank_BTU, **arcs)
            start_BT = window_starts(
                simple.symbol_occupation_BTR[:, :, :-1], simple.blank_occupation_BTR, boundary_B4, cells, regular
            )
            ranges_BTR = start_BT[..., None] + torch.arange(cells, device=start_BT.device)
            if frame_M is None:
                frame_M = torch.arange(start_BT.numel(), device=start_BT.device)
            symbol_BTR, blank_BTR = JoinerTerms.apply(
                self.encoder_out_BTJ,
                self.decoder_out_BUJ,
                weight_VJ,
                at_least_float32(bias_V),
                ranges_BTR,
                next_symbols(symbols_BS, ranges_BTR),
                frame_M,
                BLANK,
                matmul_dtype,
            )
            pruned = score_arcs(symbol_BTR, blank_BTR, start_BT=start_BT, **arcs)
        return -simple.score_B, -pruned.score_B

    def _by_k2(self, k2: Any) -> tuple[Tensor, Tensor]:
        """Computes the losses by the functions of k2."""
        boundary_B4, _, cells, _ = self.lattices
        common: dict[str, Any] = dict(
            symbols=self.symbols_BS,
            termination_symbol=BLANK,
            boundary=boundary_B4,
            rnnt_type=self.rnnt_type,
            delay_penalty=self.delay_penalty,
            reduction="none",
        )
        with torch.autocast(self.symbols_BS.device.type, enabled=False):
            simple_B, occupations = k2.rnnt_loss_smoothed(
                lm=at_least_float32(self.simple_lm_BUV),
                am=at_least_float32(self.simple_am_BTV),
                lm_only_scale=self.lm_scale,
                am_only_scale=self.am_scale,
                return_grad=True,
                **common,
            )
            ranges_BTR = k2.get_rnnt_prune_ranges(*occupations, boundary_B4, cells)
        pruned = k2.do_rnnt_pruning(self.encoder_out_BTJ, self.decoder_out_BUJ, ranges_BTR)
        logits_BTRV = self.joiner(*pruned, project_input=False)
        with torch.autocast(self.symbols_BS.device.type, enabled=False):
            pruned_B = k2.rnnt_loss_pruned(at_least_float32(logits_BTRV), ranges=ranges_BTR, **common)
        return simple_B, pruned_B


def _feasible_boundary(frames_B: Tensor, symbols_lens_B: Tensor, rnnt_type: str) -> tuple[Tensor, Tensor]:
    """Returns the fields `boundary_B4` and `feasible_B` of `Lattices`.

    An utterance without an alignment gets one frame and no symbols, so that all computations stay finite.
    """
    feasible_B = frames_B > 0
    if rnnt_type != "regular":
        feasible_B = feasible_B & (frames_B >= symbols_lens_B)
    zero_B = torch.zeros_like(frames_B)
    s_end_B = torch.where(feasible_B, symbols_lens_B, zero_B)
    t_end_B = torch.where(feasible_B, frames_B, zero_B + 1)
    return torch.stack([zero_B, zero_B, s_end_B, t_end_B], dim=1).long(), feasible_B
