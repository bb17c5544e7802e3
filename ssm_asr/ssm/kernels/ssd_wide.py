"""Mamba-2's state-space operation in Triton kernels for large states that many heads share, with long blocks.

Source: Dao and Gu (arXiv 2405.21060), section 6. The equations and their letters are those of
ssm_asr.ssm.kernels.ssd, where a program does all that a short block needs. Here blocks are long, so that there are
fewer states to write and read, and products with the states are launches of their own, in which the heads of a group
are one matrix of Q columns. With x⁺_s = exp(a_L - a_s)·dt_s·x_s and dy⁺_t = exp(a_t)·dy_t of all heads:

    added = x⁺ᵀ·B    and backward  dy⁺ᵀ·C           between them the states are passed on
    read  = C·Sᵀ     and backward  given = B·dS'ᵀ
    dC    = dy⁺·S + W·B            dB    = x⁺·dS' + Wᵀ·C        with W_ts = Σ_heads V_ts·dt_s

The rest, with heads one by one, never meets N: it has C·Bᵀ, read and given, since the sums over n in the gradients of
dt are Σ_p dy⁺_tp·read_tp, Σ_p x⁺_sp·given_sp and Σ_p Σ_n dS'·S.

Shapes: B batch, T frames, H heads, P channels a head, G groups, Q = P·H / G channels a group, N states, M blocks of L
frames, F = M·L, Z = M + 1 starts and ends of blocks, V = 6 vectors: exp(a_t), exp(a_L - a_t)·dt_t, exp(a_L - a_t),
dt_t, and a_t to base 2 in two parts. Offsets inside a sequence fit in 32 bits.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssm_asr.ssm.kernels.products import product, split
from ssm_asr.ssm.kernels.ssd import _load, pass_on, sum_blocks

BLOCK_FRAMES = 64
CHANNELS = 32  # of a group that a program takes at once
ADDED_STATES, STATES = 128, 64  # that a program takes at once, where it makes states and elsewhere
COLUMNS = 32  # of a matrix of frames by frames that a program takes at once
OPTIONS = dict(num_warps=4, num_stages=1)
READ_REGISTERS, SHARED_REGISTERS = 168, 128  # of a thread: so another program fits on a processor


@triton.jit
def _between(a_ptr, rest_ptr, t, s):  # type: ignore[no-untyped-def]
    """E_ts; 1 where t is before s."""
    exponents = (tl.load(a_ptr + t) - tl.load(a_ptr + s)) + (tl.load(rest_ptr + t) - tl.load(rest_ptr + s))
    return tl.exp2(tl.minimum(exponents, 0.0))


@triton.jit
def _vectors_kernel(  # type: ignore[no-untyped-def]
    dt_ptr, A_ptr, vectors_ptr, decays_ptr, dt_b, dt_t, dt_h,
    T, M, H: tl.constexpr, L: tl.constexpr, LEAST: tl.constexpr,
):  # fmt: skip
    """The six vectors, and exp(a_L)."""
    h, m, b, i = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64), tl.arange(0, L)
    dt = tl.load(dt_ptr + b * dt_b + (m * L + i) * dt_t + h * dt_h, mask=i < T - m * L, other=0.0).to(tl.float32)
    # Two sums, the first of them exact: fast decays would leave no digits to the differences of slow ones after them.
    exponents = tl.maximum(dt * tl.load(A_ptr + h), LEAST) * 1.4426950408889634
    coarse = tl.floor(exponents * 1024.0) * (1.0 / 1024.0)
    fine = exponents - coarse
    a, rest = tl.cumsum(coarse, axis=0), tl.cumsum(fine, axis=0)
    last, last_rest = tl.sum(coarse, axis=0), tl.sum(fine, axis=0)
    to_end = tl.exp2((last - a) + (last_rest - rest))
    F = M * L
    vectors_ptr += (b * H + h) * 6 * F + m * L + i
    tl.store(vectors_ptr, tl.exp2(a + rest))
    tl.store(vectors_ptr + F, dt * to_end)
    tl.store(vectors_ptr + 2 * F, to_end)
    tl.store(vectors_ptr + 3 * F, dt)
    tl.store(vectors_ptr + 4 * F, a)
    tl.store(vectors_ptr + 5 * F, rest)
    tl.store(decays_ptr + (b * M + m) * H + h, tl.exp2(last + last_rest))


@triton.jit
def _scaled(  # type: ignore[no-untyped-def]
    x_ptr, vector_ptr, x_b, x_t, x_h, x_p, b, g, m, q,
    T, M, H: tl.constexpr, G: tl.constexpr, P: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """x⁺ or dy⁺ of a block, (L, q)."""
    i, h, p = tl.arange(0, L)[:, None], g * (H // G) + q[None, :] // P, q[None, :] % P
    mask = (i < T - m * L) & (q[None, :] < H // G * P)
    x = tl.load(x_ptr + b * x_b + (m * L + i) * x_t + h * x_h + p * x_p, mask=mask, other=0.0).to(tl.float32)
    return x * tl.load(vector_ptr + (b * H + h) * 6 * M * L + m * L + i, mask=mask, other=0.0)


@triton.jit
def _added_kernel(  # type: ignore[no-untyped-def]
    x_ptr, vector_ptr, B_ptr, states_ptr, x_b, x_t, x_h, x_p, B_b, B_t, B_g, B_n,
    T, M, H: tl.constexpr, G: tl.constexpr, P: tl.constexpr, N: tl.constexpr, L: tl.constexpr,
    CHANNELS: tl.constexpr, STATES: tl.constexpr, SLOT: tl.constexpr,
):  # fmt: skip
    """What a block adds to the state at its end, x⁺ᵀ·B; SLOT 0, with dy⁺ and C to the gradient of that at its start."""
    Q: tl.constexpr = H // G * P
    PARTS: tl.constexpr = (Q + CHANNELS - 1) // CHANNELS
    part, m, b, g = tl.program_id(0), tl.program_id(1), (tl.program_id(2) // G).to(tl.int64), tl.program_id(2) % G
    q, n = part % PARTS * CHANNELS + tl.arange(0, CHANNELS), part // PARTS * STATES + tl.arange(0, STATES)
    i = tl.arange(0, L)
    x = _scaled(x_ptr, vector_ptr, x_b, x_t, x_h, x_p, b, g, m, q, T, M, H, G, P, L)
    B = _load(B_ptr + b * B_b + m * L * B_t + g * B_g, B_t, B_n, i, n, i < T - m * L, n < N)
    states_ptr += ((b * (M + 1) + m + SLOT) * G + g) * Q * N
    mask = (q < Q)[:, None] & (n < N)[None, :]
    tl.store(states_ptr + (q[:, None] * N + n[None, :]), product(tl.trans(x), B), mask=mask)


@triton.jit
def _read_kernel(  # type: ignore[no-untyped-def]
    C_ptr, states_ptr, read_ptr, others_ptr, products_ptr, C_b, C_t, C_g, C_n,
    T, M, H: tl.constexpr, G: tl.constexpr, P: tl.constexpr, N: tl.constexpr, L: tl.constexpr,
    CHANNELS: tl.constexpr, STATES: tl.constexpr, SLOT: tl.constexpr,
):  # fmt: skip
    """C·Sᵀ of a block; SLOT 1, B·dS'ᵀ, and Σ_n dS'·S of every channel."""
    Q: tl.constexpr = H // G * P
    part, m, b, g = tl.program_id(0), tl.program_id(1), (tl.program_id(2) // G).to(tl.int64), tl.program_id(2) % G
    q, i = part * CHANNELS + tl.arange(0, CHANNELS), tl.arange(0, L)
    i_mask, q_mask = i < T - m * L, q < Q
    C_ptr += b * C_b + m * L * C_t + g * C_g
    state = ((b * (M + 1) + m) * G + g) * Q * N
    read, products = tl.zeros([L, CHANNELS], tl.float32), tl.zeros([CHANNELS], tl.float32)
    for start in range(0, N, STATES):
        n = start + tl.arange(0, STATES)
        states = _load(states_ptr + state + SLOT * G * Q * N, N, 1, q, n, q_mask, n < N)
        read += product(_load(C_ptr, C_t, C_n, i, n, i_mask, n < N), tl.trans(states))
        if SLOT == 1:
            products += tl.sum(states * _load(others_ptr + state, N, 1, q, n, q_mask, n < N), axis=1)
    read_ptr += ((b * T + m * L) * G + g) * Q + (i[:, None] * (G * Q) + q[None, :])
    tl.store(read_ptr, read, mask=i_mask[:, None] & q_mask[None, :])
    if SLOT == 1:
        tl.store(products_ptr + ((b * M + m) * G + g) * Q + q, products, mask=q_mask)


@triton.jit
def _scores_kernel(  # type: ignore[no-untyped-def]
    B_ptr, C_ptr, scores_ptr, B_b, B_t, B_g, B_n, C_b, C_t, C_g, C_n,
    T, M, G: tl.constexpr, N: tl.constexpr, L: tl.constexpr, STATES: tl.constexpr,
):  # fmt: skip
    """C·Bᵀ of a block."""
    m, b, g, i = tl.program_id(0), (tl.program_id(1) // G).to(tl.int64), tl.program_id(1) % G, tl.arange(0, L)
    i_mask = i < T - m * L
    B_ptr += b * B_b + m * L * B_t + g * B_g
    C_ptr += b * C_b + m * L * C_t + g * C_g
    scores = tl.zeros([L, L], tl.float32)
    for start in range(0, N, STATES):
        n = start + tl.arange(0, STATES)
        B = _load(B_ptr, B_t, B_n, i, n, i_mask, n < N)
        scores += product(_load(C_ptr, C_t, C_n, i, n, i_mask, n < N), tl.trans(B))
    tl.store(scores_ptr + ((b * M + m) * G + g) * L * L + (i[:, None] * L + i[None, :]), scores)


@triton.jit
def _output_kernel(  # type: ignore[no-untyped-def]
    x_ptr, D_ptr, vectors_ptr, read_ptr, scores_ptr, y_ptr, x_b, x_t, x_h, x_p,
    T, M, H: tl.constexpr, G: tl.constexpr, P: tl.constexpr,
    P_PAD: tl.constexpr, L: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    h, m, b, F = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64), M * L
    i, p = tl.arange(0, L), tl.arange(0, P_PAD)
    i_mask, p_mask = i < T - m * L, p < P
    x_ptr += b * x_b + m * L * x_t + h * x_h
    vectors_ptr += (b * H + h) * 6 * F + m * L
    scores_ptr += ((b * M + m) * G + h // (H // G)) * L * L
    tile, mask = ((b * T + m * L) * H + h) * P + (i[:, None] * (H * P) + p[None, :]), i_mask[:, None] & p_mask[None, :]
    read, from_start = tl.load(read_ptr + tile, mask=mask, other=0.0), tl.load(vectors_ptr + i)
    x = _load(x_ptr, x_t, x_p, i, p, i_mask, p_mask)
    own = tl.load(scores_ptr + i * (L + 1)) * tl.load(vectors_ptr + 3 * F + i) + tl.load(D_ptr + h)
    y = read * from_start[:, None] + x * own[:, None]
    for start in range(0, L, COLUMNS):
        s = start + tl.arange(0, COLUMNS)
        scores = tl.load(scores_ptr + (i[:, None] * L + s[None, :]), mask=i[:, None] > s[None, :], other=0.0)
        scores *= _between(vectors_ptr + 4 * F, vectors_ptr + 5 * F, i[:, None], s[None, :])
        x_s = _load(x_ptr, x_t, x_p, s, p, s < T - m * L, p_mask)
        y += product(scores, x_s * tl.load(vectors_ptr + 3 * F + s)[:, None])
    tl.store(y_ptr + tile, y, mask=mask)


@triton.jit
def _weights_kernel(  # type: ignore[no-untyped-def]
    x_ptr, vectors_ptr, scores_ptr, dy_ptr, weights_ptr, crossing_ptr, x_b, x_t, x_h, x_p, dy_b, dy_t, dy_h, dy_p,
    T, M, H: tl.constexpr, G: tl.constexpr, P: tl.constexpr, P_PAD: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """Wᵀ, and what of the gradient of dt·A has both frames in the block; a row for every s, a column for every t."""
    m, b, g, F = tl.program_id(0), (tl.program_id(1) // G).to(tl.int64), tl.program_id(1) % G, M * L
    i, p = tl.arange(0, L), tl.arange(0, P_PAD)
    i_mask, p_mask = i < T - m * L, p < P
    start, later = ((b * M + m) * G + g) * L * L, (i[:, None] <= i[None, :]).to(tl.float32)
    scores = tl.load(scores_ptr + start + (i[:, None] + i[None, :] * L), mask=i[:, None] < i[None, :], other=0.0)
    weights = tl.zeros([L, L], tl.float32)
    for r in range(H // G):
        h = g * (H // G) + r
        x = _load(x_ptr + b * x_b + m * L * x_t + h * x_h, x_t, x_p, i, p, i_mask, p_mask)
        dy = _load(dy_ptr + b * dy_b + m * L * dy_t + h * dy_h, dy_t, dy_p, i, p, i_mask, p_mask)
        head = (b * H + h) * F
        vectors = vectors_ptr + 6 * head + m * L
        pairs = product(x * tl.load(vectors + 3 * F + i)[:, None], tl.trans(dy))
        a, rest = tl.load(vectors + 4 * F + i), tl.load(vectors + 5 * F + i)
        # Not by _between: its loads of columns and rows take more registers, of which there are none left.
        pairs *= tl.exp2(tl.minimum((a[None, :] - a[:, None]) + (rest[None, :] - rest[:, None]), 0.0))
        weights += pairs
        # Sums of sums, not differences of them: where decays are fast, these would leave only rounding errors.
        high, low = split(pairs * scores)
        crossing = tl.dot(later, tl.trans(low), input_precision="tf32")
        crossing = tl.dot(later, tl.trans(high), acc=crossing, input_precision="tf32")
        crossing = tl.sum(tl.where(i[:, None] > i[None, :], crossing, 0.0), axis=1)
        tl.store(crossing_ptr + head + m * L + i, crossing)
    weights = tl.where(i[:, None] <= i[None, :], weights, 0.0)
    tl.store(weights_ptr + start + (i[:, None] * L + i[None, :]), weights)


@triton.jit
def _inside_kernel(  # type: ignore[no-untyped-def]
    x_ptr, A_ptr, D_ptr, vectors_ptr, decays_ptr, read_ptr, scores_ptr, dy_ptr, given_ptr, products_ptr, crossing_ptr,
    dx_ptr, ddt_ptr, dA_ptr, dD_ptr, x_b, x_t, x_h, x_p, dy_b, dy_t, dy_h, dy_p,
    T, M, H: tl.constexpr, G: tl.constexpr, P: tl.constexpr,
    P_PAD: tl.constexpr, L: tl.constexpr, COLUMNS: tl.constexpr, LEAST: tl.constexpr,
):  # fmt: skip
    """dx, ddt, and parts of dA and dD; scores have a row for every s and a column for every t."""
    h, m, b, F = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64), M * L
    i, p = tl.arange(0, L), tl.arange(0, P_PAD)
    i_mask, p_mask, A = i < T - m * L, p < P, tl.load(A_ptr + h)
    dy_ptr += b * dy_b + m * L * dy_t + h * dy_h
    vectors_ptr += (b * H + h) * 6 * F + m * L
    scores_ptr += ((b * M + m) * G + h // (H // G)) * L * L
    tile, mask = ((b * T + m * L) * H + h) * P + (i[:, None] * (H * P) + p[None, :]), i_mask[:, None] & p_mask[None, :]
    given = tl.load(given_ptr + tile, mask=mask, other=0.0) * tl.load(vectors_ptr + 2 * F + i)[:, None]
    to_x = given
    for start in range(0, L, COLUMNS):
        t = start + tl.arange(0, COLUMNS)
        scores = tl.load(scores_ptr + (i[:, None] + t[None, :] * L), mask=i[:, None] < t[None, :], other=0.0)
        scores *= _between(vectors_ptr + 4 * F, vectors_ptr + 5 * F, t[None, :], i[:, None])
        to_x += product(scores, _load(dy_ptr, dy_t, dy_p, t, p, t < T - m * L, p_mask))
    x = _load(x_ptr + b * x_b + m * L * x_t + h * x_h, x_t, x_p, i, p, i_mask, p_mask)
    dy = _load(dy_ptr, dy_t, dy_p, i, p, i_mask, p_mask)
    dt = tl.load(vectors_ptr + 3 * F + i)
    to_x += dy * tl.load(scores_ptr + i * (L + 1))[:, None]
    tl.store(dx_ptr + tile, to_x * dt[:, None] + dy * tl.load(D_ptr + h), mask=mask)

    read = tl.load(read_ptr + tile, mask=mask, other=0.0)
    passed, arrived = tl.sum(x * given, axis=1) * dt, tl.sum(dy * read, axis=1) * tl.load(vectors_ptr + i)
    ddtA = tl.sum(tl.where(i[:, None] < i[None, :], passed[:, None], arrived[:, None]), axis=0)
    ddtA += tl.load(crossing_ptr + (b * H + h) * F + m * L + i)
    block = (b * M + m) * H + h
    passed_on = tl.sum(tl.load(products_ptr + block * P + p, mask=p_mask, other=0.0), axis=0)
    ddtA = tl.where(dt * A >= LEAST, ddtA + passed_on * tl.load(decays_ptr + block), 0.0)
    tl.store(ddt_ptr + (b * T + m * L + i) * H + h, ddtA * A + tl.sum(x * to_x, axis=1), mask=i_mask)
    block = (h * tl.num_programs(2) + b) * M + m
    tl.store(dA_ptr + block, tl.sum(ddtA * dt, axis=0))
    tl.store(dD_ptr + block, tl.sum(x * dy))


@triton.jit
def _shared_kernel(  # type: ignore[no-untyped-def]
    dy_ptr, vector_ptr, states_ptr, weights_ptr, B_ptr, dC_ptr, dy_b, dy_t, dy_h, dy_p, B_b, B_t, B_g, B_n,
    T, M, H: tl.constexpr, G: tl.constexpr, P: tl.constexpr, N: tl.constexpr, L: tl.constexpr,
    CHANNELS: tl.constexpr, STATES: tl.constexpr, SLOT: tl.constexpr,
):  # fmt: skip
    """dC = dy⁺·S + W·B of a block; SLOT 1, dB = x⁺·dS' + Wᵀ·C."""
    Q: tl.constexpr = H // G * P
    part, m, b, g = tl.program_id(0), tl.program_id(1), (tl.program_id(2) // G).to(tl.int64), tl.program_id(2) % G
    i, n = tl.arange(0, L), part * STATES + tl.arange(0, STATES)
    i_mask, n_mask = i < T - m * L, n < N
    B = _load(B_ptr + b * B_b + m * L * B_t + g * B_g, B_t, B_n, i, n, i_mask, n_mask)
    ij = i[:, None] * L + i[None, :] if SLOT == 1 else i[:, None] + i[None, :] * L
    dC = product(tl.load(weights_ptr + ((b * M + m) * G + g) * L * L + ij), B)
    states_ptr += ((b * (M + 1) + m + SLOT) * G + g) * Q * N
    for start in range(0, Q, CHANNELS):
        q = start + tl.arange(0, CHANNELS)
        dy = _scaled(dy_ptr, vector_ptr, dy_b, dy_t, dy_h, dy_p, b, g, m, q, T, M, H, G, P, L)
        dC += product(dy, _load(states_ptr, N, 1, q, n, q < Q, n_mask))
    dC_ptr += ((b * T + m * L) * G + g) * N + (i[:, None] * (G * N) + n[None, :])
    tl.store(dC_ptr, dC, mask=i_mask[:, None] & n_mask[None, :])


def _states(
    x_BTHP: Tensor, vector_BHF: Tensor, B_BTGN: Tensor, decays_BMH: Tensor, first_BHPN: Tensor, sizes: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """The states at the starts and ends of all blocks, and the one after the last; SLOT 0, their gradients."""
    (B, _, H, P), (G, N), M = x_BTHP.shape, B_BTGN.shape[2:], decays_BMH.shape[1]
    states_BZHPN = first_BHPN.new_empty(B, M + 1, H, P, N)
    states = min(ADDED_STATES, max(16, triton.next_power_of_2(N)))
    _added_kernel[(triton.cdiv(H // G * P, CHANNELS) * triton.cdiv(N, states), M, B * G)](
        x_BTHP, vector_BHF, B_BTGN, states_BZHPN, *x_BTHP.stride(), *B_BTGN.stride(),
        **{**sizes, "STATES": states},
    )  # fmt: skip
    return states_BZHPN, pass_on(states_BZHPN, decays_BMH, first_BHPN, backward=sizes["SLOT"] == 0)


class _Ssd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, least_log_decay: float, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, D_H, state_BHPN = inputs
        (B, T, H, P), (G, N), L = x_BTHP.shape, B_BTGN.shape[2:], BLOCK_FRAMES
        M = triton.cdiv(T, L)
        sizes = dict(T=T, M=M, H=H, G=G, P=P, L=L, **OPTIONS)
        groups = dict(N=N, CHANNELS=CHANNELS, STATES=STATES, **sizes)
        heads = dict(P_PAD=max(16, triton.next_power_of_2(P)), **sizes)

        vectors_BHVF, decays_BMH = A_H.new_empty(B, H, 6, M * L), A_H.new_empty(B, M, H)
        _vectors_kernel[(H, M, B)](
            dt_BTH, A_H, vectors_BHVF, decays_BMH, *dt_BTH.stride(), T, M, H=H, L=L, LEAST=least_log_decay, num_warps=1
        )
        states_BZHPN, end_BHPN = _states(
            x_BTHP, vectors_BHVF[:, :, 1], B_BTGN, decays_BMH, state_BHPN, dict(SLOT=1, **groups)
        )
        read_BTHP, y_BTHP = A_H.new_empty(x_BTHP.shape), A_H.new_empty(x_BTHP.shape)
        scores_BMGLL = A_H.new_empty(B, M, G, L, L)
        _read_kernel[(triton.cdiv(H // G * P, CHANNELS), M, B * G)](
            C_BTGN, states_BZHPN, read_BTHP, None, None, *C_BTGN.stride(), SLOT=0, maxnreg=READ_REGISTERS, **groups
        )
        _scores_kernel[(M, B * G)](
            B_BTGN, C_BTGN, scores_BMGLL, *B_BTGN.stride(), *C_BTGN.stride(), T, M, G, N, L, STATES, **OPTIONS
        )
        _output_kernel[(H, M, B)](
            x_BTHP, D_H, vectors_BHVF, read_BTHP, scores_BMGLL, y_BTHP, *x_BTHP.stride(), COLUMNS=COLUMNS, **heads
        )
        ctx.save_for_backward(*inputs[:6], vectors_BHVF, decays_BMH, states_BZHPN, read_BTHP, scores_BMGLL)
        ctx.least_log_decay, ctx.groups, ctx.heads = least_log_decay, groups, heads
        return y_BTHP, end_BHPN

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, D_H, vectors_BHVF, *forward = ctx.saved_tensors
        decays_BMH, states_BZHPN, read_BTHP, scores_BMGLL = forward
        dy_BTHP, dend_BHPN = grads
        (B, M, H), (G, N), P, F = decays_BMH.shape, B_BTGN.shape[2:], x_BTHP.shape[3], vectors_BHVF.shape[3]
        from_start_BHF, dt_to_end_BHF = vectors_BHVF[:, :, 0], vectors_BHVF[:, :, 1]
        dstates_BZHPN, dstate_BHPN = _states(
            dy_BTHP, from_start_BHF, C_BTGN, decays_BMH, dend_BHPN, dict(SLOT=0, **ctx.groups)
        )
        given_BTHP, products_BMHP = torch.empty_like(read_BTHP), A_H.new_empty(B, M, H, P)
        _read_kernel[(triton.cdiv(H // G * P, CHANNELS), M, B * G)](
            B_BTGN, dstates_BZHPN, given_BTHP, states_BZHPN, products_BMHP, *B_BTGN.stride(),
            SLOT=1, maxnreg=READ_REGISTERS, **ctx.groups,
        )  # fmt: skip
        weights_BMGLL, crossing_BHF = torch.empty_like(scores_BMGLL), A_H.new_empty(B, H, F)
        strides = (*x_BTHP.stride(), *dy_BTHP.stride())
        _weights_kernel[(M, B * G)](
            x_BTHP, vectors_BHVF, scores_BMGLL, dy_BTHP, weights_BMGLL, crossing_BHF, *strides, **ctx.heads
        )
        dx_BTHP, ddt_BTH, dB_BTGN, dC_BTGN = (x.new_empty(x.shape) for x in (x_BTHP, dt_BTH, B_BTGN, C_BTGN))
        dAD_2HBM = A_H.new_empty(2, H, B, M)
        _inside_kernel[(H, M, B)](
            x_BTHP, A_H, D_H, vectors_BHVF, decays_BMH, read_BTHP, scores_BMGLL, dy_BTHP, given_BTHP, products_BMHP,
            crossing_BHF, dx_BTHP, ddt_BTH, dAD_2HBM[0], dAD_2HBM[1], *strides,
            COLUMNS=COLUMNS, LEAST=ctx.least_log_decay, **ctx.heads,
        )  # fmt: skip
        grid = (triton.cdiv(N, STATES), M, B * G)
        _shared_kernel[grid](
            dy_BTHP, from_start_BHF, states_BZHPN, weights_BMGLL, B_BTGN, dC_BTGN,
            *dy_BTHP.stride(), *B_BTGN.stride(), SLOT=0, maxnreg=SHARED_REGISTERS, **ctx.groups,
        )  # fmt: skip
        _shared_kernel[grid](
            x_BTHP, dt_to_end_BHF, dstates_BZHPN, weights_BMGLL, C_BTGN, dB_BTGN,
            *x_BTHP.stride(), *C_BTGN.stride(), SLOT=1, maxnreg=SHARED_REGISTERS, **ctx.groups,
        )  # fmt: skip
        dA_H, dD_H = sum_blocks(dAD_2HBM)
        return None, dx_BTHP, ddt_BTH, dA_H, dB_BTGN, dC_BTGN, dD_H, dstate_BHPN


def ssd_wide(
    x_BTHP: Tensor,
    dt_BTH: Tensor,
    A_H: Tensor,
    B_BTGN: Tensor,
    C_BTGN: Tensor,
    D_H: Tensor,
    state_BHPN: Tensor,
    *,
    least_log_decay: float,
) -> tuple[Tensor, Tensor]:
    """`ssm_asr.ssm.kernels.ssd.ssd_kernel`, faster where N is large and heads share B and C.

    Args:
        least_log_decay: to which dt·A is clamped.
    """
    y_BTHP, end_BHPN = _Ssd.apply(least_log_decay, x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, D_H, state_BHPN)
    return y_BTHP, end_BHPN
