"""These kernels compute Mamba-2's state-space operation for large states and many heads per group, with long blocks.

Source: Dao and Gu, "Transformers are SSMs" (arXiv 2405.21060), section 6. Equations and letters are as in
ssm_asr.ops.ssd_kernel, where one program computes everything for a short block. Here short blocks have K = 16 frames,
and form long blocks of L frames. Terms with both frames in one short block are computed for one head after another, in
ssm_asr.ops.ssd_wide_heads_kernel; they do not involve N. All other terms are matrix products in which the heads of a
group form one matrix of Q columns. Let a_t count from the start of the short block, and let D = exp(a_K), x̂_s =
exp(a_K - a_s)·dt_s·x_s and d̂_t = exp(a_t)·dy_t for each head. Then

    S' = D·S + x̂ᵀ·B            dS = D·dS' + d̂ᵀ·C            from one short block to the next
    read = C·Sᵀ                given = B·dS'ᵀ               for y times exp(a_t), for dx times exp(a_K - a_s)·dt_s
    dC = d̂·S + W·B             dB = x̂·dS' + Wᵀ·C            with W_ts = Σ_heads V_ts·dt_s
    faded = D·Σ_n dS'·S        Σ_p d̂·read                   Σ_p x̂·given                 for the gradients of dt

S and dS exist only at the ends of long blocks, where they are passed on. Inside a long block, a short block i and a
later one j interact by matrices of frames by frames:

    read_t += (C·Bᵀ)_ts·E·x̂_s      given_s += (C·Bᵀ)_ts·E·d̂_t      W_ts = d̂_t·E·x̂_s      with E = D_(i+1) ··· D_(j-1)

Decays are applied before anything is summed, and nothing is subtracted. After fast decays, differences would leave
only rounding errors.

In these kernels SLOT says which state a long block reads or writes, 0 for the one at its start and 1 for the one at its
end. It also selects one of the two computations of a kernel.

Shapes: B batch, T frames, H heads, P channels of a head, G groups, Q = P·H / G channels of a group, N states, M long
blocks of L frames, J short blocks in a long one, Z = M + 1 starts and ends of long blocks, R pieces of a long block, E
= 3 products of D: for a short block, over the short blocks before it, and over the short blocks after it in its long
block. Offsets inside a sequence fit into 32 bits. Most programs are one warp, as ssm_asr.ops.products_kernel needs it.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssm_asr.ops import products_kernel as mm
from ssm_asr.ops.ssd_kernel import SIZES, _load, pass_on, sum_blocks
from ssm_asr.ops.ssd_wide_heads_kernel import _gradient_kernel, _output_kernel, _scale_kernel

BLOCK_FRAMES = 64
# The frames that a program takes at once: for `read`, for `given`, and for the gradients of B and C.
READ_FRAMES, GIVEN_FRAMES, SHARED_FRAMES = 32, 64, 32
# The channels of a group that it takes at once: for what blocks add, for `read`, for `given`, and for outputs.
ADDED_CHANNELS, READ_CHANNELS, GIVEN_CHANNELS, OUTPUT_CHANNELS = 48, 48, 16, 32
# The part of N that it takes at once: for what blocks add, for the gradients of B and C, and for products of B and C.
ADDED_STATES, SHARED_STATES, SCORES_STATES = 64, 64, 64


@triton.jit
def _zeros(COUNT: tl.constexpr, R: tl.constexpr):  # type: ignore[no-untyped-def]
    zeros = ()
    for _ in tl.static_range(COUNT):
        zeros += (tl.zeros([R, 16], tl.float32),)  # type: ignore[assignment]
    return zeros


@triton.jit(do_not_specialize=SIZES)
def _added_kernel(  # type: ignore[no-untyped-def]
    x_ptr, decays_ptr, B_ptr, states_ptr, B_b, B_t, B_g, B_n,
    T, M, G: tl.constexpr, Q: tl.constexpr, N: tl.constexpr, L: tl.constexpr,
    TILES: tl.constexpr, STATES: tl.constexpr, SLOT: tl.constexpr,
):  # fmt: skip
    """Computes what a long block adds to the state at its end, or with SLOT 0, from d̂ and C, to dS at its start."""
    PARTS: tl.constexpr = (Q + TILES * 16 - 1) // (TILES * 16)
    part, m, b, g = tl.program_id(0), tl.program_id(1), (tl.program_id(2) // G).to(tl.int64), tl.program_id(2) % G
    first_q, first_n = part % PARTS * TILES * 16, part // PARTS * STATES * 16
    i, c, c_order = mm.order(16), tl.arange(0, 16), mm.order(16)
    ones = mm.unit()
    x_ptr += ((b * T + m * L) * G + g) * Q
    B_ptr += b * B_b + m * L * B_t + g * B_g
    decays_ptr += (((b * M + m) * (L // 16) * 3 + 1 + SLOT) * G + g) * Q
    added = _zeros(TILES * STATES, 16)
    for j in range(L // 16):
        t = 16 * j + i
        t_mask = t < T - m * L
        x = ()
        for k in tl.static_range(TILES):
            q = first_q + k * 16 + c
            decays = tl.load(decays_ptr + j * 3 * G * Q + q, mask=q < Q, other=0.0)[None, :]
            high, low = mm.split(_load(x_ptr, G * Q, 1, t, q, t_mask, q < Q) * decays)
            # The sum is split again, because parts transposed on their own would move between registers at every use.
            turned = tl.dot(ones, mm.right(high), acc=mm.turned(low, ones), input_precision="tf32")
            x += mm.split(mm.left_again(turned))
        sums = ()
        for u in tl.static_range(STATES):
            n = first_n + u * 16 + c
            high, low = mm.split(_load(B_ptr, B_t, B_n, t, n, t_mask, n < N))
            high, low = mm.across(high, low, ones)
            for k in tl.static_range(TILES):
                sums += (mm.dot(x[2 * k], x[2 * k + 1], high, low, added[u * TILES + k]),)  # type: ignore[assignment]
        added = sums
    states_ptr += ((b * (M + 1) + m + SLOT) * G + g) * Q * N
    for u in tl.static_range(STATES):
        n = first_n + u * 16 + c
        for k in tl.static_range(TILES):
            q = first_q + k * 16 + c_order
            mask = (q < Q)[:, None] & (n < N)[None, :]
            tl.store(states_ptr + (q[:, None] * N + n[None, :]), mm.loaded(added[u * TILES + k]), mask=mask)


@triton.jit(do_not_specialize=SIZES)
def _scores_kernel(  # type: ignore[no-untyped-def]
    B_ptr, C_ptr, scores_ptr, scoresT_ptr, B_b, B_t, B_g, B_n, C_b, C_t, C_g, C_n,
    T, M, G: tl.constexpr, N: tl.constexpr, L: tl.constexpr, STATES: tl.constexpr,
):  # fmt: skip
    """Computes C·Bᵀ of a long block, and its transpose."""
    m, b, g, i = tl.program_id(0), (tl.program_id(1) // G).to(tl.int64), tl.program_id(1) % G, tl.arange(0, L)
    i_mask = i < T - m * L
    B_ptr += b * B_b + m * L * B_t + g * B_g
    C_ptr += b * C_b + m * L * C_t + g * C_g
    scores = tl.zeros([L, L], tl.float32)
    for start in range(0, N, STATES):
        n = start + tl.arange(0, STATES)
        B = _load(B_ptr, B_t, B_n, i, n, i_mask, n < N)
        scores += mm.product(_load(C_ptr, C_t, C_n, i, n, i_mask, n < N), tl.trans(B))
    start = ((b * M + m) * G + g) * L * L
    tl.store(scores_ptr + start + (i[:, None] * L + i[None, :]), scores)
    tl.store(scoresT_ptr + start + (i[:, None] + i[None, :] * L), scores)


@triton.jit
def _read_states(  # type: ignore[no-untyped-def]
    C_ptr, states_ptr, others_ptr, C_t, C_n, i, i_mask, part, piece,
    Q: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr, SLOT: tl.constexpr,
):  # fmt: skip
    """Returns C·Sᵀ of some frames for each tile of channels, and with SLOT 1 parts of Σ_n dS'·S (first frames only)."""
    c, c_order = tl.arange(0, 16), mm.order(16)
    reads, pairs = _zeros(TILES, ROWS), _zeros(TILES, 16)
    for start in range(0, N, 16):
        n = start + c
        high, low = mm.split(_load(C_ptr, C_t, C_n, i, n, i_mask, n < N))
        high, low = mm.left(high), mm.left(low)
        sums, products = (), ()
        for k in tl.static_range(TILES):
            q = (part * TILES + k) * 16 + c_order
            S = _load(states_ptr, N, 1, q, n, q < Q, n < N)
            S_high, S_low = mm.split(S)
            # Products are added outside the matrix units, which truncate sums instead of rounding: errors would grow.
            product = mm.dot(high, low, mm.right(S_high), mm.right(S_low), tl.zeros([ROWS, 16], tl.float32))
            sums += (reads[k] + product,)  # type: ignore[assignment]
            if SLOT == 1:
                other = _load(others_ptr, N, 1, q, n, (q < Q) & (piece == 0), n < N)
                products += (pairs[k] + S * other,)  # type: ignore[assignment]
        reads = sums
        if SLOT == 1:
            pairs = products
    return reads, pairs


