"""This module computes the Swoosh activations, with a balancer before and dropout after them.

Source: Yao et al., "Zipformer" (arXiv 2310.11230), equations 5 and 6.

Shapes: B batch, T frames, D channels.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ssm_asr.ops import dispatch
from ssm_asr.ops.balance import Balance, balance
from ssm_asr.ops.numbers import Number, on_device


class Drop(NamedTuple):
    """Holds the dropout of one batch.

    An element becomes 0 where its random number is below the rate, and is divided by 1 - rate elsewhere.

    Attributes:
        uniform: random numbers in [0, 1), of a shape that broadcasts to the input; (B, 1, D) shares a mask along time.
        rate: probability with which an element is dropped.
    """

    uniform: Tensor
    rate: Number

    def apply(self, x: Tensor) -> Tensor:
        """Returns x after dropout."""
        return x * ((self.uniform >= self.rate) / (1 - self.rate)).to(x.dtype)


def swoosh(x: Tensor, shift: float, offset: float, by: Balance | None = None, drop: Drop | None = None) -> Tensor:
    """Computes log(1 + exp(x - shift)) - 0.08·x - offset, with a balancer on the input and dropout on the output.

    Args:
        x: of any shape; an image (B, D, H, W) may lie in channels-last memory.
        shift: 4 for SwooshL, 1 for SwooshR.
        offset: 0.035 for SwooshL, 0.313261687 for SwooshR.
        by: how the gradient of x is balanced; None leaves it as it is.
        drop: the dropout; None drops nothing.
    """
    if torch.jit.is_tracing() or torch.compiler.is_compiling():
        x = balance(x, by)
        y = nn.functional.softplus(x - shift) - 0.08 * x - offset
        return y if drop is None else drop.apply(y)
    if dispatch.use_kernels(x):
        fused = drop is None or (x.ndim == 3 and drop.uniform.shape == (x.shape[0], 1, x.shape[2]))
        y = _by_kernel(x, shift, offset, by, drop if fused else None)
        return y if drop is None or fused else drop.apply(y)
    x = balance(x, by)
    # Without a gradient, as in streaming, a plain call is cheaper than an autograd function.
    y = (_Swoosh.apply if x.requires_grad else _swoosh)(x, shift, offset)
    return y if drop is None else drop.apply(y)


def _swoosh(x: Tensor, shift: float, offset: float) -> Tensor:
    return nn.functional.softplus(x - shift).sub_(offset).sub_(x, alpha=0.08)


class _Swoosh(torch.autograd.Function):
    """Computes the activation and keeps only x for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shift: float, offset: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.shift = shift
        return _swoosh(x, shift, offset)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        return (x - ctx.shift).sigmoid_().sub_(0.08).mul_(grads[0]), None, None


def _by_kernel(x: Tensor, shift: float, offset: float, by: Balance | None, drop: Drop | None) -> Tensor:
    from ssm_asr.ops import swoosh_kernel  # only where Triton is installed

    channel_dim, numbers, grad_scale = (1 if x.ndim == 4 and not x.is_contiguous() else -1), None, 0.0
    if by is not None and not by.idle:
        channel_dim, numbers, grad_scale = by.channel_dim, on_device(by.numbers, x.device), by.grad_scale
    uniform, rate = (None, None) if drop is None else (drop.uniform, on_device(drop.rate, x.device))
    return swoosh_kernel.swoosh(x, shift, offset, channel_dim, numbers, grad_scale, uniform, rate)
