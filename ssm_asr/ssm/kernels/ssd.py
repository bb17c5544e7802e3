"""Mamba-2's state-space operation as two Triton kernels, forward and backward.

Source: Dao and Gu (arXiv 2405.21060), section 6; the equations are those of ssm_asr.ssm.mamba2.ssd_chunked. One program
takes one head of one sequence through all blocks of L frames, with the state in registers. Every result but the
gradients of B and C is a sum over the states: where there are many, a program takes a part of them. The forward pass
keeps the states at the starts of the blocks for the backward pass.

With a_t the sum of dt·A from the block's start to t, E_ts = exp(a_t - a_s) for t >= s, S and S' the states at the start
and end of a block, and dS' the gradient that comes from later blocks:

    u_s  = Σ_t E_ts·(C_t·B_s)·dy_t + exp(a_L - a_s)·dS'·B_s
    dx_s = dt_s·u_s + D·dy_s
    dC_t = Σ_s E_ts·dt_s·(dy_t·x_s)·B_s + exp(a_t)·Sᵀ·dy_t
    dB_s = Σ_t E_ts·dt_s·(dy_t·x_s)·C_t + exp(a_L - a_s)·dt_s·dS'ᵀ·x_s
    dS   = exp(a_L)·dS' + Σ_t exp(a_t)·dy_t ⊗ C_t

The gradient of dt_τ·A is Σ K_ts over s < τ <= t, with K_ts = E_ts·(C_t·B_s)·dt_s·(dy_t·x_s), the same for what comes
from S (every s) and what goes to S' (every t), and exp(a_L)·⟨dS', S⟩, which goes from one to the other.

Shapes: B batch, T frames, H heads, P channels a head, G groups, N states, M blocks of L frames, S parts of the states.
P and N are filled up to powers of 2.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Larger tiles need more registers than there are, and more warps a program wait for each other.
BLOCK_FRAMES = 16
MOST_STATE = 512  # P·N of a program


@triton.jit
def _load(base, stride_t, stride_c, t, c, t_mask, c_mask):  # type: ignore[no-untyped-def]
    pointers = base + t[:, None] * stride_t + c[None, :] * stride_c
    return tl.load(pointers, mask=t_mask[:, None] & c_mask[None, :], other=0.0).to(tl.float32)


@triton.jit
def _add(a, b):  # type: ignore[no-untyped-def]
    return a + b


@triton.jit
def _decays(dt_ptr, A, t, t_mask, stride_t, least: tl.constexpr):  # type: ignore[no-untyped-def]
    """dt, dt·A, its sums from the block's start, their last, and E_ts with zeros above the diagonal."""
    dt = tl.load(dt_ptr + t * stride_t, mask=t_mask, other=0.0).to(tl.float32)
    dtA = dt * A
    clamped = tl.maximum(dtA, least)
    a = tl.cumsum(clamped, axis=0)
    last = tl.sum(clamped, axis=0)
    i = tl.arange(0, dt.shape[0])
    causal = i[:, None] >= i[None, :]
    between = tl.where(causal, tl.exp(tl.where(causal, a[:, None] - a[None, :], 0.0)), 0.0)
    return dt, dtA, a, last, between