@triton.jit(do_not_specialize=SIZES)
def _read_kernel(  # type: ignore[no-untyped-def]
    C_ptr, states_ptr, scores_ptr, x_ptr, decays_ptr, read_ptr, first_ptr, others_ptr, dy_ptr, faded_ptr,
    C_b, C_t, C_g, C_n,
    T, M, G: tl.constexpr, Q: tl.constexpr, N: tl.constexpr, L: tl.constexpr,
    ROWS: tl.constexpr, TILES: tl.constexpr, SLOT: tl.constexpr,
):  # fmt: skip
    """Computes `read` for some frames, and the part of it that comes from before the long block.

    With SLOT 1 it computes `given`, and `faded` for each channel. Then the arguments named C, x and dy are B, d̂ and x̂,
    and the scores have a row for each s.
    """
    J: tl.constexpr = L // 16
    PIECES: tl.constexpr = L // ROWS
    part, m, b, g = tl.program_id(0), tl.program_id(1), (tl.program_id(2) // G).to(tl.int64), tl.program_id(2) % G
    piece, part = part % PIECES, part // PIECES
    i, c, c_order, ones = piece * ROWS + mm.order(ROWS), tl.arange(0, 16), mm.order(16), mm.unit()
    # `own` is the short block that a row belongs to.
    i_mask, own = i < T - m * L, piece * (ROWS // 16) + tl.arange(0, ROWS)[:, None] // 16
    C_ptr += b * C_b + m * L * C_t + g * C_g
    states_ptr += ((b * (M + 1) + m + SLOT) * G + g) * Q * N
    if SLOT == 1:
        others_ptr += ((b * (M + 1) + m) * G + g) * Q * N
    row = ((b * T + m * L) * G + g) * Q
    decays_ptr += ((b * M + m) * J * 3 * G + g) * Q
    scores_ptr += ((b * M + m) * G + g) * L * L
    reads, pairs = _read_states(
        C_ptr, states_ptr, others_ptr, C_t, C_n, i, i_mask, part, piece, Q, N, ROWS, TILES, SLOT
    )
    # No load moves before an earlier store, so everything is loaded ahead.
    scores = ()
    for step in tl.static_range(J - 1):
        j = step if SLOT == 0 else J - 1 - step
        after = own > j if SLOT == 0 else own < j
        pointers = scores_ptr + i[:, None] * L + (16 * j + c)[None, :]
        scores += (tl.load(pointers, mask=after, other=0.0),)  # type: ignore[assignment]
    for k in tl.static_range(TILES):
        first, read = reads[k], reads[k]
        q, q_order = (part * TILES + k) * 16 + c, (part * TILES + k) * 16 + c_order
        q_mask, order_mask = q < Q, q_order < Q
        offsets, mask = row + i[:, None] * (G * Q) + q[None, :], i_mask[:, None] & q_mask[None, :]
        decays, xs, faded = (), (), ()
        for step in tl.static_range(J):
            j = step if SLOT == 0 else J - 1 - step
            decay = tl.load(decays_ptr + j * 3 * G * Q + q_order, mask=order_mask, other=0.0)
            decays += (decay,)  # type: ignore[assignment]
        for step in tl.static_range(J - 1):
            s = 16 * (step if SLOT == 0 else J - 1 - step) + c_order
            xs += (_load(x_ptr + row, G * Q, 1, s, q, s < T - m * L, q_mask),)  # type: ignore[assignment]
        if SLOT == 1:
            before = tl.load(decays_ptr + (own * 3 + 1) * (G * Q) + q[None, :], mask=mask, other=0.0)
            passed = tl.load(first_ptr + offsets, mask=mask, other=0.0)
            passed = mm.ordered(passed * tl.load(x_ptr + offsets, mask=mask, other=0.0) * before)
            others = mm.ordered(tl.load(dy_ptr + offsets, mask=mask, other=0.0))
            before_last = tl.load(decays_ptr + ((J - 1) * 3 + 1) * (G * Q) + q_order, mask=order_mask, other=0.0)
            faded_all = decays[0] * tl.sum(pairs[k], axis=1) * before_last  # type: ignore[misc]
        for step in tl.static_range(J):
            j = step if SLOT == 0 else J - 1 - step
            after = own > j if SLOT == 0 else own < j
            read *= tl.where(after, decays[step][None, :], 1.0)
            if SLOT == 1:
                arrived = others * read
                for u in tl.static_range(1, J - 1):
                    if u < J - 1 - step:
                        arrived *= tl.where(own < u, decays[J - 1 - u][None, :], 1.0)
                sums = tl.sum(tl.where(after, arrived, tl.where(own > j, passed, 0.0)), axis=0)
                faded += (faded_all + sums,)  # type: ignore[assignment]
            if step < J - 1:  # noqa: SIM102  the second condition is only known to the program
                if ((piece + 1) * ROWS > 16 * (j + 1)) if SLOT == 0 else (piece * ROWS < 16 * j):
                    high, low = mm.split(scores[step])
                    x_high, x_low = mm.split(xs[step])
                    x_high, x_low = mm.across(x_high, x_low, ones)
                    read = mm.dot(mm.left(high), mm.left(low), x_high, x_low, read)
        if SLOT == 0:
            tl.store(first_ptr + offsets, mm.loaded(first), mask=mask)
        else:
            for step in tl.static_range(J):
                block = ((b * M + m) * J + J - 1 - step) * PIECES + piece
                tl.store(faded_ptr + (block * G + g) * Q + q_order, faded[step], mask=order_mask)
        tl.store(read_ptr + offsets, mm.loaded(read), mask=mask)


@triton.jit(do_not_specialize=SIZES)
def _weights_kernel(  # type: ignore[no-untyped-def]
    x_ptr, dy_ptr, decays_ptr, weights_ptr, weightsT_ptr,
    T, M, G: tl.constexpr, Q: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """Computes W, and its transpose, of a short block with the later short blocks in its long block."""
    J: tl.constexpr = L // 16
    j, m, b, g = tl.program_id(0), tl.program_id(1), (tl.program_id(2) // G).to(tl.int64), tl.program_id(2) % G
    t, s, c = mm.order(L), 16 * j + mm.order(16), tl.arange(0, 16)
    own = tl.arange(0, L)[:, None] // 16
    row = ((b * T + m * L) * G + g) * Q
    decays_ptr += ((b * M + m) * J * 3 * G + g) * Q
    weights = tl.zeros([L, 16], tl.float32)
    for start in range(0, Q, 16):
        q = start + c
        dy = _load(dy_ptr + row, G * Q, 1, t, q, t < T - m * L, q < Q)
        for u in tl.static_range(1, J - 1):
            decay = tl.load(decays_ptr + u * 3 * G * Q + q, mask=q < Q, other=0.0)[None, :]
            dy *= tl.where((own > u) & (u > j), decay, 1.0)
        dy_high, dy_low = mm.split(dy)
        x_high, x_low = mm.split(_load(x_ptr + row, G * Q, 1, s, q, s < T - m * L, q < Q))
        zeros = tl.zeros([L, 16], tl.float32)  # added outside the matrix units, as in _read_states
        weights += mm.dot(mm.left(dy_high), mm.left(dy_low), mm.right(x_high), mm.right(x_low), zeros)
    start = ((b * M + m) * G + g) * L * L
    s = 16 * j + c[None, :]
    tl.store(weights_ptr + start + t[:, None] * L + s, mm.loaded(weights), mask=own > j)
    tl.store(weightsT_ptr + start + t[:, None] + s * L, mm.loaded(weights), mask=own > j)


@triton.jit(do_not_specialize=SIZES)
def _shared_kernel(  # type: ignore[no-untyped-def]
    dy_ptr, states_ptr, decays_ptr, weights_ptr, B_ptr, dC_ptr, B_b, B_t, B_g, B_n,
    T, M, G: tl.constexpr, Q: tl.constexpr, N: tl.constexpr, L: tl.constexpr,
    ROWS: tl.constexpr, TILES: tl.constexpr, SLOT: tl.constexpr,
):  # fmt: skip
    """Computes dC = d̂·S + W·B for some frames, or with SLOT 1 dB = x̂·dS' + Wᵀ·C."""
    J: tl.constexpr = L // 16
    PIECES: tl.constexpr = L // ROWS
    part, m, b, g = tl.program_id(0), tl.program_id(1), (tl.program_id(2) // G).to(tl.int64), tl.program_id(2) % G
    piece, part = part % PIECES, part // PIECES
    i, c, c_order, ones = piece * ROWS + mm.order(ROWS), tl.arange(0, 16), mm.order(16), mm.unit()
    i_mask, own = i < T - m * L, piece * (ROWS // 16) + tl.arange(0, ROWS)[:, None] // 16
    dy_ptr += ((b * T + m * L) * G + g) * Q
    decays_ptr += (((b * M + m) * J * 3 + 1 + SLOT) * G + g) * Q
    states_ptr += ((b * (M + 1) + m + SLOT) * G + g) * Q * N
    weights_ptr += ((b * M + m) * G + g) * L * L
    B_ptr += b * B_b + m * L * B_t + g * B_g
    dC = _zeros(TILES, ROWS)
    for start in range(0, Q, 16):
        q, q_order = start + c, start + c_order
        dy = _load(dy_ptr, G * Q, 1, i, q, i_mask, q < Q)
        dy *= tl.load(decays_ptr + own * (3 * G * Q) + q[None, :], mask=(q < Q)[None, :], other=0.0)
        high, low = mm.split(dy)
        high, low = mm.left(high), mm.left(low)
        sums = ()
        for k in tl.static_range(TILES):
            n = (part * TILES + k) * 16 + c
            S_high, S_low = mm.split(_load(states_ptr, N, 1, q_order, n, q_order < Q, n < N))
            S_high, S_low = mm.across(S_high, S_low, ones)
            sums += (dC[k] + mm.dot(high, low, S_high, S_low, tl.zeros([ROWS, 16], tl.float32)),)  # type: ignore[assignment]
        dC = sums
    for j in range(J):
        s = 16 * j + c_order
        after = own <= j if SLOT == 1 else own >= j
        high, low = mm.split(tl.load(weights_ptr + i[:, None] * L + (16 * j + c)[None, :], mask=after, other=0.0))
        high, low = mm.left(high), mm.left(low)
        sums = ()
        for k in tl.static_range(TILES):
            n = (part * TILES + k) * 16 + c
            B_high, B_low = mm.split(_load(B_ptr, B_t, B_n, s, n, s < T - m * L, n < N))
            B_high, B_low = mm.across(B_high, B_low, ones)
            sums += (mm.dot(high, low, B_high, B_low, dC[k]),)  # type: ignore[assignment]
        dC = sums
    dC_ptr += ((b * T + m * L) * G + g) * N
    for k in tl.static_range(TILES):
        n = (part * TILES + k) * 16 + c
        offsets = i[:, None] * (G * N) + n[None, :]
        tl.store(dC_ptr + offsets, mm.loaded(dC[k]), mask=i_mask[:, None] & (n < N)[None, :])


def _scaled(
    x_BTHP: Tensor,
    dt_BTH: Tensor,
    A_H: Tensor,
    heads: dict[str, Any],
    *,
    backward: bool,
    decays: Sequence[Tensor | None],
) -> Tensor:
    """Returns x̂, and writes products of decays into `decays`. Backward it returns d̂, and writes nothing."""
    B, T, H, P = x_BTHP.shape
    M, L = heads["M"], heads["L"]
    scaled_BTHP = A_H.new_empty(B, T, H, P)
    _scale_kernel[(L // 16, M, B)](
        x_BTHP, dt_BTH, A_H, scaled_BTHP, *decays, *x_BTHP.stride(), *dt_BTH.stride(), T, M, H=H, P=P, L=L,
        H_PAD=triton.next_power_of_2(H), P_PAD=triton.next_power_of_2(P), LEAST=heads["LEAST"], BACKWARD=backward,
        num_warps=4,
    )  # fmt: skip
    return scaled_BTHP


def _states(
    x_BTHP: Tensor,
    decays_BMJEHP: Tensor,
    B_BTGN: Tensor,
    decays_BMH: Tensor,
    first_BHPN: Tensor,
    groups: dict[str, Any],
    *,
    backward: bool,
) -> tuple[Tensor, Tensor]:
    """Returns the states at the starts and ends of long blocks and the last state, or backward their gradients."""
    (B, _, H, P), (G, N), M = x_BTHP.shape, B_BTGN.shape[2:], decays_BMH.shape[1]
    states_BZHPN = first_BHPN.new_empty(B, M + 1, H, P, N)
    _added_kernel[(triton.cdiv(groups["Q"], ADDED_CHANNELS) * triton.cdiv(N, ADDED_STATES), M, B * G)](
        x_BTHP, decays_BMJEHP, B_BTGN, states_BZHPN, *B_BTGN.stride(),
        N=N, TILES=ADDED_CHANNELS // 16, STATES=ADDED_STATES // 16, SLOT=0 if backward else 1, **groups,
    )  # fmt: skip
    return states_BZHPN, pass_on(states_BZHPN, decays_BMH, first_BHPN, backward=backward)


class _Ssd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, least_log_decay: float, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, D_H, state_BHPN = inputs
        (B, T, H, P), (G, N), L = x_BTHP.shape, B_BTGN.shape[2:], BLOCK_FRAMES
        M, J, Q = triton.cdiv(T, L), L // 16, H // G * P
        options = dict(T=T, M=M, G=G, L=L)
        groups = dict(Q=Q, num_warps=1, num_stages=2, **options)  # two stages: loops load one step ahead
        heads = dict(H=H, P=P, LEAST=least_log_decay, num_warps=1, num_stages=1, **options)

        decays_BMJEHP, decays_BMH = A_H.new_empty(B, M, J, 3, H, P), A_H.new_empty(B, M, H)
        scaled_BTHP = _scaled(x_BTHP, dt_BTH, A_H, heads, backward=False, decays=(decays_BMJEHP, decays_BMH))
        states_BZHPN, end_BHPN = _states(
            scaled_BTHP, decays_BMJEHP, B_BTGN, decays_BMH, state_BHPN, groups, backward=False
        )
        scores_BMGLL, scoresT_BMGLL = A_H.new_empty(B, M, G, L, L), A_H.new_empty(B, M, G, L, L)
        _scores_kernel[(M, B * G)](
            B_BTGN, C_BTGN, scores_BMGLL, scoresT_BMGLL, *B_BTGN.stride(), *C_BTGN.stride(),
            N=N, STATES=SCORES_STATES, num_warps=4, num_stages=1, **options,
        )  # fmt: skip
        read_BTHP, first_BTHP, y_BTHP = (A_H.new_empty(x_BTHP.shape) for _ in range(3))
        _read_kernel[(L // READ_FRAMES * triton.cdiv(Q, READ_CHANNELS), M, B * G)](
            C_BTGN, states_BZHPN, scores_BMGLL, scaled_BTHP, decays_BMJEHP, read_BTHP, first_BTHP, None, None, None,
            *C_BTGN.stride(), N=N, ROWS=READ_FRAMES, TILES=READ_CHANNELS // 16, SLOT=0, **groups,
        )  # fmt: skip
        _output_kernel[(J * triton.cdiv(Q, OUTPUT_CHANNELS), M, B * G)](
            x_BTHP, dt_BTH, A_H, D_H, read_BTHP, scores_BMGLL, y_BTHP, *x_BTHP.stride(), *dt_BTH.stride(),
            CHANNELS=OUTPUT_CHANNELS, **heads,
        )  # fmt: skip
        ctx.save_for_backward(
            *inputs[:6], decays_BMJEHP, decays_BMH, scaled_BTHP, states_BZHPN, read_BTHP, first_BTHP, scoresT_BMGLL
        )
        ctx.groups, ctx.heads = groups, heads
        return y_BTHP, end_BHPN

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, D_H, decays_BMJEHP, decays_BMH, *forward = ctx.saved_tensors
        scaled_BTHP, states_BZHPN, read_BTHP, first_BTHP, scoresT_BMGLL = forward
        dy_BTHP, dend_BHPN = grads
        (B, M, H), (G, N), P, groups, heads = decays_BMH.shape, B_BTGN.shape[2:], x_BTHP.shape[3], ctx.groups, ctx.heads
        L, Q = groups["L"], groups["Q"]
        J, R = L // 16, L // GIVEN_FRAMES
        dscaled_BTHP = _scaled(dy_BTHP, dt_BTH, A_H, heads, backward=True, decays=(None, None))
        dstates_BZHPN, dstate_BHPN = _states(
            dscaled_BTHP, decays_BMJEHP, C_BTGN, decays_BMH, dend_BHPN, groups, backward=True
        )
        given_BTHP, faded_BMJRHP = torch.empty_like(read_BTHP), A_H.new_empty(B, M, J, R, H, P)
        _read_kernel[(R * triton.cdiv(Q, GIVEN_CHANNELS), M, B * G)](
            B_BTGN, dstates_BZHPN, scoresT_BMGLL, dscaled_BTHP, decays_BMJEHP, given_BTHP, first_BTHP, states_BZHPN,
            scaled_BTHP, faded_BMJRHP, *B_BTGN.stride(),
            N=N, ROWS=GIVEN_FRAMES, TILES=GIVEN_CHANNELS // 16, SLOT=1, **groups,
        )  # fmt: skip
        dx_BTHP, ddt_BTH, dB_BTGN, dC_BTGN = (x.new_empty(x.shape) for x in (x_BTHP, dt_BTH, B_BTGN, C_BTGN))
        dAD_2HBM = A_H.new_empty(2, H, B, M * J)
        weights_BMGLL, weightsT_BMGLL = torch.empty_like(scoresT_BMGLL), torch.empty_like(scoresT_BMGLL)
        _gradient_kernel[(J, M, B * G)](
            x_BTHP, dt_BTH, A_H, D_H, read_BTHP, scoresT_BMGLL, dy_BTHP, given_BTHP, faded_BMJRHP,
            dx_BTHP, ddt_BTH, dAD_2HBM[0], dAD_2HBM[1], weights_BMGLL, weightsT_BMGLL,
            *x_BTHP.stride(), *dt_BTH.stride(), *dy_BTHP.stride(),
            P_PAD=max(16, triton.next_power_of_2(P)), PIECES=R, **heads,
        )  # fmt: skip
        _weights_kernel[(J - 1, M, B * G)](
            scaled_BTHP, dscaled_BTHP, decays_BMJEHP, weights_BMGLL, weightsT_BMGLL, **groups
        )
        grid = (L // SHARED_FRAMES * triton.cdiv(N, SHARED_STATES), M, B * G)
        tiles = dict(N=N, ROWS=SHARED_FRAMES, TILES=SHARED_STATES // 16)
        _shared_kernel[grid](
            dscaled_BTHP, states_BZHPN, decays_BMJEHP, weights_BMGLL, B_BTGN, dC_BTGN, *B_BTGN.stride(),
            SLOT=0, **tiles, **groups,
        )  # fmt: skip
        _shared_kernel[grid](
            scaled_BTHP, dstates_BZHPN, decays_BMJEHP, weightsT_BMGLL, C_BTGN, dB_BTGN, *C_BTGN.stride(),
            SLOT=1, **tiles, **groups,
        )  # fmt: skip
        dA_H, dD_H = sum_blocks(dAD_2HBM)
        return None, dx_BTHP, ddt_BTH, dA_H, dB_BTGN, dC_BTGN, dD_H, dstate_BHPN


def ssd_wide(inputs: tuple[Tensor, ...], least_log_decay: float) -> tuple[Tensor, Tensor]:
    """Computes `ssm_asr.ops.ssd.ssd` by kernels, for float32 inputs with any strides.

    It is faster than `ssm_asr.ops.ssd_kernel.ssd_kernel` where N is large and heads share B and C,
    and takes the same arguments.
    """
    y_BTHP, end_BHPN = _Ssd.apply(least_log_decay, *inputs)
    return y_BTHP, end_BHPN
