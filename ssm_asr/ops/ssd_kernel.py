"""These kernels compute Mamba-2's state-space operation, forward and backward, with blocks of L frames in parallel.

Source: Dao and Gu, "Transformers are SSMs" (arXiv 2405.21060), section 6. The equations are as in
ssm_asr.ops.ssd.ssd_chunked. Let a_t be the sum of dt·A from the start of the block to frame t, and E_ts = exp(a_t -
a_s) for t >= s. Let S and S' be the states at the start and at the end of a block, and dS and dS' their gradients. Each
direction takes three launches. The first computes what every block adds to the state, or to its gradient. The second
passes the states from block to block:

    S' = exp(a_L)·S + Σ_s exp(a_L - a_s)·dt_s·x_s ⊗ B_s
    dS = exp(a_L)·dS' + Σ_t exp(a_t)·dy_t ⊗ C_t

The third computes the results of every block:

    y_t  = Σ_s F_ts·x_s + exp(a_t)·S·C_t          with F_ts = E_ts·(C_t·B_s)·dt_s, plus D where t = s
    dx_s = Σ_t F_ts·dy_t + exp(a_L - a_s)·dt_s·dS'·B_s
    dC_t = Σ_heads Σ_s V_ts·dt_s·B_s + read_t     with V_ts = E_ts·(dy_t·x_s), read_t = exp(a_t)·Sᵀ·dy_t
    dB_s = Σ_heads dt_s·(Σ_t V_ts·C_t + given_s)  with given_s = exp(a_L - a_s)·dS'ᵀ·x_s

With K_ts = V_ts·(C_t·B_s), the gradient of dt_s is Σ_t K_ts + B_s·given_s plus A times the gradient of dt_s·A. The
gradient of dt_τ·A is the sum of dt_s·K_ts over s < τ <= t, of C_t·read_t over t >= τ, and of dt_s·B_s·given_s over
s < τ, plus exp(a_L)·⟨dS', S⟩.

A program of the first and third launch takes one block of one sequence, and the heads of one group in turn. So it
computes C·Bᵀ once, and sums dB and dC over the heads in a fixed order. It sums V·dt over the heads before it multiplies
by B and C.

Matrix products are computed as in ssm_asr.ops.products_kernel, where no number moves between threads. For this, frames
and the channels of states are loaded in `order`, and every program is one warp. Sums of dt·A over the frames between
two frames are matrix products as well, with a matrix of ones and zeros. They replace differences of cumulative sums,
because after fast decays differences would leave no digits for slow ones.

Shapes: B batch, T frames, H heads, P channels of a head, G groups, N states, M blocks of L frames, Z = M + 1 starts and
ends of blocks. P and N are filled up to powers of 2. Offsets inside a sequence fit into 32 bits.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssm_asr.ops import products_kernel as mm

BLOCK_FRAMES = 16  # longer blocks cost more work per frame, but leave fewer states to write and read
PASS_BLOCKS, PASS_NUMBERS = 8, 128  # in the second launch, the blocks and the numbers of a state that a program loads
SIZES = ("M", "T")  # they differ from batch to batch
SUM_NUMBERS = 2048  # numbers that a program of the last sums loads at once


@triton.jit
def _load(base, stride_t, stride_c, i, c, i_mask, c_mask):  # type: ignore[no-untyped-def]
    pointers = (base + i[:, None] * stride_t) + c[None, :] * stride_c
    return tl.load(pointers, mask=i_mask[:, None] & c_mask[None, :], other=0.0).to(tl.float32)


@triton.jit
def _exponents(dt, A, least: tl.constexpr):  # type: ignore[no-untyped-def]
    """Returns the exponents of 2 for which 2^exponent = exp(dt·A)."""
    return tl.maximum(dt * A, least) * 1.4426950408889634


@triton.jit
def upto_and_strict(s, t, products):  # type: ignore[no-untyped-def]
    """Returns two matrices of constants: 1 where s <= t, and 1 where s < t.

    The last of the three cases never occurs. It makes the compiler spread the matrices over threads as products are.
    """
    upto = tl.where(s <= t, 1.0, tl.where(s > t, 0.0, products))
    return upto, tl.where(s < t, 1.0, tl.where(s >= t, 0.0, products))


@triton.jit
def head_decays(dt, A, strict, until, LEAST: tl.constexpr):  # type: ignore[no-untyped-def]
    """Returns E (s, t) of a head in a block, the decays from frames to its end, and from its start to frames."""
    exponents = _exponents(dt, A, LEAST)
    e_high, e_low = mm.split(exponents)
    high, low = strict * e_high[None, :], strict * e_low[None, :]
    # The sum over s < u <= t. It is 0 where s > t; the scores and, in the end, the weights are 0 there.
    between = tl.dot(mm.left_again(low), until, input_precision="tf32")
    between = tl.exp2(tl.dot(mm.left_again(high), until, acc=between, input_precision="tf32"))
    is_last = tl.arange(0, strict.shape[1])[None, :] == strict.shape[1] - 1
    to_end = tl.sum(tl.where(is_last, between, 0.0), axis=1)
    return between, to_end, tl.exp2(tl.sum(exponents[None, :] - (high + low), axis=1))


@triton.jit
def head_gradients(  # type: ignore[no-untyped-def]
    x_high, x_low, dy, dt, A, D, inter, arrived, straight, faded,
    between, to_end, products, strict, lower, after, ones, i_mask, LEAST: tl.constexpr,
):  # fmt: skip
    """Returns dx of a head in a block, V·dt (s, t), and the gradients of dt·A and of dt.

    Other blocks contribute by inter = B·dS'ᵀ, straight_s = B_s·given_s, arrived_t = C_t·read_t and faded, which is
    exp(a_L)·⟨dS', S⟩.
    """
    dy_high, dy_low = mm.split(dy)
    mixing_high, mixing_low = mm.split(mm.left_again(products * between * dt[:, None]))
    dyT_high, dyT_low = mm.across(dy_high, dy_low, ones)
    dx = inter * (dt * to_end)[:, None] + mm.ordered(dy) * D
    dx = mm.dot(mixing_high, mixing_low, dyT_high, dyT_low, dx)
    pairs = mm.dot(x_high, x_low, mm.right(dy_high), mm.right(dy_low), tl.zeros(strict.shape, tl.float32)) * between
    both = pairs * products
    stepped = both * dt[:, None]
    high, low = mm.split(mm.left_again(stepped))
    crossing = tl.dot(low, after, acc=stepped + (dt * straight)[:, None], input_precision="tf32")
    crossing = tl.dot(high, after, acc=crossing, input_precision="tf32")
    # These are sums of sums. Differences would leave only rounding errors where decays are fast.
    ddtA = tl.sum(strict * crossing + lower * arrived[:, None], axis=0) + faded
    ddtA = tl.where((dt * A >= LEAST) & i_mask, ddtA, 0.0)
    return dx, pairs * dt[:, None], ddtA, ddtA * A + (tl.sum(both, axis=1) + straight)


@triton.jit(do_not_specialize=SIZES)
def _added_kernel(  # type: ignore[no-untyped-def]
    x_ptr, dt_ptr, A_ptr, B_ptr, states_ptr, decays_ptr,
    x_b, x_t, x_h, x_p, dt_b, dt_t, dt_h, B_b, B_t, B_g, B_n,
    T, M, H: tl.constexpr, G: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
    P_PAD: tl.constexpr, N_PAD: tl.constexpr, L: tl.constexpr, LEAST: tl.constexpr, UNROLL: tl.constexpr,
    BACKWARD: tl.constexpr,
):  # fmt: skip
    """Computes what a block adds to the state at its end, or with BACKWARD, from dy and C, to dS at its start."""
    b, g, m = (tl.program_id(0) // G).to(tl.int64), tl.program_id(0) % G, tl.program_id(1)
    i, n, rows = mm.order(L), tl.arange(0, N_PAD), T - m * L
    i_mask, n_mask = i < rows, n < N
    h = g * (H // G)
    x_ptr += b * x_b + m * L * x_t + h * x_h
    dt_ptr += b * dt_b + m * L * dt_t + h * dt_h
    states_ptr += ((b * (M + 1) + (m if BACKWARD else m + 1)) * H + h) * P * N
    decays_ptr += (b * M + m) * H + h
    n_order = mm.order(N_PAD)
    ones = mm.unit()
    B = _load(B_ptr + b * B_b + m * L * B_t + g * B_g, B_t, B_n, i, n, i_mask, n_mask)
    B_high, B_low = mm.split(B)
    B_high, B_low = mm.left_again(mm.turned(B_high, ones)), mm.left_again(mm.turned(B_low, ones))
    upto = tl.where(i[None, :] <= i[:, None], 1.0, 0.0)
    summed = upto if BACKWARD else 1.0 - upto  # the frames whose dt·A is in the decay of a frame
    x = mm.load_channels(x_ptr, x_t, x_p, rows, P, L, P_PAD)
    A, dt = tl.load(A_ptr + h), tl.load(dt_ptr + i * dt_t, mask=i_mask, other=0.0).to(tl.float32)
    for r in tl.range(H // G, loop_unroll_factor=UNROLL):
        # The inputs of the next head are loaded early: memory is slow, and no load moves before an earlier store.
        next_mask = i_mask & (r + 1 < H // G)
        A_next = tl.load(A_ptr + h + r + 1, mask=r + 1 < H // G, other=0.0)
        x_next = mm.load_channels(x_ptr + (r + 1) * x_h, x_t, x_p, tl.where(r + 1 < H // G, rows, 0), P, L, P_PAD)
        dt_next = tl.load(dt_ptr + (r + 1) * dt_h + i * dt_t, mask=next_mask, other=0.0).to(tl.float32)
        exponents = _exponents(dt, A, LEAST)
        weights = tl.exp2(tl.sum(summed * exponents[None, :], axis=1))
        if not BACKWARD:
            weights *= dt
            tl.store(decays_ptr + r, tl.exp2(tl.sum(exponents, axis=0)))
        x_high, x_low = mm.split(x * weights[:, None])
        x_high, x_low = mm.across(x_high, x_low, ones)
        added = mm.dot(B_high, B_low, x_high, x_low, tl.zeros([N_PAD, P_PAD], tl.float32))  # (n, p)
        mm.store(states_ptr + r * (P * N) + n_order, added, n_order < N, P, N)
        x, A, dt = x_next, A_next, dt_next


@triton.jit(do_not_specialize=SIZES)
def _pass_kernel(  # type: ignore[no-untyped-def]
    states_ptr, decays_ptr, first_ptr, last_ptr,
    M, H: tl.constexpr, PN: tl.constexpr, BLOCKS: tl.constexpr, NUMBERS: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """Turns what blocks add into states, in place, from the first block to the last, or with BACKWARD to the first."""
    b = tl.program_id(0).to(tl.int64)
    e = tl.program_id(1) * NUMBERS + tl.arange(0, NUMBERS)
    e_mask = e < H * PN
    states_ptr += b * (M + 1) * H * PN + e
    decays_ptr += b * M * H + e // PN
    state = tl.load(first_ptr + b * H * PN + e, mask=e_mask, other=0.0)
    tl.store(states_ptr + (M * H * PN if BACKWARD else 0), state, mask=e_mask)
    done = 0
    while done < M:  # with current versions of numpy, Triton's interpreter cannot take M for a range
        loaded = ()  # several blocks are loaded at once, since no load depends on the states
        for j in tl.static_range(BLOCKS):
            m = M - 1 - done - j if BACKWARD else done + j
            mask = e_mask & (done + j < M)
            slot = m if BACKWARD else m + 1
            loaded += (  # type: ignore[assignment]
                tl.load(decays_ptr + m * H, mask=mask, other=1.0),
                tl.load(states_ptr + slot * H * PN, mask=mask, other=0.0),
            )
        for j in tl.static_range(BLOCKS):
            slot = M - 1 - done - j if BACKWARD else done + j + 1
            state = loaded[2 * j] * state + loaded[2 * j + 1]
            tl.store(states_ptr + slot * H * PN, state, mask=e_mask & (done + j < M))
        done += BLOCKS
    tl.store(last_ptr + b * H * PN + e, state, mask=e_mask)


@triton.jit(do_not_specialize=SIZES)
def _output_kernel(  # type: ignore[no-untyped-def]
    x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, states_ptr, y_ptr,
    x_b, x_t, x_h, x_p, dt_b, dt_t, dt_h, B_b, B_t, B_g, B_n, C_b, C_t, C_g, C_n,
    T, M, H: tl.constexpr, G: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
    P_PAD: tl.constexpr, N_PAD: tl.constexpr, L: tl.constexpr, LEAST: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    b, g, m = (tl.program_id(0) // G).to(tl.int64), tl.program_id(0) % G, tl.program_id(1)
    i, n, rows = mm.order(L), tl.arange(0, N_PAD), T - m * L
    i_mask, n_mask = i < rows, n < N
    p = mm.channel(mm.order(P_PAD))
    pn, pn_mask = p[:, None] * N + n[None, :], (p < P)[:, None] & n_mask[None, :]
    h = g * (H // G)
    x_ptr += b * x_b + m * L * x_t + h * x_h
    dt_ptr += b * dt_b + m * L * dt_t + h * dt_h
    states_ptr += ((b * (M + 1) + m) * H + h) * P * N
    y_ptr += ((b * T + m * L) * H + h) * P
    B = _load(B_ptr + b * B_b + m * L * B_t + g * B_g, B_t, B_n, i, n, i_mask, n_mask)
    C = _load(C_ptr + b * C_b + m * L * C_t + g * C_g, C_t, C_n, i, n, i_mask, n_mask)
    B_high, B_low = mm.split(B)
    C_high, C_low = mm.split(C)
    C_high, C_low = mm.left(C_high), mm.left(C_low)
    products = mm.dot(C_high, C_low, mm.right(B_high), mm.right(B_low), tl.zeros([L, L], tl.float32))  # (t, s)
    upto, strict = upto_and_strict(i[None, :], i[:, None], products)
    products *= upto
    since = mm.right_again(1.0 - upto)
    ones = mm.left_again(upto - strict) if L == 16 else mm.unit()
    for r in tl.range(H // G, loop_unroll_factor=UNROLL):
        A, D = tl.load(A_ptr + h + r), tl.load(D_ptr + h + r)
        x = mm.load_channels(x_ptr + r * x_h, x_t, x_p, rows, P, L, P_PAD)
        state = tl.load(states_ptr + r * (P * N) + pn, mask=pn_mask, other=0.0)
        dt = tl.load(dt_ptr + r * dt_h + i * dt_t, mask=i_mask, other=0.0).to(tl.float32)
        state_high, state_low = mm.split(state)
        read = mm.dot(C_high, C_low, mm.right(state_high), mm.right(state_low), tl.zeros([L, P_PAD], tl.float32))
        exponents = _exponents(dt, A, LEAST)
        e_high, e_low = mm.split(exponents)
        high, low = upto * e_high[None, :], upto * e_low[None, :]
        from_start = tl.exp2(tl.sum(high + low, axis=1))
        between = tl.dot(mm.left_again(low), since, input_precision="tf32")
        between = tl.exp2(tl.dot(mm.left_again(high), since, acc=between, input_precision="tf32"))
        y = read * from_start[:, None] + mm.ordered(x) * D
        xT_high, xT_low = mm.across(*mm.split(x), ones)
        mixing_high, mixing_low = mm.split(mm.left_again(products * between * dt[None, :]))
        y = mm.dot(mixing_high, mixing_low, xT_high, xT_low, y)
        mm.store(y_ptr + r * P + i * (H * P), y, i_mask, P, 1)


@triton.jit(do_not_specialize=SIZES)
def _gradient_kernel(  # type: ignore[no-untyped-def]
    x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, states_ptr, dy_ptr, dstates_ptr, decays_ptr,
    dx_ptr, ddt_ptr, dB_ptr, dC_ptr, dA_ptr, dD_ptr,
    x_b, x_t, x_h, x_p, dt_b, dt_t, dt_h, B_b, B_t, B_g, B_n, C_b, C_t, C_g, C_n, dy_b, dy_t, dy_h, dy_p,
    T, M, H: tl.constexpr, G: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
    P_PAD: tl.constexpr, N_PAD: tl.constexpr, L: tl.constexpr, LEAST: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    b, g, m = (tl.program_id(0) // G).to(tl.int64), tl.program_id(0) % G, tl.program_id(1)
    i, n, rows = mm.order(L), tl.arange(0, N_PAD), T - m * L
    i_mask, n_mask = i < rows, n < N
    p = mm.channel(mm.order(P_PAD))
    pn, pn_mask = p[:, None] * N + n[None, :], (p < P)[:, None] & n_mask[None, :]
    h = g * (H // G)
    x_ptr += b * x_b + m * L * x_t + h * x_h
    dy_ptr += b * dy_b + m * L * dy_t + h * dy_h
    dt_ptr += b * dt_b + m * L * dt_t + h * dt_h
    start = (b * (M + 1) + m) * H + h
    states_ptr += start * P * N
    dstates_ptr += (start + H) * P * N
    decays_ptr += (b * M + m) * H + h
    row = (b * T + m * L) * H + h
    dx_ptr += row * P
    ddt_ptr += row
    block = (h * (tl.num_programs(0) // G) + b) * M + m
    blocks = tl.num_programs(0) // G * M
    B_base = B_ptr + b * B_b + m * L * B_t + g * B_g
    C_base = C_ptr + b * C_b + m * L * C_t + g * C_g
    B = _load(B_base, B_t, B_n, i, n, i_mask, n_mask)
    C = _load(C_base, C_t, C_n, i, n, i_mask, n_mask)
    B_high, B_low = mm.split(B)
    C_high, C_low = mm.split(C)
    B_high, B_low = mm.left(B_high), mm.left(B_low)
    products = mm.dot(B_high, B_low, mm.right(C_high), mm.right(C_low), tl.zeros([L, L], tl.float32))  # (s, t), as all
    upto, strict = upto_and_strict(i[:, None], i[None, :], products)
    products *= upto
    lower = 1.0 - strict
    until = mm.right_again(lower)
    after = mm.right_again(strict)
    ones = mm.left_again(upto - strict) if L == 16 else mm.unit()
    weights = tl.zeros([L, L], tl.float32)
    dB, dC = tl.zeros([L, N_PAD], tl.float32), tl.zeros([L, N_PAD], tl.float32)
    for r in tl.range(H // G, loop_unroll_factor=UNROLL):
        A, D = tl.load(A_ptr + h + r), tl.load(D_ptr + h + r)
        dy = mm.load_channels(dy_ptr + r * dy_h, dy_t, dy_p, rows, P, L, P_PAD)
        state = tl.load(states_ptr + r * (P * N) + pn, mask=pn_mask, other=0.0)
        dt = tl.load(dt_ptr + r * dt_h + i * dt_t, mask=i_mask, other=0.0).to(tl.float32)
        between, to_end, from_start = head_decays(dt, A, strict, until, LEAST)

        dy_high, dy_low = mm.split(dy)
        state_high, state_low = mm.split(state)
        stateT_high, stateT_low = mm.across(state_high, state_low, ones)
        read = mm.dot(mm.left(dy_high), mm.left(dy_low), stateT_high, stateT_low, tl.zeros([L, N_PAD], tl.float32))
        read *= from_start[:, None]
        dC += read
        arrived = tl.sum(read * mm.ordered(C), axis=1)

        x = mm.load_channels(x_ptr + r * x_h, x_t, x_p, rows, P, L, P_PAD)
        dstate = tl.load(dstates_ptr + r * (P * N) + pn, mask=pn_mask, other=0.0)
        tl.store(dD_ptr + block + r * blocks, tl.sum(x * dy))
        faded = tl.load(decays_ptr + r) * tl.sum(dstate * state)
        dstate_high, dstate_low = mm.split(dstate)
        inter = mm.dot(B_high, B_low, mm.right(dstate_high), mm.right(dstate_low), tl.zeros([L, P_PAD], tl.float32))
        straight = tl.sum(inter * mm.ordered(x), axis=1) * to_end
        x_high, x_low = mm.split(x)
        x_high, x_low = mm.left(x_high), mm.left(x_low)
        dstateT_high, dstateT_low = mm.across(dstate_high, dstate_low, ones)
        given = mm.dot(x_high, x_low, dstateT_high, dstateT_low, tl.zeros([L, N_PAD], tl.float32))
        dB += given * (dt * to_end)[:, None]

        dx, steps, ddtA, ddt = head_gradients(
            x_high, x_low, dy, dt, A, D, inter, arrived, straight, faded,
            between, to_end, products, strict, lower, after, ones, i_mask, LEAST,
        )  # fmt: skip
        weights += steps
        mm.store(dx_ptr + r * P + i * (H * P), dx, i_mask, P, 1)
        tl.store(ddt_ptr + r + i * H, ddt, mask=i_mask)
        tl.store(dA_ptr + block + r * blocks, tl.sum(ddtA * dt, axis=0))
    weights_high, weights_low = mm.split(weights * upto)
    C_high, C_low = mm.split(_load(C_base, C_t, C_n, i, n, i_mask, n_mask))
    CT_high, CT_low = mm.across(C_high, C_low, ones)
    dB = mm.dot(mm.left_again(weights_high), mm.left_again(weights_low), CT_high, CT_low, dB)
    weights_high, weights_low = mm.turned_again(weights_high, ones), mm.turned_again(weights_low, ones)
    B_high, B_low = mm.split(_load(B_base, B_t, B_n, i, n, i_mask, n_mask))
    BT_high, BT_low = mm.across(B_high, B_low, ones)
    dC = mm.dot(mm.left_again(weights_high), mm.left_again(weights_low), BT_high, BT_low, dC)
    start = ((b * T + m * L) * G + g) * N
    in_mask, offsets = i_mask[:, None] & n_mask[None, :], i[:, None] * (G * N) + n[None, :]
    tl.store(dB_ptr + start + offsets, mm.loaded(dB), mask=in_mask)
    tl.store(dC_ptr + start + offsets, mm.loaded(dC), mask=in_mask)


@triton.jit
def _sum_kernel(x_ptr, sums_ptr, COUNT, NUMBERS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Sums every row of a matrix. For dA and dD this takes less than the 8 µs of PyTorch's sum on an H100."""
    row, e = tl.program_id(0).to(tl.int64), tl.arange(0, NUMBERS)
    sums = tl.zeros([NUMBERS], tl.float32)
    done = 0
    while done < COUNT:
        sums += tl.load(x_ptr + row * COUNT + done + e, mask=done + e < COUNT, other=0.0)
        done += NUMBERS
    tl.store(sums_ptr + row, tl.sum(sums, axis=0))


