"""A whitener returns its input, and changes the gradient to push the channels' covariance towards equal eigenvalues.

Source: Yao et al., "Zipformer" (arXiv 2310.11230), appendix A.3.3.

Shapes: D channels (last dimension), G groups of C = D / G channels, N frames (all other dimensions together).
"""

from typing import Any

import torch
from torch import Tensor

from ssm_asr.ops import dispatch
from ssm_asr.ops.numbers import Number, Numbers, known_zero, on_device
from ssm_asr.ops.precision import at_least_float32


def whiten(x: Tensor, numbers: Numbers, over_limit: Tensor, groups: int, grad_scale: float) -> Tensor:
    """Returns x itself. If the channels are too correlated, the backward pass adds a gradient that reduces this.

    The whitener acts if it is due and either found the metric over its limit the last time or acts anyway. It then
    computes the metric anew; if this is over the limit, the gradient of the metric is added.

    Args:
        x: (…, D).
        numbers: three numbers: whether the whitener is due in this batch (1 or 0), whether it then acts even if the
            metric was within the limit the last time (1 or 0), and the limit on `whitening_metric`.
        over_limit: scalar of type bool: whether the metric was over the limit when it was last computed. The backward
            pass updates it in place whenever the whitener acts.
        groups: G.
        grad_scale: norm of the added gradient, relative to the norm of the gradient.
    """
    due, anyway, limit = numbers
    if known_zero(due) or (known_zero(anyway) and not x.is_cuda and not over_limit):
        return x
    if dispatch.use_kernels(x):
        whitened: Tensor = _WhitenByKernel.apply(x, on_device(numbers, x.device), over_limit, groups, grad_scale)
        return whitened
    # On a GPU the device evaluates `over_limit`, so that the host does not have to wait for it.
    acts = due * torch.clamp(over_limit + anyway, max=1)
    whitened = _Whiten.apply(x, limit, acts, over_limit, groups, grad_scale)
    return whitened


def whitening_metric(x_ND: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Measures how far the channels of each group are from being uncorrelated and having equal variances.

    Args:
        x_ND: frames by channels; the channels of a group lie side by side.
        groups: G.

    Returns:
        The metric, a scalar from 1 (uncorrelated, with equal variances) to C, and its gradient with respect to x_ND.
    """
    x_NGC = x_ND.reshape(x_ND.shape[0], groups, -1)
    x_GNC = (x_NGC - x_NGC.mean(dim=0)).transpose(0, 1)
    cov_GCC = x_GNC.transpose(1, 2) @ x_GNC
    channels = x_ND.shape[1]
    diagonal = cov_GCC.diagonal(dim1=1, dim2=2)
    mean_square = (cov_GCC * cov_GCC).sum() / channels
    mean_diagonal = diagonal.mean() + 1e-20
    metric = mean_square / (mean_diagonal * mean_diagonal)
    grad_cov_GCC = (cov_GCC - torch.diag_embed((mean_square / mean_diagonal).expand_as(diagonal))) * (
        2 / (channels * mean_diagonal * mean_diagonal)
    )
    grad_GNC = 2 * x_GNC @ grad_cov_GCC
    return metric, grad_GNC.transpose(0, 1).reshape_as(x_ND)


class _Whiten(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, limit: Number, acts: Tensor, over_limit: Tensor, groups: int, grad_scale: float
    ) -> Tensor:
        ctx.save_for_backward(x)
        ctx.limit, ctx.acts, ctx.over_limit, ctx.groups, ctx.grad_scale = limit, acts, over_limit, groups, grad_scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        (x,) = ctx.saved_tensors
        with torch.autocast(x.device.type, enabled=False):
            wide = at_least_float32(x)
            metric, metric_grad = whitening_metric(wide.reshape(-1, wide.shape[-1]), ctx.groups)
            over_limit = metric > ctx.limit
            ctx.over_limit.copy_(torch.where(ctx.acts > 0, over_limit, ctx.over_limit))
            scale = ctx.grad_scale * over_limit * ctx.acts
            scale = scale * grad.norm(dtype=wide.dtype) / (metric_grad.norm() + 1e-20)
            return grad + (metric_grad * scale).reshape_as(grad).to(grad.dtype), None, None, None, None, None


class _WhitenByKernel(torch.autograd.Function):
    """Computes `_Whiten` by kernels, which at most copy the gradient in a batch where the whitener does not act."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, numbers: Tensor, over_limit: Tensor, groups: int, grad_scale: float) -> Tensor:
        ctx.save_for_backward(x)
        # The numbers may be a view of one tensor with the numbers of all modules. Other modules write to this tensor
        # before the backward pass, and autograd would refuse a saved tensor that was written to.
        ctx.numbers, ctx.over_limit, ctx.groups, ctx.grad_scale = numbers, over_limit, groups, grad_scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        from ssm_asr.ops.whiten_kernel import whiten as whiten_kernel  # only where Triton is installed

        (x,) = ctx.saved_tensors
        out = whiten_kernel(x, grads[0], ctx.numbers, ctx.over_limit, ctx.groups, ctx.grad_scale)
        return out, None, None, None, None