@triton.jit
def _forward_kernel(  # type: ignore[no-untyped-def]
    x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, state_ptr,
    y_ptr, starts_ptr, end_ptr,
    x_b, x_t, x_h, x_p, dt_b, dt_t, dt_h, B_b, B_t, B_g, B_n, C_b, C_t, C_g, C_n,
    T, M, H: tl.constexpr, P: tl.constexpr, N: tl.constexpr, heads_a_group: tl.constexpr,
    P_PAD: tl.constexpr, N_PART: tl.constexpr, L: tl.constexpr, LEAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    b, h = tl.program_id(0) // H, tl.program_id(0) % H
    g, part = h // heads_a_group, tl.program_id(1)
    p, n, i = tl.arange(0, P_PAD), part * N_PART + tl.arange(0, N_PART), tl.arange(0, L)
    p_mask, n_mask = p < P, n < N
    pn_mask = p_mask[:, None] & n_mask[None, :]
    pn = p[:, None] * N + n[None, :]
    A, D = tl.load(A_ptr + h), tl.where(part == 0, tl.load(D_ptr + h), 0.0)
    rows = part * (tl.num_programs(0) // H) * T  # of the results of the parts before
    state = tl.load(state_ptr + (b * H + h) * P * N + pn, mask=pn_mask, other=0.0)
    m = 0
    while m < M:  # Triton's interpreter cannot take a number of steps for a range with present versions of numpy
        t = m * L + i
        t_mask = t < T
        x = _load(x_ptr + b * x_b + h * x_h, x_t, x_p, t, p, t_mask, p_mask)
        B = _load(B_ptr + b * B_b + g * B_g, B_t, B_n, t, n, t_mask, n_mask)
        C = _load(C_ptr + b * C_b + g * C_g, C_t, C_n, t, n, t_mask, n_mask)
        dt, _, a, last, between = _decays(dt_ptr + b * dt_b + h * dt_h, A, t, t_mask, dt_t, LEAST)
        tl.store(starts_ptr + ((b * M + m) * H + h) * P * N + pn, state, mask=pn_mask)
        scores = tl.dot(C, tl.trans(B), input_precision=PRECISION) * between * dt[None, :]
        y = tl.dot(scores, x, input_precision=PRECISION) + D * x
        y += tl.dot(C, tl.trans(state), input_precision=PRECISION) * tl.exp(a)[:, None]
        y_pointers = y_ptr + ((rows + b * T + t)[:, None] * H + h) * P + p[None, :]
        tl.store(y_pointers, y, mask=t_mask[:, None] & p_mask[None, :])
        weighted = x * (dt * tl.exp(last - a))[:, None]
        state = tl.exp(last) * state + tl.dot(tl.trans(weighted), B, input_precision=PRECISION)
        m += 1
    tl.store(end_ptr + (b * H + h) * P * N + pn, state, mask=pn_mask)


@triton.jit
def _backward_kernel(  # type: ignore[no-untyped-def]
    x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, starts_ptr, dy_ptr, dend_ptr,
    dx_ptr, ddt_ptr, dB_ptr, dC_ptr, dA_ptr, dD_ptr, dstate_ptr,
    x_b, x_t, x_h, x_p, dt_b, dt_t, dt_h, B_b, B_t, B_g, B_n, C_b, C_t, C_g, C_n, dy_b, dy_t, dy_h, dy_p,
    T, M, H: tl.constexpr, P: tl.constexpr, N: tl.constexpr, heads_a_group: tl.constexpr,
    P_PAD: tl.constexpr, N_PART: tl.constexpr, L: tl.constexpr, LEAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    b, h = tl.program_id(0) // H, tl.program_id(0) % H
    g, part = h // heads_a_group, tl.program_id(1)
    p, n, i = tl.arange(0, P_PAD), part * N_PART + tl.arange(0, N_PART), tl.arange(0, L)
    p_mask, n_mask = p < P, n < N
    pn_mask = p_mask[:, None] & n_mask[None, :]
    pn = p[:, None] * N + n[None, :]
    A, D = tl.load(A_ptr + h), tl.where(part == 0, tl.load(D_ptr + h), 0.0)
    rows = part * (tl.num_programs(0) // H) * T  # of the results of the parts before
    dstate = tl.load(dend_ptr + (b * H + h) * P * N + pn, mask=pn_mask, other=0.0)
    dA, dD = 0.0, 0.0
    m = M - 1
    while m >= 0:
        t = m * L + i
        t_mask = t < T
        x = _load(x_ptr + b * x_b + h * x_h, x_t, x_p, t, p, t_mask, p_mask)
        dy = _load(dy_ptr + b * dy_b + h * dy_h, dy_t, dy_p, t, p, t_mask, p_mask)
        B = _load(B_ptr + b * B_b + g * B_g, B_t, B_n, t, n, t_mask, n_mask)
        C = _load(C_ptr + b * C_b + g * C_g, C_t, C_n, t, n, t_mask, n_mask)
        dt, dtA, a, last, between = _decays(dt_ptr + b * dt_b + h * dt_h, A, t, t_mask, dt_t, LEAST)
        state = tl.load(starts_ptr + ((b * M + m) * H + h) * P * N + pn, mask=pn_mask, other=0.0)
        from_start, to_end = tl.exp(a), tl.exp(last - a)

        products = tl.dot(C, tl.trans(B), input_precision=PRECISION)
        decayed = products * between
        weights = tl.dot(dy, tl.trans(x), input_precision=PRECISION) * between * dt[None, :]
        sent = tl.dot(B, tl.trans(dstate), input_precision=PRECISION) * to_end[:, None]
        u = tl.dot(tl.trans(decayed), dy, input_precision=PRECISION) + sent
        read = tl.dot(dy, state, input_precision=PRECISION) * from_start[:, None]
        dC = tl.dot(weights, B, input_precision=PRECISION) + read
        weighted = x * (dt * to_end)[:, None]
        dB = tl.dot(tl.trans(weights), C, input_precision=PRECISION)
        dB += tl.dot(weighted, dstate, input_precision=PRECISION)

        earlier = i[:, None] > i[None, :]
        inside = tl.where(earlier, weights * products, 0.0)
        arrived = tl.sum(inside, axis=1) - tl.sum(inside, axis=0) + tl.sum(read * C, axis=1)
        passed = dt * tl.sum(x * sent, axis=1)
        # Not a running sum less its last term: that one is the largest by far where decays are fast.
        ddtA = tl.sum(tl.where(earlier, passed[None, :], 0.0), axis=1)
        ddtA += tl.associative_scan(arrived, 0, _add, reverse=True)
        ddtA += tl.exp(last) * tl.sum(dstate * state)
        ddtA = tl.where((dtA >= LEAST) & t_mask, ddtA, 0.0)
        dA += tl.sum(ddtA * dt, axis=0)
        dD += tl.where(part == 0, tl.sum(dy * x), 0.0)

        row = (b * T + t) * H + h
        tl.store(ddt_ptr + rows * H + row, ddtA * A + tl.sum(x * u, axis=1), mask=t_mask)
        dx = dt[:, None] * u + D * dy
        tl.store(dx_ptr + (rows * H + row)[:, None] * P + p[None, :], dx, mask=t_mask[:, None] & p_mask[None, :])
        tn_mask = t_mask[:, None] & n_mask[None, :]
        tl.store(dB_ptr + row[:, None] * N + n[None, :], dB, mask=tn_mask)
        tl.store(dC_ptr + row[:, None] * N + n[None, :], dC, mask=tn_mask)
        from_outputs = tl.trans(dy * from_start[:, None])
        dstate = tl.exp(last) * dstate + tl.dot(from_outputs, C, input_precision=PRECISION)
        m -= 1
    sequences = part * tl.num_programs(0)
    tl.store(dA_ptr + sequences + b * H + h, dA)
    tl.store(dD_ptr + sequences + b * H + h, dD)
    tl.store(dstate_ptr + (b * H + h) * P * N + pn, dstate, mask=pn_mask)


def _sizes(x_BTHP: Tensor, B_BTGN: Tensor, least_log_decay: float) -> dict[str, Any]:
    """The constants of both kernels."""
    _, T, H, P = x_BTHP.shape
    G, N = B_BTGN.shape[2:]
    P_pad = max(16, triton.next_power_of_2(P))
    N_part = min(MOST_STATE // P_pad, max(16, triton.next_power_of_2(N)))
    return dict(
        T=T,
        M=triton.cdiv(T, BLOCK_FRAMES),
        H=H,
        P=P,
        N=N,
        heads_a_group=H // G,
        P_PAD=P_pad,
        N_PART=N_part,
        L=BLOCK_FRAMES,
        LEAST=least_log_decay,
        PRECISION="tf32x3",  # as exact as float32, on the matrix units
        num_warps=1 if N_part == 16 else 2,
        num_stages=1,
    )


class _Ssd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, least_log_decay: float, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, D_H, state_BHPN = inputs
        sizes = _sizes(x_BTHP, B_BTGN, least_log_decay)
        (B, T, H, P), N = x_BTHP.shape, sizes["N"]
        parts = triton.cdiv(N, sizes["N_PART"])
        y_SBTHP = x_BTHP.new_empty(parts, B, T, H, P)
        starts_BMHPN = x_BTHP.new_empty(B, sizes["M"], H, P, N)
        end_BHPN = torch.empty_like(state_BHPN, memory_format=torch.contiguous_format)
        strides = [s for x in (x_BTHP, dt_BTH, B_BTGN, C_BTGN) for s in x.stride()]
        _forward_kernel[(B * H, parts)](
            x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, D_H, state_BHPN.contiguous(),
            y_SBTHP, starts_BMHPN, end_BHPN, *strides, **sizes,
        )  # fmt: skip
        ctx.save_for_backward(x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, D_H, starts_BMHPN)
        ctx.sizes, ctx.parts = sizes, parts
        return _sum_of_parts(y_SBTHP), end_BHPN

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, D_H, starts_BMHPN = ctx.saved_tensors
        dy_BTHP, dend_BHPN = grads
        B, T, H, P = x_BTHP.shape
        G, N = B_BTGN.shape[2:]
        dx_SBTHP, ddt_SBTH = x_BTHP.new_empty(ctx.parts, B, T, H, P), x_BTHP.new_empty(ctx.parts, B, T, H)
        # Each head its own, summed over the heads of a group afterwards: atomic sums would differ from run to run.
        dBC_2BTHN = x_BTHP.new_empty(2, B, T, H, N)
        dAD_2BH = x_BTHP.new_empty(2, ctx.parts * B, H)
        dstate_BHPN = x_BTHP.new_empty(B, H, P, N)
        strides = [s for x in (x_BTHP, dt_BTH, B_BTGN, C_BTGN, dy_BTHP) for s in x.stride()]
        _backward_kernel[(B * H, ctx.parts)](
            x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, D_H, starts_BMHPN, dy_BTHP, dend_BHPN.contiguous(),
            dx_SBTHP, ddt_SBTH, dBC_2BTHN[0], dBC_2BTHN[1], dAD_2BH[0], dAD_2BH[1], dstate_BHPN, *strides, **ctx.sizes,
        )  # fmt: skip
        dB_BTGN, dC_BTGN = dBC_2BTHN.reshape(2, B, T, G, H // G, N).sum(dim=4)
        dA_H, dD_H = dAD_2BH.sum(dim=1)
        dx_BTHP, ddt_BTH = _sum_of_parts(dx_SBTHP), _sum_of_parts(ddt_SBTH)
        return None, dx_BTHP, ddt_BTH, dA_H, dB_BTGN, dC_BTGN, dD_H, dstate_BHPN


def _sum_of_parts(x_S: Tensor) -> Tensor:
    return x_S[0] if len(x_S) == 1 else x_S.sum(dim=0)


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