def _sizes(x_BTHP: Tensor, B_BTGN: Tensor, least_log_decay: float) -> dict[str, Any]:
    """Returns the sizes and constants of the kernels that work on blocks."""
    _, T, H, P = x_BTHP.shape
    G, N = B_BTGN.shape[2:]
    P_pad, N_pad = max(16, triton.next_power_of_2(P)), max(16, triton.next_power_of_2(N))
    return dict(
        T=T, M=triton.cdiv(T, BLOCK_FRAMES), H=H, G=G, P=P, N=N, P_PAD=P_pad, N_PAD=N_pad, L=BLOCK_FRAMES,
        # With small states, two heads at once fit into registers.
        LEAST=least_log_decay, num_warps=1, UNROLL=2 if N_pad == 16 else 1, num_stages=1,
    )  # fmt: skip


def pass_on(states_BZHPN: Tensor, decays_BMH: Tensor, first_BHPN: Tensor, *, backward: bool) -> Tensor:
    """Turns what blocks add into states, or backward into gradients of states, in place, and returns the last one.

    Args:
        states_BZHPN: what blocks add to the states at their ends, or backward to the gradients at their starts.
        decays_BMH: the decays exp(a_L) of blocks.
        first_BHPN: the state before the first block, or backward the gradient after the last.
        backward: whether to go from the last block to the first.
    """
    (B, M, H), (P, N) = decays_BMH.shape, first_BHPN.shape[2:]
    last_BHPN = first_BHPN.new_empty(B, H, P, N)
    _pass_kernel[(B, triton.cdiv(H * P * N, PASS_NUMBERS))](
        states_BZHPN, decays_BMH, first_BHPN.contiguous(), last_BHPN,
        M, H=H, PN=P * N, BLOCKS=PASS_BLOCKS, NUMBERS=PASS_NUMBERS, BACKWARD=backward, num_warps=1,
    )  # fmt: skip
    return last_BHPN


