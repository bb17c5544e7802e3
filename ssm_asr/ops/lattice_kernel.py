"""The sums over a lattice of `lattice.py` as Triton kernels for GPUs: arrange, sum from both ends, take out.

One program for each utterance and end keeps the sums of a step in registers. Logarithms would be most of what a
step waits for: here probabilities are pairs, mantissa · 2^exponent, which keep the range of float64 logarithms and
need only products and sums.

Shapes and steps as in `lattice.py`, except that cells before the begin and after the end, which no alignment goes
through, are left out, and that there are M >= R slots, s mod M. They lie as C columns of L lanes, slot l·C + c being
lane l of column c: only the last column's sums have to move to another thread. Before and after an utterance's steps
are MARGIN rows that loads may reach ahead and stores late, and that no result depends on.
"""

# ruff: noqa: RUF005  (in a kernel a tuple can be added to, not unpacked into another)
# mypy: disable-error-code="no-untyped-def, assignment, attr-defined"

import torch
import triton
import triton.language as tl
from torch import Tensor

LN2 = tl.constexpr(0.6931471805599453)
ZERO = tl.constexpr(-(2**24))  # exponent of a probability of 0, of which 100 add up within 32 bits
WARP = 32
MOST_COLUMNS = 4
AHEAD = 16  # steps of all columns that are loaded at once: more do not fit into registers
MARGIN = tl.constexpr(2 * AHEAD)
TILE = 512  # cells
SIZES = ("T", "K", "R")  # other at every batch


def sums(
    symbol_BTR: Tensor,
    blank_BTR: Tensor,
    boundary_B4: Tensor,
    num_symbols: int,
    regular: bool,
    start_BT: Tensor | None,
    rarest_arc: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The fields of `lattice.lattice_score`, whose arguments these are; occupations of at most rarest_arc are 0."""
    B, T, R = blank_BTR.shape
    K = (T + num_symbols if regular else T) + 2 * MARGIN.value
    columns = min(triton.cdiv(R, WARP), MOST_COLUMNS)
    lanes = triton.next_power_of_2(triton.cdiv(R, columns))
    arcs, states = _pairs(blank_BTR, B, K, 2, columns * lanes), _pairs(blank_BTR, B, K, 2, columns * lanes)
    pruned = start_BT is not None
    if pruned:  # not every slot has a cell at each step
        arcs[0].fill_(0.0)
        arcs[1].fill_(ZERO.value)
    boundary_B4 = boundary_B4.contiguous()
    size = (boundary_B4, boundary_B4 if start_BT is None else start_BT.contiguous(), T, K, R)
    slots = dict(C=columns, L=lanes, REGULAR=regular)
    block = triton.next_power_of_2(columns * lanes)
    tile = dict(PRUNED=pruned, ROWS=max(1, TILE // block), BLOCK=block, **slots)
    tiles = (B, triton.cdiv(T + R - 1 if regular and not pruned else T, tile["ROWS"]))
    _arrange[tiles](symbol_BTR.contiguous(), blank_BTR.contiguous(), *arcs, *size, **tile)
    warps = max(lanes // WARP, 1)
    _sum[(B, 2)](*arcs, *states, boundary_B4, K, ROWS=AHEAD // columns, num_warps=warps, **slots)
    score_B = blank_BTR.new_empty(B)
    symbol_occupation_BTR, blank_occupation_BTR = blank_BTR.new_empty(B, T, R), blank_BTR.new_empty(B, T, R)
    _take_out[tiles](symbol_occupation_BTR, blank_occupation_BTR, score_B, *arcs, *states, *size, rarest_arc, **tile)
    return score_B, symbol_occupation_BTR, blank_occupation_BTR


def _pairs(like: Tensor, *shape: int) -> tuple[Tensor, Tensor]:
    """Mantissas and exponents."""
    return like.new_empty(shape, dtype=torch.float64), like.new_empty(shape, dtype=torch.int32)


@triton.jit
def _ends(boundary, M: tl.constexpr, REGULAR: tl.constexpr):
    """Of this program's utterance: s + t or t of its first step, its number of steps, slots of begin and end."""
    boundary += tl.program_id(0) * 4
    s_begin, t_begin = tl.load(boundary).to(tl.int32), tl.load(boundary + 1).to(tl.int32)
    s_end, t_end = tl.load(boundary + 2).to(tl.int32), tl.load(boundary + 3).to(tl.int32)
    first, last = t_begin, t_end
    if REGULAR:
        first += s_begin
        last += s_end
    return first, last - first, s_begin % M, s_end % M


@triton.jit
def _place(slot, C: tl.constexpr, L: tl.constexpr):
    return slot % C * L + slot // C % L


@triton.jit
def _cells(
    boundary, start, T, R,
    PRUNED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, M: tl.constexpr, REGULAR: tl.constexpr,
):  # fmt: skip
    """This program's tile: frames, symbols, cells of a frame, steps and whether an alignment may be there.

    Its rows are whole diagonals of a regular lattice that has all its cells, else frames.
    """
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)[:, None]
    r = tl.arange(0, BLOCK)[None, :]
    t, s = row + 0 * r, r + 0 * row
    if PRUNED:
        s += tl.load(start + tl.program_id(0) * T + row, row < T, other=0).to(tl.int32)
    elif REGULAR:
        t -= s
    first, num_steps, _, _ = _ends(boundary, M, REGULAR)
    step = t - first
    if REGULAR:
        step += s
    return t, s, r, step, (step >= 0) & (step < num_steps)


