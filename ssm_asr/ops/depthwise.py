"""These are depthwise convolutions over time, in chunks, and over images, and the front end's first convolution.

Shapes: B batch, D channels, T frames, K taps, S output frames, M = K // 2 frames before a chunk, C frames of a chunk,
N chunks. Images (B, C, T, W) have C channels, T frames and W columns, or F columns if these are mel filters.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from ssm_asr.ops import dispatch
from ssm_asr.ops.numbers import Count
from ssm_asr.ops.precision import autocast_dtype

# For up to FEW_PRODUCTS multiplications, matrix products on a CPU take 0.3 to 0.9 times as long as conv1d, which then
# spends most of its time on setting itself up. This holds for PyTorch's own loops: products of LARGE_MATRIX
# multiplications or more per matrix go to a library, which takes longer than conv1d.
FEW_PRODUCTS = 1 << 17
LARGE_MATRIX = 400


def depthwise(conv: nn.Conv1d, x_BDT: Tensor) -> Tensor:
    """Computes conv(x), (B, D, S), for a depthwise convolution with a bias.

    On a CPU few frames are convolved as matrix products of their windows, which is faster.
    """
    (taps,), padding = conv.kernel_size, int(conv.padding[0])
    B, D, T = x_BDT.shape
    products = (T + 2 * padding - taps + 1) * taps
    if torch.jit.is_tracing() or x_BDT.is_cuda or products >= LARGE_MATRIX or B * D * products > FEW_PRODUCTS:
        return conv(x_BDT)
    assert conv.bias is not None
    padded_BDT = functional.pad(x_BDT, (padding, padding)) if padding else x_BDT
    windows_BDSK = padded_BDT.unfold(2, taps, 1)
    return (windows_BDSK @ conv.weight.mT)[..., 0] + conv.bias[:, None]


class ChunkCausalWeights(NamedTuple):
    """Holds the weights of a convolution that looks ahead only to the end of its chunk.

    Attributes:
        scale_2DK: what is added to 1 near the left and near the right edge of a chunk, to scale the output of `inside`.
        causal: the convolution with the left half of the kernel, which has M + 1 taps and no padding.
        inside: the convolution inside the chunk, which has all K taps and a padding of M.
    """

    scale_2DK: Tensor
    causal: nn.Conv1d
    inside: nn.Conv1d


def chunk_causal_conv(x_BDT: Tensor, chunk: Count, weights: ChunkCausalWeights) -> Tensor:
    """Convolves whole sequences, with zeros before the first frame and after the last.

    The result is the sum of the causal convolution and of the scaled convolution inside each chunk.

    Args:
        x_BDT: the sequences.
        chunk: C, in frames; -1 for all. A tensor lies on the device, and only kernels take it without a wait.
        weights: the weights.

    Returns:
        (B, D, T).
    """
    B, D, T = x_BDT.shape
    scale_2DK, causal, inside = weights
    if dispatch.use_kernels(x_BDT):
        from ssm_asr.ops import depthwise_kernel  # only where Triton is installed

        assert causal.bias is not None and inside.bias is not None
        given = (scale_2DK, causal.weight, causal.bias, inside.weight, inside.bias)
        number = chunk if isinstance(chunk, Tensor) else torch.full((), chunk, dtype=torch.int32, device=x_BDT.device)
        return depthwise_kernel.chunk_causal_conv(x_BDT.transpose(1, 2), number, *given).transpose(1, 2)
    chunk = int(chunk)
    chunk = T if chunk < 0 else chunk
    causal_BDT = causal(functional.pad(x_BDT, (scale_2DK.shape[2] // 2, 0)))
    n = -(-T // chunk)
    chunks = functional.pad(x_BDT, (0, n * chunk - T)).reshape(B, D, n, chunk)
    inside_NDC = inside_chunk(chunks.transpose(1, 2).reshape(B * n, D, chunk), weights)
    inside_BDT = inside_NDC.reshape(B, n, D, chunk).transpose(1, 2).reshape(B, D, n * chunk)[..., :T]
    return causal_BDT + inside_BDT


def chunk_causal_step(x_BDC: Tensor, cache_BDM: Tensor, weights: ChunkCausalWeights) -> tuple[Tensor, Tensor]:
    """Computes `chunk_causal_conv` for one chunk of a stream.

    Args:
        x_BDC: the chunk.
        cache_BDM: the M frames before it.
        weights: the weights.

    Returns:
        The output (B, D, C) and the new cache (B, D, M).
    """
    padded = torch.cat([cache_BDM, x_BDC], dim=2)
    out_BDC = depthwise(weights.causal, padded) + inside_chunk(x_BDC, weights)
    return out_BDC, padded[..., x_BDC.shape[2] :]


def inside_chunk(x_NDC: Tensor, weights: ChunkCausalWeights) -> Tensor:
    """Returns the part of the output that sees only its own chunk, scaled near the edges of the chunk: (N, D, C)."""
    left_DK, right_DK = weights.scale_2DK
    chunk, kernel = x_NDC.shape[2], left_DK.shape[1]
    if chunk < kernel:
        edge_DC = left_DK[:, :chunk] + right_DK[:, kernel - chunk :]
    else:
        rest = chunk - kernel
        edge_DC = functional.pad(left_DK, (0, rest)) + functional.pad(right_DK, (rest, 0))
    return depthwise(weights.inside, x_NDC) * (1.0 + edge_DC).to(x_NDC.dtype)


def depthwise_image(conv: nn.Conv2d, x_BCTW: Tensor) -> Tensor:
    """Computes conv(x) for a 7×7 depthwise convolution with a padding of 3.

    The result of the kernel lies in channels-last memory.
    """
    if not dispatch.use_kernels(x_BCTW):
        out_BCTW: Tensor = conv(x_BCTW)
        return out_BCTW
    from ssm_asr.ops.depthwise2d_kernel import depthwise_conv  # only where Triton is installed

    assert conv.bias is not None
    return depthwise_conv(x_BCTW.to(autocast_dtype(x_BCTW)), conv.weight, conv.bias)


def first_conv(conv: nn.Conv2d, x_B1TF: Tensor) -> Tensor:
    """Computes conv(x), (B, C, T - 2, F), for a 3×3 convolution from one channel with a padding of (0, 1)."""
    if not dispatch.use_kernels(x_B1TF) or x_B1TF.requires_grad:
        out_BCTF: Tensor = conv(x_B1TF)
        return out_BCTF
    from ssm_asr.ops import first_conv_kernel  # only where Triton is installed

    assert conv.bias is not None
    return first_conv_kernel.first_conv(x_B1TF[:, 0], conv.weight, conv.bias, autocast_dtype(x_B1TF))