def sum_blocks(dAD_2HBM: Tensor) -> Tensor:
    """Returns the sums (2, H) of dA and dD over sequences and blocks, in a fixed order."""
    _, H, B, M = dAD_2HBM.shape
    dAD_2H = dAD_2HBM.new_empty(2, H)
    _sum_kernel[(2 * H,)](dAD_2HBM, dAD_2H, B * M, NUMBERS=SUM_NUMBERS, num_warps=4)
    return dAD_2H


def _states(
    x_BTHP: Tensor,
    dt_BTH: Tensor,
    A_H: Tensor,
    B_BTGN: Tensor,
    first_BHPN: Tensor,
    sizes: dict[str, Any],
    decays_BMH: Tensor,
    *,
    backward: bool,
) -> tuple[Tensor, Tensor]:
    """Returns the states at the starts and ends of all blocks and the last state, or backward their gradients."""
    (B, _, H, P), (G, N), M = x_BTHP.shape, B_BTGN.shape[2:], sizes["M"]
    states_BZHPN = first_BHPN.new_empty(B, M + 1, H, P, N)
    _added_kernel[(B * G, M)](
        x_BTHP, dt_BTH, A_H, B_BTGN, states_BZHPN, decays_BMH,
        *x_BTHP.stride(), *dt_BTH.stride(), *B_BTGN.stride(), **sizes, BACKWARD=backward,
    )  # fmt: skip
    return states_BZHPN, pass_on(states_BZHPN, decays_BMH, first_BHPN, backward=backward)


