"""Mamba-2's state-space operation in Triton kernels, forward and backward, with blocks of L frames in parallel.

Source: Dao and Gu (arXiv 2405.21060), section 6; the equations are those of ssm_asr.ssm.mamba2.ssd_chunked. With a_t
the sum of dt·A from the block's start to t, E_ts = exp(a_t - a_s) for t >= s, S and S' the states at the start and end
of a block, and dS and dS' their gradients, each direction takes three launches. The first makes what every block adds
to the state, or to its gradient; the second passes the states from block to block:

    S' = exp(a_L)·S + Σ_s exp(a_L - a_s)·dt_s·x_s ⊗ B_s
    dS = exp(a_L)·dS' + Σ_t exp(a_t)·dy_t ⊗ C_t

The third makes the results of every block:

    y_t  = Σ_s F_ts·x_s + exp(a_t)·S·C_t          with F_ts = E_ts·(C_t·B_s)·dt_s, and D more where t = s
    dx_s = Σ_t F_ts·dy_t + exp(a_L - a_s)·dt_s·dS'·B_s
    dC_t = Σ_heads Σ_s V_ts·dt_s·B_s + read_t     with V_ts = E_ts·(dy_t·x_s), read_t = exp(a_t)·Sᵀ·dy_t
    dB_s = Σ_heads dt_s·(Σ_t V_ts·C_t + given_s)  with given_s = exp(a_L - a_s)·dS'ᵀ·x_s

With K_ts = V_ts·(C_t·B_s), the gradient of dt_s is Σ_t K_ts + B_s·given_s, and A times that of dt_s·A. The gradient of
dt_τ·A is the sum of dt_s·K_ts over s < τ <= t, of C_t·read_t over t >= τ, and of dt_s·B_s·given_s over s < τ, and
exp(a_L)·⟨dS', S⟩.

A program of the first and third launch takes one block of one sequence, and the heads of one group in turn: so it makes
C·Bᵀ once, and sums dB and dC over the heads in a fixed order; V·dt is summed over them before it meets B and C.

Shapes: B batch, T frames, H heads, P channels a head, G groups, N states, M blocks of L frames, Z = M + 1 starts and
ends of blocks. P and N are filled up to powers of 2. Offsets inside a sequence fit in 32 bits.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Tiles(NamedTuple):
    block_frames: int  # in longer blocks there is more to do a frame, between them fewer states to write and read
    added_warps: int
    output_warps: int
    gradient_warps: int


# By P and N, filled up to powers of 2; LARGE_TILES for those that are not here.
TILES = {
    (16, 16): Tiles(16, 1, 1, 1),
    (16, 32): Tiles(16, 1, 1, 1),
    (16, 64): Tiles(16, 1, 1, 2),
    (16, 128): Tiles(16, 4, 2, 4),
    (32, 16): Tiles(16, 1, 1, 1),
    (32, 32): Tiles(16, 1, 1, 2),
    (32, 64): Tiles(16, 2, 2, 2),
}
LARGE_TILES = Tiles(16, 2, 4, 4)
PASS_BLOCKS, PASS_NUMBERS = 8, 128  # of the second launch: blocks it loads at once, and numbers of a state a program


@triton.jit
def _split(x):  # type: ignore[no-untyped-def]
    """x rounded to the 11 bits of tf32, and the rest."""
    high = ((x.to(tl.int32, bitcast=True) + 4096) & -8192).to(tl.float32, bitcast=True)
    return high, x - high


@triton.jit
def _dot(a, b):  # type: ignore[no-untyped-def]
    """a @ b as exact as in float32, on the matrix units: three tf32 products, without that of the rests."""
    a_high, a_low = _split(a)
    b_high, b_low = _split(b)
    product = tl.dot(a_low, b_high, input_precision="tf32")
    product = tl.dot(a_high, b_low, acc=product, input_precision="tf32")
    return tl.dot(a_high, b_high, acc=product, input_precision="tf32")


@triton.jit
def _load(base, stride_t, stride_c, i, c, i_mask, c_mask):  # type: ignore[no-untyped-def]
    pointers = base + (i[:, None] * stride_t + c[None, :] * stride_c)
    return tl.load(pointers, mask=i_mask[:, None] & c_mask[None, :], other=0.0).to(tl.float32)


@triton.jit
def _decays(dt_ptr, A, i, i_mask, stride_t, least: tl.constexpr):  # type: ignore[no-untyped-def]
    """dt, dt·A, exp(a_t), exp(a_L - a_t), exp(a_L), and a_t to base 2 as two sums, the first of them exact.

    Fast decays would otherwise leave no digits to the differences between the slow ones after them.
    """
    dt = tl.load(dt_ptr + i * stride_t, mask=i_mask, other=0.0).to(tl.float32)
    dtA = dt * A
    exponents = tl.maximum(dtA, least) * 1.4426950408889634
    coarse = tl.floor(exponents * 1024.0) * (1.0 / 1024.0)
    fine = exponents - coarse
    a, rest = tl.cumsum(coarse, axis=0), tl.cumsum(fine, axis=0)
    last, last_rest = tl.sum(coarse, axis=0), tl.sum(fine, axis=0)
    return dt, dtA, tl.exp2(a + rest), tl.exp2((last - a) + (last_rest - rest)), tl.exp2(last + last_rest), a, rest


@triton.jit
def _between(a, rest, i):  # type: ignore[no-untyped-def]
    """E_ts, with zeros above the diagonal."""
    exponents = (a[:, None] - a[None, :]) + (rest[:, None] - rest[None, :])
    return tl.exp2(tl.where(i[:, None] >= i[None, :], exponents, float("-inf")))


@triton.jit
def _added_kernel(  # type: ignore[no-untyped-def]
    x_ptr, dt_ptr, A_ptr, B_ptr, states_ptr, decays_ptr,
    x_b, x_t, x_h, x_p, dt_b, dt_t, dt_h, B_b, B_t, B_g, B_n,
    T, M, H: tl.constexpr, G: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
    P_PAD: tl.constexpr, N_PAD: tl.constexpr, L: tl.constexpr, LEAST: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """What a block adds to the state at its end; BACKWARD, with dy and C, to the gradient of the one at its start."""
    b, g, m = (tl.program_id(0) // G).to(tl.int64), tl.program_id(0) % G, tl.program_id(1)
    i, p, n = tl.arange(0, L), tl.arange(0, P_PAD), tl.arange(0, N_PAD)
    i_mask, p_mask, n_mask = i < T - m * L, p < P, n < N
    pn, pn_mask = p[:, None] * N + n[None, :], p_mask[:, None] & n_mask[None, :]
    B = _load(B_ptr + b * B_b + m * L * B_t + g * B_g, B_t, B_n, i, n, i_mask, n_mask)
    slot = m if BACKWARD else m + 1
    for r in range(H // G):
        h = g * (H // G) + r
        x = _load(x_ptr + b * x_b + m * L * x_t + h * x_h, x_t, x_p, i, p, i_mask, p_mask)
        dt, _, from_start, to_end, decay, _, _ = _decays(
            dt_ptr + b * dt_b + m * L * dt_t + h * dt_h, tl.load(A_ptr + h), i, i_mask, dt_t, LEAST
        )
        weights = from_start if BACKWARD else dt * to_end
        added = _dot(tl.trans(x * weights[:, None]), B)
        tl.store(states_ptr + ((b * (M + 1) + slot) * H + h) * P * N + pn, added, mask=pn_mask)
        tl.store(decays_ptr + (b * M + m) * H + h, decay)


@triton.jit
def _pass_kernel(  # type: ignore[no-untyped-def]
    states_ptr, decays_ptr, first_ptr, last_ptr,
    M, H: tl.constexpr, PN: tl.constexpr, BLOCKS: tl.constexpr, NUMBERS: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """From what blocks add to the states, in place: from the first block to the last, or BACKWARD."""
    b = tl.program_id(0).to(tl.int64)
    e = tl.program_id(1) * NUMBERS + tl.arange(0, NUMBERS)
    e_mask = e < H * PN
    states_ptr += b * (M + 1) * H * PN + e
    decays_ptr += b * M * H + e // PN
    state = tl.load(first_ptr + b * H * PN + e, mask=e_mask, other=0.0)
    tl.store(states_ptr + (M * H * PN if BACKWARD else 0), state, mask=e_mask)
    done = 0
    while done < M:  # Triton's interpreter cannot take a number of steps for a range with present versions of numpy
        loaded = ()  # those of several blocks at once, since no load depends on the states
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


@triton.jit
def _output_kernel(  # type: ignore[no-untyped-def]
    x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, states_ptr, y_ptr,
    x_b, x_t, x_h, x_p, dt_b, dt_t, dt_h, B_b, B_t, B_g, B_n, C_b, C_t, C_g, C_n,
    T, M, H: tl.constexpr, G: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
    P_PAD: tl.constexpr, N_PAD: tl.constexpr, L: tl.constexpr, LEAST: tl.constexpr,
):  # fmt: skip
    b, g, m = (tl.program_id(0) // G).to(tl.int64), tl.program_id(0) % G, tl.program_id(1)
    i, p, n = tl.arange(0, L), tl.arange(0, P_PAD), tl.arange(0, N_PAD)
    i_mask, p_mask, n_mask = i < T - m * L, p < P, n < N
    pn, pn_mask = p[:, None] * N + n[None, :], p_mask[:, None] & n_mask[None, :]
    B = _load(B_ptr + b * B_b + m * L * B_t + g * B_g, B_t, B_n, i, n, i_mask, n_mask)
    C = _load(C_ptr + b * C_b + m * L * C_t + g * C_g, C_t, C_n, i, n, i_mask, n_mask)
    products = _dot(C, tl.trans(B))
    diagonal = i[:, None] == i[None, :]
    for r in range(H // G):
        h = g * (H // G) + r
        x = _load(x_ptr + b * x_b + m * L * x_t + h * x_h, x_t, x_p, i, p, i_mask, p_mask)
        state = tl.load(states_ptr + ((b * (M + 1) + m) * H + h) * P * N + pn, mask=pn_mask, other=0.0)
        dt, _, from_start, _, _, a, rest = _decays(
            dt_ptr + b * dt_b + m * L * dt_t + h * dt_h, tl.load(A_ptr + h), i, i_mask, dt_t, LEAST
        )
        y = _dot(C, tl.trans(state)) * from_start[:, None]
        y += _dot(products * _between(a, rest, i) * dt[None, :] + tl.where(diagonal, tl.load(D_ptr + h), 0.0), x)
        y_pointers = y_ptr + ((b * T + m * L) * H + h) * P + (i[:, None] * (H * P) + p[None, :])
        tl.store(y_pointers, y, mask=i_mask[:, None] & p_mask[None, :])


@triton.jit
def _gradient_kernel(  # type: ignore[no-untyped-def]
    x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, states_ptr, dy_ptr, dstates_ptr,
    dx_ptr, ddt_ptr, dB_ptr, dC_ptr, dA_ptr, dD_ptr,
    x_b, x_t, x_h, x_p, dt_b, dt_t, dt_h, B_b, B_t, B_g, B_n, C_b, C_t, C_g, C_n, dy_b, dy_t, dy_h, dy_p,
    T, M, H: tl.constexpr, G: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
    P_PAD: tl.constexpr, N_PAD: tl.constexpr, L: tl.constexpr, LEAST: tl.constexpr, BY_DOT: tl.constexpr,
):  # fmt: skip
    b, g, m = (tl.program_id(0) // G).to(tl.int64), tl.program_id(0) % G, tl.program_id(1)
    i, p, n = tl.arange(0, L), tl.arange(0, P_PAD), tl.arange(0, N_PAD)
    i_mask, p_mask, n_mask = i < T - m * L, p < P, n < N
    pn, pn_mask = p[:, None] * N + n[None, :], p_mask[:, None] & n_mask[None, :]
    B = _load(B_ptr + b * B_b + m * L * B_t + g * B_g, B_t, B_n, i, n, i_mask, n_mask)
    C = _load(C_ptr + b * C_b + m * L * C_t + g * C_g, C_t, C_n, i, n, i_mask, n_mask)
    products = _dot(C, tl.trans(B))
    weights = tl.zeros([L, L], tl.float32)
    dB, dC = tl.zeros([L, N_PAD], tl.float32), tl.zeros([L, N_PAD], tl.float32)
    earlier, diagonal, above = i[:, None] > i[None, :], i[:, None] == i[None, :], i[:, None] < i[None, :]
    later = above.to(tl.float32)
    for r in range(H // G):
        h = g * (H // G) + r
        A, D = tl.load(A_ptr + h), tl.load(D_ptr + h)
        x = _load(x_ptr + b * x_b + m * L * x_t + h * x_h, x_t, x_p, i, p, i_mask, p_mask)
        dy = _load(dy_ptr + b * dy_b + m * L * dy_t + h * dy_h, dy_t, dy_p, i, p, i_mask, p_mask)
        start = ((b * (M + 1) + m) * H + h) * P * N
        state = tl.load(states_ptr + start + pn, mask=pn_mask, other=0.0)
        dstate = tl.load(dstates_ptr + start + H * P * N + pn, mask=pn_mask, other=0.0)
        dt, dtA, from_start, to_end, decay, a, rest = _decays(
            dt_ptr + b * dt_b + m * L * dt_t + h * dt_h, A, i, i_mask, dt_t, LEAST
        )
        between = _between(a, rest, i)

        pairs = _dot(dy, tl.trans(x)) * between
        weights += pairs * dt[None, :]
        mixing = products * between * dt[None, :] + tl.where(diagonal, D, 0.0)
        dx = _dot(B, tl.trans(dstate)) * (dt * to_end)[:, None] + _dot(tl.trans(mixing), dy)
        read = _dot(dy, state) * from_start[:, None]
        dC += read
        given = _dot(x, dstate) * to_end[:, None]
        dB += given * dt[:, None]

        both = pairs * products
        passed, arrived = dt * tl.sum(given * B, axis=1), tl.sum(read * C, axis=1)
        # Sums of sums, not differences of them: where decays are fast, these would leave only rounding errors.
        if BY_DOT:  # which several warps would all do
            high, low = _split(both * dt[None, :])
            crossing = tl.dot(low, later, acc=tl.broadcast_to(arrived[:, None], L, L), input_precision="tf32")
            crossing = tl.dot(high, later, acc=crossing, input_precision="tf32")
            ddtA = tl.sum(tl.where(above, passed[:, None], crossing), axis=0)
        else:
            crossing = tl.cumsum(both * dt[None, :], axis=0, reverse=True)
            ddtA = tl.sum(tl.where(earlier, crossing + passed[None, :], arrived[None, :]), axis=1)
        ddtA += decay * tl.sum(dstate * state)
        ddtA = tl.where((dtA >= LEAST) & i_mask, ddtA, 0.0)

        row = (b * T + m * L) * H + h
        ddt = ddtA * A + tl.sum(both, axis=0) + tl.sum(given * B, axis=1)
        tl.store(ddt_ptr + row + i * H, ddt, mask=i_mask)
        dx_pointers = dx_ptr + row * P + (i[:, None] * (H * P) + p[None, :])
        tl.store(dx_pointers, dx, mask=i_mask[:, None] & p_mask[None, :])
        block = (h * (tl.num_programs(0) // G) + b) * M + m
        tl.store(dA_ptr + block, tl.sum(ddtA * dt, axis=0))
        tl.store(dD_ptr + block, tl.sum(tl.where(diagonal, pairs, 0.0)))
    dC += _dot(weights, B)
    dB += _dot(tl.trans(weights), C)
    start = ((b * T + m * L) * G + g) * N
    in_mask, offsets = i_mask[:, None] & n_mask[None, :], i[:, None] * (G * N) + n[None, :]
    tl.store(dB_ptr + start + offsets, dB, mask=in_mask)
    tl.store(dC_ptr + start + offsets, dC, mask=in_mask)


def _sizes(x_BTHP: Tensor, B_BTGN: Tensor, least_log_decay: float) -> tuple[Tiles, dict[str, Any]]:
    """The tiles, and the constants of the kernels of blocks."""
    _, T, H, P = x_BTHP.shape
    G, N = B_BTGN.shape[2:]
    P_pad, N_pad = max(16, triton.next_power_of_2(P)), max(16, triton.next_power_of_2(N))
    tiles = TILES.get((P_pad, N_pad), LARGE_TILES)
    L = tiles.block_frames
    return tiles, dict(
        T=T, M=triton.cdiv(T, L), H=H, G=G, P=P, N=N, P_PAD=P_pad, N_PAD=N_pad, L=L, LEAST=least_log_decay, num_stages=1
    )  # fmt: skip


def _states(
    x_BTHP: Tensor,
    dt_BTH: Tensor,
    A_H: Tensor,
    B_BTGN: Tensor,
    first_BHPN: Tensor,
    warps: int,
    sizes: dict[str, Any],
    *,
    backward: bool,
) -> tuple[Tensor, Tensor]:
    """The states at the starts and ends of all blocks, and the one after the last; backward, their gradients."""
    (B, _, H, P), (G, N), M = x_BTHP.shape, B_BTGN.shape[2:], sizes["M"]
    states_BZHPN = first_BHPN.new_empty(B, M + 1, H, P, N)
    decays_BMH = first_BHPN.new_empty(B, M, H)
    last_BHPN = first_BHPN.new_empty(B, H, P, N)
    _added_kernel[(B * G, M)](
        x_BTHP, dt_BTH, A_H, B_BTGN, states_BZHPN, decays_BMH,
        *x_BTHP.stride(), *dt_BTH.stride(), *B_BTGN.stride(), **sizes, BACKWARD=backward, num_warps=warps,
    )  # fmt: skip
    _pass_kernel[(B, triton.cdiv(H * P * N, PASS_NUMBERS))](
        states_BZHPN, decays_BMH, first_BHPN.contiguous(), last_BHPN,
        M, H=H, PN=P * N, BLOCKS=PASS_BLOCKS, NUMBERS=PASS_NUMBERS, BACKWARD=backward, num_warps=1,
    )  # fmt: skip
    return states_BZHPN, last_BHPN


class _Ssd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, least_log_decay: float, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, D_H, state_BHPN = inputs
        tiles, sizes = _sizes(x_BTHP, B_BTGN, least_log_decay)
        states_BZHPN, end_BHPN = _states(
            x_BTHP, dt_BTH, A_H, B_BTGN, state_BHPN, tiles.added_warps, sizes, backward=False
        )
        y_BTHP = state_BHPN.new_empty(x_BTHP.shape)
        strides = [s for x in (x_BTHP, dt_BTH, B_BTGN, C_BTGN) for s in x.stride()]
        _output_kernel[(len(x_BTHP) * sizes["G"], sizes["M"])](
            x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, D_H, states_BZHPN, y_BTHP,
            *strides, **sizes, num_warps=tiles.output_warps,
        )  # fmt: skip
        ctx.save_for_backward(x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, D_H, states_BZHPN)
        ctx.tiles, ctx.sizes = tiles, sizes
        return y_BTHP, end_BHPN

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, D_H, states_BZHPN = ctx.saved_tensors
        dy_BTHP, dend_BHPN = grads
        B, H, M = len(x_BTHP), len(A_H), ctx.sizes["M"]
        dstates_BZHPN, dstate_BHPN = _states(
            dy_BTHP, dt_BTH, A_H, C_BTGN, dend_BHPN, ctx.tiles.added_warps, ctx.sizes, backward=True
        )
        dx_BTHP, ddt_BTH = (x.new_empty(x.shape) for x in (x_BTHP, dt_BTH))
        dB_BTGN, dC_BTGN = (x.new_empty(x.shape) for x in (B_BTGN, C_BTGN))
        dAD_2HBM = A_H.new_empty(2, H, B, M)
        strides = [s for x in (x_BTHP, dt_BTH, B_BTGN, C_BTGN, dy_BTHP) for s in x.stride()]
        _gradient_kernel[(B * ctx.sizes["G"], M)](
            x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, D_H, states_BZHPN, dy_BTHP, dstates_BZHPN,
            dx_BTHP, ddt_BTH, dB_BTGN, dC_BTGN, dAD_2HBM[0], dAD_2HBM[1],
            *strides, **ctx.sizes, BY_DOT=ctx.tiles.gradient_warps == 1, num_warps=ctx.tiles.gradient_warps,
        )  # fmt: skip
        dA_H, dD_H = dAD_2HBM.sum(dim=(2, 3))
        return None, dx_BTHP, ddt_BTH, dA_H, dB_BTGN, dC_BTGN, dD_H, dstate_BHPN


def ssd_kernel(
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
    """`ssm_asr.ssm.mamba2.ssd` on a GPU, for float32 inputs of any strides.

    Args:
        least_log_decay: to which dt·A is clamped.
    """
    y_BTHP, end_BHPN = _Ssd.apply(least_log_decay, x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, D_H, state_BHPN)
    return y_BTHP, end_BHPN