@triton.jit
def _power(exponent):
    """2^exponent, or 0 where that is below the normal numbers."""
    return ((tl.maximum(exponent, -1023) + 1023).to(tl.int64) << 52).to(tl.float64, bitcast=True)


@triton.jit
def _store_arc(mantissa, exponent, place, log_prob, mask):
    possible = log_prob != -float("inf")
    power = tl.maximum(tl.floor(log_prob * (1.0 / LN2)), ZERO)
    tl.store(mantissa + place, tl.where(possible, tl.exp(log_prob - power * LN2), 0.0), mask)
    tl.store(exponent + place, tl.where(possible, power, ZERO).to(tl.int32), mask)


@triton.jit(do_not_specialize=SIZES)
def _arrange(
    symbol, blank, arc, arc_exponent, boundary, start, T, K, R,
    PRUNED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    C: tl.constexpr, L: tl.constexpr, REGULAR: tl.constexpr,
):  # fmt: skip
    """Arcs (B, K, 2, M) by steps from the log-probabilities, without those that pruning cuts (`_cut_arcs`)."""
    b = tl.program_id(0).to(tl.int64)
    t, s, r, step, kept = _cells(boundary, start, T, R, PRUNED, ROWS, BLOCK, C * L, REGULAR)
    inside = (r < R) & (t >= 0) & (t < T)
    cell = (b * T + t) * R + r
    by_symbol = tl.load(symbol + cell, inside, other=-float("inf")).to(tl.float64)
    by_blank = tl.load(blank + cell, inside, other=-float("inf")).to(tl.float64)
    kept &= r < C * L
    if PRUNED:
        kept &= inside
        s_end, t_end = tl.load(boundary + b * 4 + 2), tl.load(boundary + b * 4 + 3)
        next_start = tl.load(start + b * T + t + 1, t + 1 < T, other=0)
        stays = (s >= next_start) & (s < next_start + R) & (s <= s_end) & (t + 1 < t_end)
        stays |= (t + 1 == t_end) & (s == s_end)
        moves = (s + 1 >= next_start) & (s + 1 < next_start + R) & (s < s_end) & (t + 1 < t_end)
        moves |= (t + 1 == t_end) & (s + 1 == s_end)
        if REGULAR:
            moves = (r + 1 < R) & (s < s_end) & (t < t_end)
        by_blank = tl.where(stays, by_blank, -float("inf"))
        by_symbol = tl.where(moves, by_symbol, -float("inf"))
    place = (b * K + MARGIN + step) * 2 * C * L + _place(s, C, L)
    _store_arc(arc, arc_exponent, place, by_blank, kept)
    _store_arc(arc, arc_exponent, place + C * L, by_symbol, kept)