class _Ssd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, least_log_decay: float, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, D_H, state_BHPN = inputs
        sizes = _sizes(x_BTHP, B_BTGN, least_log_decay)
        decays_BMH = state_BHPN.new_empty(len(x_BTHP), sizes["M"], len(A_H))
        states_BZHPN, end_BHPN = _states(x_BTHP, dt_BTH, A_H, B_BTGN, state_BHPN, sizes, decays_BMH, backward=False)
        y_BTHP = state_BHPN.new_empty(x_BTHP.shape)
        strides = [s for x in (x_BTHP, dt_BTH, B_BTGN, C_BTGN) for s in x.stride()]
        _output_kernel[(len(x_BTHP) * sizes["G"], sizes["M"])](
            x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, D_H, states_BZHPN, y_BTHP, *strides, **sizes,
        )  # fmt: skip
        ctx.save_for_backward(x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, D_H, states_BZHPN, decays_BMH)
        ctx.sizes = sizes
        return y_BTHP, end_BHPN

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, D_H, states_BZHPN, decays_BMH = ctx.saved_tensors
        dy_BTHP, dend_BHPN = grads
        B, H, M = len(x_BTHP), len(A_H), ctx.sizes["M"]
        dstates_BZHPN, dstate_BHPN = _states(
            dy_BTHP, dt_BTH, A_H, C_BTGN, dend_BHPN, ctx.sizes, decays_BMH, backward=True
        )
        dx_BTHP, ddt_BTH = (x.new_empty(x.shape) for x in (x_BTHP, dt_BTH))
        dB_BTGN, dC_BTGN = (x.new_empty(x.shape) for x in (B_BTGN, C_BTGN))
        dAD_2HBM = A_H.new_empty(2, H, B, M)
        strides = [s for x in (x_BTHP, dt_BTH, B_BTGN, C_BTGN, dy_BTHP) for s in x.stride()]
        _gradient_kernel[(B * ctx.sizes["G"], M)](
            x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, D_H, states_BZHPN, dy_BTHP, dstates_BZHPN, decays_BMH,
            dx_BTHP, ddt_BTH, dB_BTGN, dC_BTGN, dAD_2HBM[0], dAD_2HBM[1],
            *strides, **ctx.sizes,
        )  # fmt: skip
        dA_H, dD_H = sum_blocks(dAD_2HBM)
        return None, dx_BTHP, ddt_BTH, dA_H, dB_BTGN, dC_BTGN, dD_H, dstate_BHPN


def ssd_kernel(inputs: tuple[Tensor, ...], least_log_decay: float) -> tuple[Tensor, Tensor]:
    """Computes `ssm_asr.ops.ssd.ssd` by kernels, for float32 inputs with any strides.

    Args:
        inputs: the fields of `ssm_asr.ops.ssd.SsdInputs`, in their order.
        least_log_decay: a smaller dt·A counts as this.
    """
    y_BTHP, end_BHPN = _Ssd.apply(least_log_decay, *inputs)
    return y_BTHP, end_BHPN
