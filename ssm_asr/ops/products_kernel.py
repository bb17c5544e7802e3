"""These functions multiply small matrices in Triton, as exactly as in float32, without moving numbers between threads.

Four threads share 16 neighbours in a row. After a load, thread q holds the neighbours 4q + j (j < 4). After a product
it holds 8k + 2q + e (k, e < 2). If the row belongs to a factor, the matrix units take what thread q holds as the terms
4j + q of the sum. The order of the terms does not matter, as long as both factors have it. So no number has to move:
the functions here only rename columns, in one way for both factors. For this, rows are loaded in the order in which
products have their columns (`order`).

Loads by several warps spread a matrix in other ways. Results are then correct too, but take longer.

Shapes: R rows, C columns, both multiples of 16.
"""

import triton
import triton.language as tl


@triton.jit
def split(x):  # type: ignore[no-untyped-def]
    """Returns x rounded to the 11 bits of tf32, and the remainder."""
    high = ((x.to(tl.int32, bitcast=True) + 4096) & -8192).to(tl.float32, bitcast=True)
    return high, x - high


@triton.jit
def _order_at(c):  # type: ignore[no-untyped-def]
    return (c & -16) + (c & 6) * 2 + (c & 8) // 4 + (c & 1)


@triton.jit
def order(SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Returns the order of a product's columns: of every 16, column 4q + 2k + e is at place 8k + 2q + e."""
    return _order_at(tl.arange(0, SIZE))


@triton.jit
def channel(place):  # type: ignore[no-untyped-def]
    """Returns the channel that `load_channels` puts at a place in a row: of every 16, 4j + q at place 4q + j."""
    return (place & -16) + (place & 3) * 4 + (place & 12) // 4


@triton.jit
def load_channels(base, stride_r, stride_c, rows, C: tl.constexpr, R: tl.constexpr, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Loads a matrix whose rows need not be multiples of 16 bytes, spread over threads as by other loads.

    Its C columns, filled up to SIZE with zeros, are in the order of `channel`. Its R rows are in `order`; from `rows`
    on they are zeros. From unaligned rows a thread loads one number at a time. In this order, four neighbouring threads
    load four neighbouring numbers, which halves the sectors of the cache that a load touches.
    """
    # The compiler gives the first two dimensions to threads, 4 by 8, unless it sees neighbours in memory along them:
    # it would give neighbours to one thread. The formula of q hides them.
    q = ((tl.arange(0, 4) * 5) & 3)[:, None, None, None, None]
    g, a = tl.arange(0, 8)[None, :, None, None, None], tl.arange(0, R // 8)[None, None, None, None, :]
    j, k = tl.arange(0, 4)[None, None, :, None, None], tl.arange(0, SIZE // 16)[None, None, None, :, None]
    r, c = _order_at(8 * a + g), 16 * k + 4 * j + q
    x = tl.load((base + r * stride_r) + c * stride_c, mask=(r < rows) & (c < C), other=0.0).to(tl.float32)
    return tl.reshape(tl.permute(x, (4, 1, 3, 0, 2)), (R, SIZE))


@triton.jit
def left(x):  # type: ignore[no-untyped-def]
    """Makes a loaded matrix the left factor of a product: column 4q + j becomes term 4j + q of the sum."""
    R: tl.constexpr = x.shape[0]
    C: tl.constexpr = x.shape[1]
    return tl.reshape(tl.permute(tl.reshape(x, (R, C // 16, 4, 4)), (0, 1, 3, 2)), (R, C))


@triton.jit
def right(x):  # type: ignore[no-untyped-def]
    """Transposes a loaded matrix and makes it the right factor of a product."""
    R: tl.constexpr = x.shape[0]
    C: tl.constexpr = x.shape[1]
    return tl.reshape(tl.permute(tl.reshape(x, (R, C // 16, 4, 4)), (1, 3, 2, 0)), (C, R))


@triton.jit
def left_again(x):  # type: ignore[no-untyped-def]
    """Makes a product the left factor of the next product: column 8k + 2q + e becomes term 8k + 4e + q of the sum."""
    R: tl.constexpr = x.shape[0]
    C: tl.constexpr = x.shape[1]
    return tl.reshape(tl.permute(tl.reshape(x, (R, C // 8, 4, 2)), (0, 1, 3, 2)), (R, C))


@triton.jit
def right_again(x):  # type: ignore[no-untyped-def]
    """Transposes a product and makes it the right factor of the next product."""
    R: tl.constexpr = x.shape[0]
    C: tl.constexpr = x.shape[1]
    return tl.reshape(tl.permute(tl.reshape(x, (R, C // 8, 4, 2)), (1, 3, 2, 0)), (C, R))


@triton.jit
def ordered(x):  # type: ignore[no-untyped-def]
    """Gives a loaded matrix the column order of a product."""
    R: tl.constexpr = x.shape[0]
    C: tl.constexpr = x.shape[1]
    return tl.reshape(tl.permute(tl.reshape(x, (R, C // 16, 4, 2, 2)), (0, 1, 3, 2, 4)), (R, C))


@triton.jit
def loaded(x):  # type: ignore[no-untyped-def]
    """Gives a product its columns in their own order."""
    R: tl.constexpr = x.shape[0]
    C: tl.constexpr = x.shape[1]
    return tl.reshape(tl.permute(tl.reshape(x, (R, C // 16, 2, 4, 2)), (0, 1, 3, 2, 4)), (R, C))


@triton.jit
def store(pointers, x, row_mask, C: tl.constexpr, stride: tl.constexpr):  # type: ignore[no-untyped-def]
    """Stores the first C columns of a product, which are in the order of `channel`, at rows of memory.

    Every thread stores the numbers that it has. Sorting them first would take longer than these scattered stores.

    Args:
        pointers: (R,), the starts of the rows.
        x: the product.
        row_mask: (R,), the rows to store.
        C: number of columns.
        stride: elements from one column to the next in memory.
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
    """Returns the unit matrix of 16 rows as the left factor of a product with a loaded matrix."""
    c = tl.arange(0, 16)
    sums = (c & 3) * 4 + (c & 12) // 4
    return tl.where(order(16)[:, None] == sums[None, :], 1.0, 0.0)


@triton.jit
def turned(x, ones):  # type: ignore[no-untyped-def]
    """Transposes a part of a loaded matrix. The result has its rows in `order` and the column order of a product.

    A part with 16 columns is multiplied by the unit matrix, which is faster than moving numbers between threads. This
    loses no more bits than the next product would.
    """
    if x.shape[1] == 16:
        return tl.dot(ones, right(x), input_precision="tf32")
    return tl.trans(ordered(x))


@triton.jit
def turned_again(x, ones):  # type: ignore[no-untyped-def]
    """Transposes a part of a product."""
    if x.shape[1] == 16:
        return tl.dot(ones, right_again(x), input_precision="tf32")
    return tl.trans(x)


@triton.jit
def across(high, low, ones):  # type: ignore[no-untyped-def]
    """Makes both parts of a loaded matrix right factors of a product that sums over its rows."""
    return right_again(turned(high, ones)), right_again(turned(low, ones))


@triton.jit
def dot(a_high, a_low, b_high, b_low, acc):  # type: ignore[no-untyped-def]
    """Returns acc + a @ b, computed by matrix units from two parts of each matrix.

    It adds up three products and leaves out the product of the two remainders. With the parts of `split`, in tf32, the
    result is as exact as in float32.
    """
    acc = tl.dot(a_low, b_high, acc=acc, input_precision="tf32")
    acc = tl.dot(a_high, b_low, acc=acc, input_precision="tf32")
    return tl.dot(a_high, b_high, acc=acc, input_precision="tf32")


@triton.jit
def product(a, b):  # type: ignore[no-untyped-def]
    """Returns a @ b as exactly, for matrices in their own order, however threads and warps hold them."""
    a_high, a_low = split(a)
    b_high, b_low = split(b)
    return dot(a_high, a_low, b_high, b_low, tl.zeros([a.shape[0], b.shape[1]], tl.float32))
