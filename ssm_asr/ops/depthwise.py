"""Depthwise convolutions over time: what they cost for the few frames of a streaming chunk.

Shapes: B batch, D channels, T frames, K taps, S output frames.
"""

import torch
from torch import Tensor, nn

# Up to this many products, matrix products by torch's own loops take 0.3 to 0.9 times as long as conv1d, which for so
# few only prepares itself; torch hands matrices of LARGE_MATRIX products or more to a library that takes longer still.
FEW_PRODUCTS = 1 << 17
LARGE_MATRIX = 400


def depthwise(conv: nn.Conv1d, x_BDT: Tensor) -> Tensor:
    """conv(x), (B, D, S), of a depthwise convolution with a bias; few frames on a CPU as products of their windows."""
    (taps,), padding = conv.kernel_size, int(conv.padding[0])
    B, D, T = x_BDT.shape
    products = (T + 2 * padding - taps + 1) * taps
    if torch.jit.is_tracing() or x_BDT.is_cuda or products >= LARGE_MATRIX or B * D * products > FEW_PRODUCTS:
        return conv(x_BDT)
    assert conv.bias is not None
    padded_BDT = nn.functional.pad(x_BDT, (padding, padding)) if padding else x_BDT
    windows_BDSK = padded_BDT.unfold(2, taps, 1)
    return (windows_BDSK @ conv.weight.mT)[..., 0] + conv.bias[:, None]
