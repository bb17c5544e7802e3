"""A balancer returns its input, and changes the gradient to keep the statistics of each channel within limits.

Source: Yao et al., "Zipformer" (arXiv 2310.11230), appendix A.3.2.

Shapes: D channels (any dimension), N frames (all other dimensions together).
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ssm_asr.ops import dispatch
from ssm_asr.ops.numbers import Number, Numbers, known_zero, on_device
from ssm_asr.ops.precision import at_least_float32


class Balance(NamedTuple):
    """Says what a balancer does to the gradient in one batch.

    Attributes:
        numbers: five numbers: whether the balancer acts (1 or 0), the least and the greatest mean/std of a channel, and
            the least and the greatest rms of a channel. If the host knows that the balancer does not act, the limits
            may be missing.
        grad_scale: size of the added gradient, relative to each element of the gradient.
        channel_dim: dimension of the channels; statistics are taken over all others.
    """

    numbers: Numbers
    grad_scale: float
    channel_dim: int = -1

    @property
    def idle(self) -> bool:
        """Whether the host knows that the balancer does not act."""
        return known_zero(self.numbers[0])


def balance(x: Tensor, by: Balance | None) -> Tensor:
    """Returns x itself. The backward pass changes the gradient as the balancer says.

    Args:
        x: of any shape.
        by: what the balancer does. Nothing changes if it is None or does not act.
    """
    if by is None or by.idle:
        return x
    if dispatch.use_kernels(x):
        balanced: Tensor = _BalanceByKernel.apply(x, on_device(by.numbers, x.device), by.grad_scale, by.channel_dim)
        return balanced
    acts, *limits = by.numbers
    balanced = _Balance.apply(x, tuple(limits), acts * by.grad_scale, by.channel_dim)
    return balanced


class _Balance(torch.autograd.Function):
    """Adds the gradient of a penalty, which is first scaled to an rms of 1 in each channel.

    Each element of the result is grad + grad_scale·|grad|·(the scaled gradient of the penalty). With m = mean/std and
    r = rms of a channel over N frames, the penalty is |m - clamp(m)| + |log(clamp(r)/r)|. Its gradient is affine in x,
    (a + b·x)/N with a and b constant in each channel, because

        d m/dx = (1 - m·(x - mean)/std) / (N·std),   d log r/dx = x / (N·r²).

    So the backward pass needs only x, and the mean and the mean square of each channel.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, limits: tuple[Number, ...], grad_scale: Number, channel_dim: int) -> Tensor:
        ctx.save_for_backward(x)
        ctx.limits, ctx.grad_scale, ctx.channel_dim = limits, grad_scale, channel_dim
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        (x,) = ctx.saved_tensors
        min_m, max_m, min_rms, max_rms = ctx.limits
        with torch.autocast(x.device.type, enabled=False):
            x = at_least_float32(x)
            frame_dims = [dim for dim in range(x.ndim) if dim != ctx.channel_dim % x.ndim]
            mean = x.mean(dim=frame_dims, keepdim=True)
            square = (x * x).mean(dim=frame_dims, keepdim=True)
            std = (square - mean * mean).clamp(min=1e-20).sqrt()
            rms = square.clamp(min=1e-20).sqrt()
            m = mean / std
            sign_m = torch.sign(m - m.clamp(min=min_m).clamp(max=max_m))
            sign_r = torch.sign(rms - rms.clamp(min=min_rms).clamp(max=max_rms))
            slope = sign_r / (rms * rms) - sign_m * m / (std * std)
            offset = sign_m * (1 + m * mean / std) / std
            # This is the rms of offset + slope·x over frames. hypot avoids squares, which would overflow where a
            # channel is all zeros.
            size = torch.hypot(offset + slope * mean, slope * std).clamp(min=1e-20)
            push = torch.addcmul(offset / size, x, slope / size) * ctx.grad_scale
            return (grad + grad.abs() * push.to(grad.dtype)), None, None, None


class _BalanceByKernel(torch.autograd.Function):
    """Computes `_Balance` by a kernel, which only copies the gradient in a batch where the balancer does not act."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, numbers: Tensor, grad_scale: float, channel_dim: int) -> Tensor:
        ctx.save_for_backward(x)
        # The numbers may be a view of one tensor with the numbers of all modules. Other modules write to this tensor
        # before the backward pass, and autograd would refuse a saved tensor that was written to.
        ctx.numbers, ctx.grad_scale, ctx.channel_dim = numbers, grad_scale, channel_dim
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        from ssm_asr.ops.swoosh_kernel import balance as balance_kernel  # only where Triton is installed

        (x,) = ctx.saved_tensors
        return balance_kernel(x, grads[0], ctx.numbers, ctx.grad_scale, ctx.channel_dim), None, None, None
