"""Linear layers and small convolutions, whose bias gradients a GPU sums in a kernel.

Shapes: N rows (any dimensions but the last), D channels, V outputs; images (B, C, T, W).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ssm_asr.ops import dispatch


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """torch.nn.functional.linear."""
    return _biased(lambda bias: functional.linear(x, weight, bias), x, bias)


def linear_padded(x: Tensor, weight_VD: Tensor, bias_V: Tensor) -> Tensor:
    """x·weight' + bias with further outputs of -inf where they make the product faster: (…, V or more)."""
    padding = -len(weight_VD) % dispatch.MEMORY_LINE
    if padding and dispatch.use_kernels(x):
        weight_VD = functional.pad(weight_VD, (0, 0, 0, padding))
        bias_V = functional.pad(bias_V, (0, padding), value=-torch.inf)
    return linear(x, weight_VD, bias_V)


def linear_of_image(x_BCTW: Tensor, weight_DF: Tensor, bias_D: Tensor) -> Tensor:
    """The linear layer of each frame's F = C·W numbers, ordered by channel and then by column: (B, T, D)."""
    if dispatch.use_kernels(x_BCTW):  # reorders the weights, rather than an image that lies in channels-last memory
        weight_DF = weight_DF.unflatten(1, (x_BCTW.shape[1], -1)).transpose(1, 2).flatten(1)
        return linear(x_BCTW.permute(0, 2, 3, 1).flatten(2), weight_DF, bias_D)
    return linear(x_BCTW.transpose(1, 2).flatten(2), weight_DF, bias_D)


def pointwise(conv: nn.Conv2d, x_BCTW: Tensor) -> Tensor:
    """A convolution with a kernel of one; a GPU computes it as a matrix product, which adds the bias on its way."""
    if not dispatch.use_kernels(x_BCTW):
        out_BCTW: Tensor = conv(x_BCTW)
        return out_BCTW
    x_BTWC = x_BCTW.permute(0, 2, 3, 1)
    out_NC = linear(x_BTWC.flatten(0, 2), conv.weight.flatten(1), conv.bias)
    return out_NC.unflatten(0, x_BTWC.shape[:3]).permute(0, 3, 1, 2)


def conv2d(conv: nn.Conv2d, x_BCTW: Tensor) -> Tensor:
    """A convolution without padding."""
    if not dispatch.use_kernels(x_BCTW):
        out_BCTW: Tensor = conv(x_BCTW)
        return out_BCTW

    def channels_last(bias: Tensor | None) -> Tensor:
        return functional.conv2d(x_BCTW, conv.weight, bias, conv.stride).permute(0, 2, 3, 1)

    return _biased(channels_last, x_BCTW, conv.bias).permute(0, 3, 1, 2)


def grouped_conv(conv: nn.Conv1d, x_NDU: Tensor) -> Tensor:
    """A convolution in many groups, without padding and bias, over the last dimension.

    On a GPU it is one product, since cuDNN launches kernels for each of the groups.
    """
    if not x_NDU.is_cuda:
        out: Tensor = conv(x_NDU)
        return out
    return grouped_product(conv, x_NDU)


def grouped_product(conv: nn.Conv1d, x_NDU: Tensor) -> Tensor:
    """`grouped_conv` as one product of windows (N, groups, in, frames, taps) with weights (groups, out, in, taps)."""
    x_NGIUC = x_NDU.unfold(2, conv.kernel_size[0], 1).unflatten(1, (conv.groups, -1))
    weight_GOIC = conv.weight.unflatten(0, (conv.groups, -1))
    return torch.einsum("ngiuc,goic->ngou", x_NGIUC, weight_GOIC).flatten(1, 2)


class _AddBias(torch.autograd.Function):
    """The identity for a tensor that has the bias in it already. A kernel sums the bias's gradient over rows."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, bias: Tensor) -> Tensor:
        ctx.dtype = bias.dtype
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        from ssm_asr.ops.sums_kernel import column_sums  # only where Triton is installed

        return grads[0], column_sums(grads[0], ctx.dtype)


def _biased(layer: Callable[[Tensor | None], Tensor], x: Tensor, bias: Tensor | None) -> Tensor:
    """layer(bias), which adds the bias to the last dimension. The kernel's sum of its gradient takes a fourth of the
    time that PyTorch's takes on a GPU."""
    if bias is None or not bias.requires_grad or not torch.is_grad_enabled() or not dispatch.use_kernels(x):
        return layer(bias)
    y: Tensor = _AddBias.apply(layer(bias.detach()), bias)
    return y
