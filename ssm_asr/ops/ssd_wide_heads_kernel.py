"""These kernels work inside short blocks of 16 frames for ssm_asr.ops.ssd_wide_kernel, one head or channel at a time.

That module explains the letters and the shapes.
"""

import triton
import triton.language as tl

from ssm_asr.ops import products_kernel as mm
from ssm_asr.ops.ssd_kernel import SIZES, _exponents, head_decays, head_gradients, upto_and_strict


@triton.jit(do_not_specialize=SIZES)
def _scale_kernel(  # type: ignore[no-untyped-def]
    x_ptr, dt_ptr, A_ptr, scaled_ptr, decays_ptr, block_decays_ptr, x_b, x_t, x_h, x_p, dt_b, dt_t, dt_h,
    T, M, H: tl.constexpr, P: tl.constexpr, H_PAD: tl.constexpr, P_PAD: tl.constexpr, L: tl.constexpr,
    LEAST: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """Computes x̂ of a short block, the products of D around it, and the decay of its long block; BACKWARD, only d̂."""
    j, m, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    i, h, p = tl.arange(0, 16)[:, None], tl.arange(0, H_PAD), tl.arange(0, P_PAD)
    t, h_mask, A = m * L + 16 * j + i, (h < H)[None, :], tl.load(A_ptr + h, mask=h < H, other=0.0)[None, :]
    dt_ptr += b * dt_b + h[None, :] * dt_h
    dt = tl.load(dt_ptr + t * dt_t, mask=(t < T) & h_mask, other=0.0).to(tl.float32)
    if BACKWARD:
        weights = tl.exp2(tl.cumsum(_exponents(dt, A, LEAST), axis=0))
    else:
        after = tl.load(dt_ptr + (t + 1) * dt_t, mask=(i < 15) & (t + 1 < T) & h_mask, other=0.0).to(tl.float32)
        weights = tl.exp2(tl.cumsum(_exponents(after, A, LEAST), axis=0, reverse=True)) * dt
        u = tl.arange(0, L)[:, None]
        dt = tl.load(dt_ptr + (m * L + u) * dt_t, mask=(u < T - m * L) & h_mask, other=0.0).to(tl.float32)
        exponents = _exponents(dt, A, LEAST)
        own = tl.exp2(tl.sum(tl.where(u // 16 == j, exponents, 0.0), axis=0))
        before = tl.exp2(tl.sum(tl.where(u // 16 < j, exponents, 0.0), axis=0))
        later = tl.exp2(tl.sum(tl.where(u // 16 > j, exponents, 0.0), axis=0))
        decays_ptr += ((b * M + m) * (L // 16) + j) * 3 * H * P + (h[:, None] * P + p[None, :])
        hp_mask, ones = (h < H)[:, None] & (p < P)[None, :], tl.full([H_PAD, P_PAD], 1.0, tl.float32)
        tl.store(decays_ptr, own[:, None] * ones, mask=hp_mask)
        tl.store(decays_ptr + H * P, before[:, None] * ones, mask=hp_mask)
        tl.store(decays_ptr + 2 * H * P, later[:, None] * ones, mask=hp_mask)
        all_ptr = block_decays_ptr + (b * M + m) * H + h
        tl.store(all_ptr, tl.exp2(tl.sum(exponents, axis=0)), mask=(h < H) & (j == 0))
    t, h, p = t[:, :, None], h[None, :, None], p[None, None, :]
    mask = (t < T) & (h < H) & (p < P)
    x = tl.load(x_ptr + b * x_b + t * x_t + h * x_h + p * x_p, mask=mask, other=0.0).to(tl.float32)
    tl.store(scaled_ptr + (b * T + t) * (H * P) + (h * P + p), x * weights[:, :, None], mask=mask)


@triton.jit(do_not_specialize=SIZES)
def _output_kernel(  # type: ignore[no-untyped-def]
    x_ptr, dt_ptr, A_ptr, D_ptr, read_ptr, scores_ptr, y_ptr, x_b, x_t, x_h, x_p, dt_b, dt_t, dt_h,
    T, M, H: tl.constexpr, G: tl.constexpr, P: tl.constexpr, L: tl.constexpr,
    LEAST: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Computes y of a short block for some channels, frame by frame.

    A thread keeps what a channel received in earlier frames of the block, and lets it decay.
    """
    Q: tl.constexpr = H // G * P
    PARTS: tl.constexpr = (Q + CHANNELS - 1) // CHANNELS
    part, m, b, g = tl.program_id(0), tl.program_id(1), (tl.program_id(2) // G).to(tl.int64), tl.program_id(2) % G
    j, part = part // PARTS, part % PARTS
    q = part * CHANNELS + tl.arange(0, CHANNELS)
    mask, h, p = q < Q, g * (H // G) + q // P, q % P
    first = m * L + 16 * j
    x_ptr += b * x_b + first * x_t + h * x_h + p * x_p
    dt_ptr += b * dt_b + first * dt_t + h * dt_h
    offsets = (b * T + first) * (H * P) + g * Q + q
    scores_ptr += ((b * M + m) * G + g) * L * L + 16 * j * (L + 1)
    A, D = tl.load(A_ptr + h, mask=mask, other=0.0), tl.load(D_ptr + h, mask=mask, other=0.0)
    xs, steps, reads = (), (), ()
    for t in tl.static_range(16):
        now = mask & (first + t < T)
        xs += (tl.load(x_ptr + t * x_t, mask=now, other=0.0).to(tl.float32),)  # type: ignore[assignment]
        steps += (tl.load(dt_ptr + t * dt_t, mask=now, other=0.0).to(tl.float32),)  # type: ignore[assignment]
        reads += (tl.load(read_ptr + offsets + t * (H * P), mask=now, other=0.0),)  # type: ignore[assignment]
    from_start = tl.full([CHANNELS], 1.0, tl.float32)
    kept, ys = (), ()
    for t in tl.static_range(16):
        decay = tl.exp2(_exponents(steps[t], A, LEAST))
        from_start *= decay
        faded = ()
        for s in tl.static_range(t):
            faded += (kept[s] * decay,)  # type: ignore[assignment]
        kept = faded
        kept += (steps[t] * xs[t],)  # type: ignore[assignment]
        y = xs[t] * D + reads[t] * from_start
        for s in tl.static_range(t + 1):
            y += tl.load(scores_ptr + (t * L + s)) * kept[s]
        ys += (y,)  # type: ignore[assignment]
    for t in tl.static_range(16):  # after the last load, since no load moves before an earlier store
        tl.store(y_ptr + offsets + t * (H * P), ys[t], mask=mask & (first + t < T))


@triton.jit(do_not_specialize=SIZES)
def _gradient_kernel(  # type: ignore[no-untyped-def]
    x_ptr, dt_ptr, A_ptr, D_ptr, read_ptr, scores_ptr, dy_ptr, given_ptr, faded_ptr,
    dx_ptr, ddt_ptr, dA_ptr, dD_ptr, weights_ptr, weightsT_ptr,
    x_b, x_t, x_h, x_p, dt_b, dt_t, dt_h, dy_b, dy_t, dy_h, dy_p,
    T, M, H: tl.constexpr, G: tl.constexpr, P: tl.constexpr, P_PAD: tl.constexpr, L: tl.constexpr,
    PIECES: tl.constexpr, LEAST: tl.constexpr,
):  # fmt: skip
    """Computes dx, ddt, parts of dA and dD, and the part of W that has both frames in the short block.

    Matrices of frames by frames are (s, t), as in ssm_asr.ops.ssd_kernel.
    """
    j, m, b, g = tl.program_id(0), tl.program_id(1), (tl.program_id(2) // G).to(tl.int64), tl.program_id(2) % G
    i, c, p = mm.order(16), tl.arange(0, 16), tl.arange(0, P_PAD)
    first, h = m * L + 16 * j, g * (H // G)
    rows = T - first
    i_mask, p_mask = i < rows, p < P
    x_ptr += b * x_b + first * x_t + h * x_h
    dy_ptr += b * dy_b + first * dy_t + h * dy_h
    dt_ptr += b * dt_b + first * dt_t + h * dt_h
    row = (b * T + first) * H + h
    blocks = tl.num_programs(2) // G * M * (L // 16)
    block = (b * M + m) * (L // 16) + j
    pieces = block * PIECES + tl.arange(0, PIECES)[:, None]
    start = ((b * M + m) * G + g) * L * L + 16 * j * (L + 1)
    products = mm.ordered(tl.load(scores_ptr + start + i[:, None] * L + c[None, :]))
    upto, strict = upto_and_strict(i[:, None], i[None, :], products)
    products *= upto
    lower = 1.0 - strict
    until, after, ones = mm.right_again(lower), mm.right_again(strict), mm.left_again(upto - strict)
    weights = tl.zeros([16, 16], tl.float32)
    for r in range(H // G):
        A, D = tl.load(A_ptr + h + r), tl.load(D_ptr + h + r)
        dy = mm.load_channels(dy_ptr + r * dy_h, dy_t, dy_p, rows, P, 16, P_PAD)
        x = mm.load_channels(x_ptr + r * x_h, x_t, x_p, rows, P, 16, P_PAD)
        read = mm.load_channels(read_ptr + (row + r) * P, H * P, 1, rows, P, 16, P_PAD)
        given = mm.load_channels(given_ptr + (row + r) * P, H * P, 1, rows, P, 16, P_PAD)
        faded = tl.load(faded_ptr + (pieces * H + h + r) * P + p[None, :], mask=p_mask[None, :], other=0.0)
        dt = tl.load(dt_ptr + r * dt_h + i * dt_t, mask=i_mask, other=0.0).to(tl.float32)
        between, to_end, from_start = head_decays(dt, A, strict, until, LEAST)
        tl.store(dD_ptr + (h + r) * blocks + block, tl.sum(x * dy))
        arrived, straight = tl.sum(read * dy, axis=1) * from_start, tl.sum(given * x, axis=1) * to_end
        x_high, x_low = mm.split(x)
        dx, steps, ddtA, ddt = head_gradients(
            mm.left(x_high), mm.left(x_low), dy, dt, A, D, mm.ordered(given), arrived, straight, tl.sum(faded),
            between, to_end, products, strict, lower, after, ones, i_mask, LEAST,
        )  # fmt: skip
        weights += steps
        mm.store(dx_ptr + (row + r) * P + i * (H * P), dx, i_mask, P, 1)
        tl.store(ddt_ptr + row + r + i * H, ddt, mask=i_mask)
        tl.store(dA_ptr + (h + r) * blocks + block, tl.sum(ddtA * dt, axis=0))
    weights = mm.loaded(weights * upto)
    tl.store(weightsT_ptr + start + i[:, None] * L + c[None, :], weights)
    tl.store(weights_ptr + start + i[:, None] + c[None, :] * L, weights)