@triton.jit
def _load_rows(
    arc, arc_exponent, back, first, C: tl.constexpr, L: tl.constexpr, ROWS: tl.constexpr, TO_END: tl.constexpr
):  # fmt: skip
    """Of rows from `first` on, for each column, the pairs of the blank and of the symbol which the sums need."""
    rows = ()
    arc_back, arc_exponent_back = arc + back, arc_exponent + back
    for i in tl.static_range(ROWS):
        row = (first + i) * (-2 if TO_END else 2) * C * L
        for c in tl.static_range(C):
            if TO_END:
                blank, symbol = row + (C - 1 - c) * L, row + (2 * C - 1 - c) * L
            else:
                blank, symbol = row + c * L, row + (C + (c - 1) % C) * L
            arcs = (tl.load(arc + blank), tl.load(arc_exponent + blank))
            if c > 0 or TO_END:
                rows = rows + (arcs + (tl.load(arc + symbol), tl.load(arc_exponent + symbol)),)
            else:
                rows = rows + (arcs + (tl.load(arc_back + symbol), tl.load(arc_exponent_back + symbol)),)
    return rows


@triton.jit
def _sum_from(
    arc, arc_exponent, state, state_exponent, slot_at_end, num_steps,
    C: tl.constexpr, L: tl.constexpr, ROWS: tl.constexpr, TO_END: tl.constexpr,
):  # fmt: skip
    lane = tl.arange(0, L)
    before = (lane + L - 1) % L
    stride = -2 * C * L if TO_END else 2 * C * L
    place = lane
    if TO_END:  # from the last step to the first, from the last slot to the first
        place = (num_steps - 1) * 2 * C * L + L - 1 - lane
        slot_at_end = C * L - 1 - slot_at_end
    arc += place
    arc_exponent += place
    state += place + TO_END * C * L
    state_exponent += place + TO_END * C * L
    mantissas, exponents = (), ()
    for c in tl.static_range(C):
        here = lane * C + c == slot_at_end
        mantissas = mantissas + (tl.where(here, 1.0, 0.0).to(tl.float64),)
        exponents = exponents + (tl.where(here, 0, ZERO),)
    loaded = _load_rows(arc, arc_exponent, before - lane, 0, C, L, ROWS, TO_END)
    k = 0
    while k <= num_steps:
        arcs = loaded
        # The next rows are under way while the steps of these are computed.
        loaded = _load_rows(arc, arc_exponent, before - lane, ROWS, C, L, ROWS, TO_END)
        for i in tl.static_range(ROWS):
            # What a symbol brings comes from the column before, to the first from the last of the lane before.
            mantissa, exponent = tl.gather(mantissas[C - 1], before, 0), tl.gather(exponents[C - 1], before, 0)
            new_mantissas, new_exponents = (), ()
            for c in tl.static_range(C):
                column = i * stride + (C - 1 - c if TO_END else c) * L
                tl.store(state + column, mantissas[c])
                tl.store(state_exponent + column, exponents[c])
                blank, blank_exponent, symbol, symbol_exponent = arcs[i * C + c]
                blank_exponent += exponents[c]
                symbol_exponent += exponent
                most = tl.maximum(blank_exponent, symbol_exponent)
                by_blank = mantissas[c] * (blank * _power(blank_exponent - most))
                total = tl.fma(mantissa, symbol * _power(symbol_exponent - most), by_blank)
                new_mantissas, new_exponents = new_mantissas + (total,), new_exponents + (most,)
                mantissa, exponent = mantissas[c], exponents[c]
            mantissas, exponents = new_mantissas, new_exponents
        # Back to mantissas below 2: they have at most been multiplied by 4 at a step.
        new_mantissas, new_exponents = (), ()
        for c in tl.static_range(C):
            excess = ((mantissas[c].to(tl.int64, bitcast=True) >> 52) & 2047).to(tl.int32) - 1023
            new_mantissas = new_mantissas + (mantissas[c] * _power(-excess),)
            new_exponents = new_exponents + (tl.maximum(exponents[c] + excess, ZERO),)
        mantissas, exponents = new_mantissas, new_exponents
        arc += ROWS * stride
        arc_exponent += ROWS * stride
        state += ROWS * stride
        state_exponent += ROWS * stride
        k += ROWS


