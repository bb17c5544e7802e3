"""These linear layers and small convolutions have kernels for the gradients of their biases.

Shapes: N rows (all dimensions but the last), D channels, V outputs. Images (B, C, T, W) have B batch, C channels,
T frames and W columns.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ssm_asr.ops import dispatch


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Computes torch.nn.functional.linear(x, weight, bias)."""
    return _biased(lambda bias: functional.linear(x, weight, bias), x, bias)


def linear_padded(x: Tensor, weight_VD: Tensor, bias_V: Tensor) -> Tensor:
    """Computes x·weightᵀ + bias, on a GPU with further outputs that make the product faster.

    Args:
        x: (…, D).
        weight_VD, bias_V: the weights of the layer.

    Returns:
        (…, V), or with kernels (…, V rounded up to a multiple of dispatch.MEMORY_LINE). Further outputs are -inf.
    """
    padding = -len(weight_VD) % dispatch.MEMORY_LINE
    if padding and dispatch.use_kernels(x):
        weight_VD = functional.pad(weight_VD, (0, 0, 0, padding))
        bias_V = functional.pad(bias_V, (0, padding), value=-torch.inf)
    return linear(x, weight_VD, bias_V)


def linear_of_image(x_BCTW: Tensor, weight_DF: Tensor, bias_D: Tensor) -> Tensor:
    """Applies a linear layer to the F = C·W numbers of each frame, ordered by channel and then by column.

    Args:
        x_BCTW: an image.
        weight_DF, bias_D: the weights of the layer.

    Returns:
        (B, T, D).
    """
    if dispatch.use_kernels(x_BCTW):  # the image is in channels-last memory: it is cheaper to reorder the weights
        weight_DF = weight_DF.unflatten(1, (x_BCTW.shape[1], -1)).transpose(1, 2).flatten(1)
        return linear(x_BCTW.permute(0, 2, 3, 1).flatten(2), weight_DF, bias_D)
    return linear(x_BCTW.transpose(1, 2).flatten(2), weight_DF, bias_D)


def pointwise(conv: nn.Conv2d, x_BCTW: Tensor) -> Tensor:
    """Computes conv(x) for a convolution with a 1×1 kernel. With kernels on, it is a matrix product."""
    if not dispatch.use_kernels(x_BCTW):
        out_BCTW: Tensor = conv(x_BCTW)
        return out_BCTW
    x_BTWC = x_BCTW.permute(0, 2, 3, 1)
    out_NC = linear(x_BTWC.flatten(0, 2), conv.weight.flatten(1), conv.bias)
    return out_NC.unflatten(0, x_BTWC.shape[:3]).permute(0, 3, 1, 2)


def conv2d(conv: nn.Conv2d, x_BCTW: Tensor) -> Tensor:
    """Computes conv(x) for a convolution without padding."""
    if not dispatch.use_kernels(x_BCTW):
        out_BCTW: Tensor = conv(x_BCTW)
        return out_BCTW

    def channels_last(bias: Tensor | None) -> Tensor:
        return functional.conv2d(x_BCTW, conv.weight, bias, conv.stride).permute(0, 2, 3, 1)

    return _biased(channels_last, x_BCTW, conv.bias).permute(0, 3, 1, 2)


def grouped_conv(conv: nn.Conv1d, x_NDU: Tensor) -> Tensor:
    """Computes conv(x) for a convolution in many groups, without padding and bias.

    On a GPU this is one matrix product, because cuDNN would launch kernels for each group.

    Args:
        conv: the convolution.
        x_NDU: N sequences of D channels and U frames.
    """
    if not x_NDU.is_cuda:
        out: Tensor = conv(x_NDU)
        return out
    return grouped_product(conv, x_NDU)


def grouped_product(conv: nn.Conv1d, x_NDU: Tensor) -> Tensor:
    """Computes `grouped_conv` as one matrix product of windows and weights.

    The windows are (N, groups, in, frames, taps), the weights (groups, out, in, taps).
    """
    x_NGIUC = x_NDU.unfold(2, conv.kernel_size[0], 1).unflatten(1, (conv.groups, -1))
    weight_GOIC = conv.weight.unflatten(0, (conv.groups, -1))
    return torch.einsum("ngiuc,goic->ngou", x_NGIUC, weight_GOIC).flatten(1, 2)


class _AddBias(torch.autograd.Function):
    """Gives a bias its gradient, which a kernel sums over rows. The tensor y contains the bias already."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, bias: Tensor) -> Tensor:
        ctx.dtype = bias.dtype
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        from ssm_asr.ops.sums_kernel import column_sums  # only where Triton is installed

        return grads[0], column_sums(grads[0], ctx.dtype)


def _biased(layer: Callable[[Tensor | None], Tensor], x: Tensor, bias: Tensor | None) -> Tensor:
    """Returns layer(bias), which adds the bias to the last dimension, and sums the gradient of the bias by a kernel.

    On a GPU the kernel takes a quarter of the time of PyTorch's sum.
    """
    if bias is None or not bias.requires_grad or not torch.is_grad_enabled() or not dispatch.use_kernels(x):
        return layer(bias)
    y: Tensor = _AddBias.apply(layer(bias.detach()), bias)
    return y
