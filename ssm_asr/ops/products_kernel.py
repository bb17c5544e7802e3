"""Products of small matrices in Triton, as exact as in float32, in which no number moves from thread to thread.

Of 16 neighbours in a row, a load leaves 4q + j (j < 4) with the q-th of 4 threads, a product 8k + 2q + e (k, e < 2).
As factors, numbers count in the order in which they are summed, 4j + q. So rows are loaded in the order in which
products have their columns, `order`, and the functions here only say anew which column is which, the same for both
factors. Where loads spread a matrix otherwise, as those of several warps, results are the same, but slower to come by.

Shapes: R rows, C columns, both multiples of 16.
"""

import triton
import triton.language as tl


@triton.jit
def split(x):  # type: ignore[no-untyped-def]
    """x rounded to the 11 bits of tf32, and the rest."""
    high = ((x.to(tl.int32, bitcast=True) + 4096) & -8192).to(tl.float32, bitcast=True)
    return high, x - high


@triton.jit
def _order_at(c):  # type: ignore[no-untyped-def]
    return (c & -16) + (c & 6) * 2 + (c & 8) // 4 + (c & 1)


@triton.jit
def order(SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    """That of the columns of a product: 4q + 2k + e at 8k + 2q + e, of every 16."""
    return _order_at(tl.arange(0, SIZE))


@triton.jit
def channel(place):  # type: ignore[no-untyped-def]
    """Which channel `load_channels` leaves at a place in a row: 4j + q at 4q + j, of every 16."""
    return (place & -16) + (place & 3) * 4 + (place & 12) // 4


@triton.jit
def load_channels(base, stride_r, stride_c, rows, C: tl.constexpr, R: tl.constexpr, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    """A matrix as other loads leave it, but its C columns, filled up to SIZE with zeros, are in the order of `channel`.

    Its rows are the first of R, in `order`, then zeros. For rows that are no multiples of 16 bytes, of which a thread
    loads one number at a time: here four threads beside each other load four numbers that are, from half of the cache's
    sectors.
    """
    # The first two dimensions go to threads, 4 by 8, as long as the compiler sees neighbours in none of them: those it
    # would give to one thread.
    q = ((tl.arange(0, 4) * 5) & 3)[:, None, None, None, None]
    g, a = tl.arange(0, 8)[None, :, None, None, None], tl.arange(0, R // 8)[None, None, None, None, :]
    j, k = tl.arange(0, 4)[None, None, :, None, None], tl.arange(0, SIZE // 16)[None, None, None, :, None]
    r, c = _order_at(8 * a + g), 16 * k + 4 * j + q
    x = tl.load((base + r * stride_r) + c * stride_c, mask=(r < rows) & (c < C), other=0.0).to(tl.float32)
    return tl.reshape(tl.permute(x, (4, 1, 3, 0, 2)), (R, SIZE))


@triton.jit
def left(x):  # type: ignore[no-untyped-def]
    """A loaded matrix as the left one of a product, its columns in the order of the sum: 4q + j -> 4j + q."""
    R: tl.constexpr = x.shape[0]
    C: tl.constexpr = x.shape[1]
    return tl.reshape(tl.permute(tl.reshape(x, (R, C // 16, 4, 4)), (0, 1, 3, 2)), (R, C))


@triton.jit
def right(x):  # type: ignore[no-untyped-def]
    """A loaded matrix, transposed, as the right one."""
    R: tl.constexpr = x.shape[0]
    C: tl.constexpr = x.shape[1]
    return tl.reshape(tl.permute(tl.reshape(x, (R, C // 16, 4, 4)), (1, 3, 2, 0)), (C, R))


@triton.jit
def left_again(x):  # type: ignore[no-untyped-def]
    """A product as the left matrix of the next one: 8k + 2q + e -> 8k + 4e + q."""
    R: tl.constexpr = x.shape[0]
    C: tl.constexpr = x.shape[1]
    return tl.reshape(tl.permute(tl.reshape(x, (R, C // 8, 4, 2)), (0, 1, 3, 2)), (R, C))


@triton.jit
def right_again(x):  # type: ignore[no-untyped-def]
    """A product, transposed, as the right matrix of the next one."""
    R: tl.constexpr = x.shape[0]
    C: tl.constexpr = x.shape[1]
    return tl.reshape(tl.permute(tl.reshape(x, (R, C // 8, 4, 2)), (1, 3, 2, 0)), (C, R))


@triton.jit
def ordered(x):  # type: ignore[no-untyped-def]
    """A loaded matrix with the columns of a product."""
    R: tl.constexpr = x.shape[0]
    C: tl.constexpr = x.shape[1]
    return tl.reshape(tl.permute(tl.reshape(x, (R, C // 16, 4, 2, 2)), (0, 1, 3, 2, 4)), (R, C))


@triton.jit
def loaded(x):  # type: ignore[no-untyped-def]
    """A product with its columns in their own order."""
    R: tl.constexpr = x.shape[0]
    C: tl.constexpr = x.shape[1]
    return tl.reshape(tl.permute(tl.reshape(x, (R, C // 16, 2, 4, 2)), (0, 1, 3, 2, 4)), (R, C))


@triton.jit
def store(pointers, x, row_mask, C: tl.constexpr, stride: tl.constexpr):  # type: ignore[no-untyped-def]
    """A product's first C columns in the order of `channel`, with a stride between them, to rows at the pointers (R,).

    Every thread stores what it has: to sort the numbers first would take longer than these scattered stores.
    """
    R: tl.constexpr = x.shape[0]
    Q: tl.constexpr = x.shape[1] // 4
    x = tl.reshape(tl.permute(tl.reshape(x, (R, Q // 4, 2, 4, 2)), (1, 3, 0, 2, 4)), (Q, R, 2, 2))
    even, odd = tl.split(x)
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    c = channel(4 * tl.arange(0, Q))
    pointers = pointers[None, :] + c[:, None] * stride
    tl.store(pointers, x0, mask=row_mask[None, :] & (c < C)[:, None])
    tl.store(pointers + 4 * stride, x1, mask=row_mask[None, :] & (c + 4 < C)[:, None])
    tl.store(pointers + 8 * stride, x2, mask=row_mask[None, :] & (c + 8 < C)[:, None])
    tl.store(pointers + 12 * stride, x3, mask=row_mask[None, :] & (c + 12 < C)[:, None])


@triton.jit
def unit():  # type: ignore[no-untyped-def]
    """The unit matrix of 16 rows as the left one of a product with a loaded one."""
    c = tl.arange(0, 16)
    sums = (c & 3) * 4 + (c & 12) // 4
    return tl.where(order(16)[:, None] == sums[None, :], 1.0, 0.0)


@triton.jit
def turned(x, ones):  # type: ignore[no-untyped-def]
    """A part of a loaded matrix, transposed: its rows in `order`, its columns as a product's.

    If it has 16 columns, by a product with the unit matrix, which is faster than to change places; it loses no more
    bits than the next product would.
    """
    if x.shape[1] == 16:
        return tl.dot(ones, right(x), input_precision="tf32")
    return tl.trans(ordered(x))


@triton.jit
def turned_again(x, ones):  # type: ignore[no-untyped-def]
    """A part of a product, transposed."""
    if x.shape[1] == 16:
        return tl.dot(ones, right_again(x), input_precision="tf32")
    return tl.trans(x)


@triton.jit
def across(high, low, ones):  # type: ignore[no-untyped-def]
    """Parts of a loaded matrix as the right ones of a product that sums over its rows."""
    return right_again(turned(high, ones)), right_again(turned(low, ones))


@triton.jit
def dot(a_high, a_low, b_high, b_low, acc):  # type: ignore[no-untyped-def]
    """acc + a @ b on the matrix units, of matrices in two parts each: three products, without that of the rests.

    With the parts of `split`, in tf32, it is as exact as in float32.
    """
    acc = tl.dot(a_low, b_high, acc=acc, input_precision="tf32")
    acc = tl.dot(a_high, b_low, acc=acc, input_precision="tf32")
    return tl.dot(a_high, b_high, acc=acc, input_precision="tf32")


@triton.jit
def product(a, b):  # type: ignore[no-untyped-def]
    """a @ b likewise, of matrices in their own order, however they are spread over threads and warps."""
    a_high, a_low = split(a)
    b_high, b_low = split(b)
    return dot(a_high, a_low, b_high, b_low, tl.zeros([a.shape[0], b.shape[1]], tl.float32))
