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
    _advance[(B,)](arcs_K2BR, state_KBR, K, B, R, BLOCK=triton.next_power_of_2(R))


def retreat(share_K2BR: Tensor, visits_KBR: Tensor) -> None:
    """Adds up the visits from the last, as `lattice.retreat` does."""
    K, _, B, R = share_K2BR.shape
    _retreat[(B,)](share_K2BR, visits_KBR, K, B, R, visits_KBR.shape[2], BLOCK=triton.next_power_of_2(R))


@triton.jit
def _advance(arcs: tl.tensor, state: tl.tensor, K: tl.tensor, B: tl.tensor, R: tl.tensor, BLOCK: tl.constexpr) -> None:
    slot = tl.arange(0, BLOCK)
    inside = slot < R
    before = tl.where(slot == 0, R - 1, slot - 1)
    arcs += tl.program_id(0) * R
    state += tl.program_id(0) * R
    for _ in range(K):
        by_blank = tl.load(state + slot, inside, other=-float("inf")) + tl.load(arcs + slot, inside, other=0.0)
        by_symbol = tl.load(state + before, inside, other=-float("inf"))
        by_symbol += tl.load(arcs + B * R + before, inside, other=0.0)
        most, least = tl.maximum(by_blank, by_symbol), tl.minimum(by_blank, by_symbol)
        both = tl.where(most == -float("inf"), most, most + tl.log(1.0 + tl.exp(least - most)))
        arcs += 2 * B * R
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
    for _ in range(K):
        by_blank = tl.load(visits + slot, inside, other=0.0) * tl.load(share + slot, inside, other=0.0)
        by_symbol = tl.load(visits + after, inside, other=0.0)
        by_symbol *= tl.load(share + B * R + slot, inside, other=0.0)
        share -= 2 * B * R
        visits -= B * WIDTH
        here = tl.load(visits + slot, inside, other=0.0) + by_blank + by_symbol
        tl.store(visits + slot, here, inside)
        tl.debug_barrier()  # the next step reads what other threads wrote
