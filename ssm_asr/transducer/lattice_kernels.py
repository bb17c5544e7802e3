"""The two loops of `lattice.py` as Triton kernels for GPUs.

Each runs all K steps in one launch, one program for each utterance, where PyTorch launches several kernels a
step and waits for the launches. Shapes as in `lattice.py`.
"""

import triton
import triton.language as tl
from torch import Tensor


def advance(arcs_K2BR: Tensor, state_KBR: Tensor) -> None:
    """Fills the states from the first, as `lattice.advance` does."""
    K, _, B, R = arcs_K2BR.shape
    _advance[(B,)](arcs_K2BR, state_KBR, K, B, R, **_sizes(R))


def retreat(share_K2BR: Tensor, visits_KBR: Tensor) -> None:
    """Adds up the visits from the last, as `lattice.retreat` does."""
    K, _, B, R = share_K2BR.shape
    _retreat[(B,)](share_K2BR, visits_KBR, K, B, R, visits_KBR.shape[2], **_sizes(R))


def _sizes(slots: int) -> dict[str, int]:
    """A thread for each slot."""
    block = triton.next_power_of_2(slots)
    return dict(BLOCK=block, num_warps=min(max(block // 32, 1), 16))


@triton.jit
def _advance(arcs: tl.tensor, state: tl.tensor, K: tl.tensor, B: tl.tensor, R: tl.tensor, BLOCK: tl.constexpr) -> None:
    slot = tl.arange(0, BLOCK)
    inside = slot < R
    before = tl.where(slot == 0, R - 1, slot - 1)
    arcs += tl.program_id(0) * R
    state += tl.program_id(0) * R
    blank = tl.load(arcs + slot, inside, other=0.0)
    symbol = tl.load(arcs + B * R + before, inside, other=0.0)
    k = 0
    while k < K:
        by_blank = tl.load(state + slot, inside, other=-float("inf")) + blank
        by_symbol = tl.load(state + before, inside, other=-float("inf")) + symbol
        k += 1
        arcs += 2 * B * R
        # The next step's arcs, which are under way while this step is computed.
        blank = tl.load(arcs + slot, inside & (k < K), other=0.0)
        symbol = tl.load(arcs + B * R + before, inside & (k < K), other=0.0)
        most, least = tl.maximum(by_blank, by_symbol), tl.minimum(by_blank, by_symbol)
        both = tl.where(most == -float("inf"), most, most + tl.log(1.0 + tl.exp(least - most)))
        state += B * R
        tl.store(state + slot, both, inside)
        tl.debug_barrier()  # the next step reads what other threads wrote


@triton.jit
def _retreat(
    share: tl.tensor, visits: tl.tensor, K: tl.tensor, B: tl.tensor, R: tl.tensor, WIDTH: tl.tensor, BLOCK: tl.constexpr
) -> None:
    slot = tl.arange(0, BLOCK)
    inside = slot < R
    after = tl.where(slot == R - 1, 0, slot + 1)
    share += (K - 1) * 2 * B * R + tl.program_id(0) * R
    visits += K * B * WIDTH + tl.program_id(0) * WIDTH
    blank = tl.load(share + slot, inside, other=0.0)
    symbol = tl.load(share + B * R + slot, inside, other=0.0)
    begun = tl.load(visits - B * WIDTH + slot, inside, other=0.0)
    k = 0
    while k < K:
        by_blank = tl.load(visits + slot, inside, other=0.0) * blank
        by_symbol = tl.load(visits + after, inside, other=0.0) * symbol
        here = begun + by_blank + by_symbol
        k += 1
        share -= 2 * B * R
        visits -= B * WIDTH
        # What the next step needs of earlier kernels, which is under way while this step is computed.
        blank = tl.load(share + slot, inside & (k < K), other=0.0)
        symbol = tl.load(share + B * R + slot, inside & (k < K), other=0.0)
        begun = tl.load(visits - B * WIDTH + slot, inside & (k < K), other=0.0)
        tl.store(visits + slot, here, inside)
        tl.debug_barrier()  # the next step reads what other threads wrote
