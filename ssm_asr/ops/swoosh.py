"""The Swoosh activations (Yao et al., arXiv 2310.11230, equations 5 and 6), with a balancer before and dropout after.

Shapes: B batch, T frames, D channels.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ssm_asr.ops import dispatch
from ssm_asr.ops.balance import Balance, balance
from ssm_asr.ops.numbers import Number, on_device


class Drop(NamedTuple):
    """Dropout of one batch: an element is dropped where its random number is below the rate, else divided by 1 - rate.

    Attributes:
        uniform: random numbers in [0, 1), of a shape that broadcasts to the input's: (B, 1, D) for one mask along time.
        rate: the probability to drop.
    """

    uniform: Tensor
    rate: Number

    def apply(self, x: Tensor) -> Tensor:
        """x with some of its elements dropped."""
        return x * ((self.uniform >= self.rate) / (1 - self.rate)).to(x.dtype)


def swoosh(x: Tensor, shift: float, offset: float, by: Balance | None = None, drop: Drop | None = None) -> Tensor:
    """log(1 + exp(x - shift)) - 0.08·x - offset, its input balanced and its output dropped at random.

    Args:
        x: of any shape; an image (B, D, H, W) may lie in channels-last memory.
        by: how gradients of x are balanced; None leaves them.
        drop: what is dropped of the result; None drops nothing.
    """
    if torch.jit.is_tracing() or torch.compiler.is_compiling():
        return nn.functional.softplus(x - shift) - 0.08 * x - offset
    if dispatch.use_kernels(x):
        fused = drop is None or (x.ndim == 3 and drop.uniform.shape == (x.shape[0], 1, x.shape[2]))
        y = _by_kernel(x, shift, offset, by, drop if fused else None)
        return y if drop is None or fused else drop.apply(y)
    x = balance(x, by)
    # Streaming is spared what the gradient costs.
    y = (_Swoosh.apply if x.requires_grad else _swoosh)(x, shift, offset)
    return y if drop is None else drop.apply(y)


def _swoosh(x: Tensor, shift: float, offset: float) -> Tensor:
    return nn.functional.softplus(x - shift).sub_(offset).sub_(x, alpha=0.08)


class _Swoosh(torch.autograd.Function):
    """The activation, keeping only x for the backward pass."""

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