@triton.jit(do_not_specialize=SIZES)
def _sum(
    arc, arc_exponent, state, state_exponent, boundary, K,
    ROWS: tl.constexpr, C: tl.constexpr, L: tl.constexpr, REGULAR: tl.constexpr,
):  # fmt: skip
    """States (B, K, 2, M): at step k, all ways from the begin to it, and from step k+1 to the end."""
    _, num_steps, begin, end = _ends(boundary, C * L, REGULAR)
    origin = (tl.program_id(0).to(tl.int64) * K + MARGIN) * 2 * C * L
    arc += origin
    arc_exponent += origin
    state += origin
    state_exponent += origin
    if tl.program_id(1) == 0:
        _sum_from(arc, arc_exponent, state, state_exponent, begin, num_steps, C, L, ROWS, False)
    else:
        _sum_from(arc, arc_exponent, state, state_exponent, end, num_steps, C, L, ROWS, True)


@triton.jit(do_not_specialize=SIZES)
def _take_out(
    symbol, blank, score, arc, arc_exponent, state, state_exponent, boundary, start, T, K, R, rarest_arc,
    PRUNED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    C: tl.constexpr, L: tl.constexpr, REGULAR: tl.constexpr,
):  # fmt: skip
    """The score, and from arcs and states the occupations (B, T, R)."""
    b = tl.program_id(0).to(tl.int64)
    t, s, r, step, kept = _cells(boundary, start, T, R, PRUNED, ROWS, BLOCK, C * L, REGULAR)
    inside = (r < R) & (t >= 0) & (t < T)
    kept &= inside
    _, num_steps, _, end = _ends(boundary, C * L, REGULAR)
    origin = (b * K + MARGIN) * 2 * C * L
    last = origin + num_steps * 2 * C * L + _place(end, C, L)
    total, total_exponent = tl.load(state + last), tl.load(state_exponent + last)
    if tl.program_id(1) == 0:
        tl.store(score + b, tl.log(total) + total_exponent.to(tl.float64) * LN2)
    here = origin + step * 2 * C * L
    before = tl.load(state + here + _place(s, C, L), kept, other=0.0) * (1.0 / total)
    before_exponent = tl.load(state_exponent + here + _place(s, C, L), kept, other=0) - total_exponent
    for by_symbol in tl.static_range(2):
        there = here + C * L + _place(s + by_symbol, C, L)
        after = tl.load(state + there, kept, other=0.0)
        exponent = before_exponent + tl.load(state_exponent + there, kept, other=0)
        place = here + by_symbol * C * L + _place(s, C, L)
        by_arc = tl.load(arc + place, kept, other=0.0)
        exponent += tl.load(arc_exponent + place, kept, other=0)
        occupation = before * by_arc * after * _power(exponent)
        occupation = tl.where(kept, tl.where(total == 0.0, 0.0, occupation), 0.0)
        occupation = tl.where(occupation <= rarest_arc, 0.0, occupation)
        tl.store((symbol if by_symbol else blank) + t * R + r + b * T * R, occupation, inside)
