"""These kernels compute the sums over a lattice of ssm_asr.ops.lattice.

There are three. The first arranges the arcs by steps, the second sums from both ends of the lattice, and the third
takes the score and the occupations out of the sums. In the second, one program for each utterance and end keeps the
sums of a step in registers. Logarithms would take most of the time of a step. So a probability is a pair here, mantissa
· 2^exponent. Pairs have the range of float64 logarithms, and need only products and sums.

Shapes and steps are as in ssm_asr.ops.lattice, with two differences. Cells before the begin and after the end are left
out, because no alignment goes through them. And there are M >= R slots: s lies in slot s mod M. Slots form C columns of
L lanes, in which slot l·C + c is lane l of column c. So only the sums of the last column have to move to another
thread. Before and after the steps of an utterance there are MARGIN rows, which loads may reach early and stores late.
No result depends on them.
"""

# ruff: noqa: RUF005  (Triton can add tuples, but cannot unpack one into another)
# mypy: disable-error-code="no-untyped-def, assignment, attr-defined"

import torch
import triton
import triton.language as tl
from torch import Tensor

LN2 = tl.constexpr(0.6931471805599453)
ZERO = tl.constexpr(-(2**24))  # the exponent of a probability of 0; the sum of 100 of them still fits into 32 bits
WARP = 32
MOST_COLUMNS = 4
AHEAD = 16  # steps times columns that are loaded at once; more do not fit into registers
MARGIN = tl.constexpr(2 * AHEAD)
TILE = 512  # cells of a program's tile
SIZES = ("T", "K", "R")  # they differ from batch to batch


def sums(
    symbol_BTR: Tensor,
    blank_BTR: Tensor,
    boundary_B4: Tensor,
    num_symbols: int,
    regular: bool,
    start_BT: Tensor | None,
    rarest_arc: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes the fields of a `LatticeScore`; `ssm_asr.ops.lattice.lattice_score` explains the arguments.

    Occupations of at most rarest_arc become 0.
    """
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
    """Allocates mantissas and exponents."""
    return like.new_empty(shape, dtype=torch.float64), like.new_empty(shape, dtype=torch.int32)


@triton.jit
def _ends(boundary, M: tl.constexpr, REGULAR: tl.constexpr):
    """Returns s + t or t of the first step of the program's utterance, its number of steps, and begin and end slot."""
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
    """Returns the program's tile: frames, symbols, cells of a frame, steps, and whether an alignment may be there.

    The rows of a tile are diagonals if the lattice is regular and has all its cells, and frames otherwise.
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
    """Returns 2^exponent, or 0 where this is smaller than the smallest normal number."""
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
    """Arranges the arcs by steps, (B, K, 2, M), and leaves out those that pruning cuts (see `lattice._cut_arcs`)."""
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
    """Loads the pairs of the blanks and symbols that the sums need, for each row from `first` on and each column."""
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
    if TO_END:  # steps and slots go from the last to the first
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
        # The next rows are loaded while the steps of these rows are computed.
        loaded = _load_rows(arc, arc_exponent, before - lane, ROWS, C, L, ROWS, TO_END)
        for i in tl.static_range(ROWS):
            # A symbol comes from the column before, or to the first column from the last column of the lane before.
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
        # Mantissas are brought back below 2. Each step can have multiplied them by up to 4.
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
    """Computes the states (B, K, 2, M): all ways from the begin to step k, and all ways from step k+1 to the end."""
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
    """Computes the score, and the occupations (B, T, R) from arcs and states."""
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
