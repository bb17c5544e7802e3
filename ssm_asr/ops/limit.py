"""This operation keeps a parameter near an interval, by flipping gradients that would move it further out.

Source: Yao et al., "Zipformer" (arXiv 2310.11230), section 3.4.
"""

from typing import Any

import torch
from torch import Tensor

from ssm_asr.ops.numbers import Number, Numbers, known_zero


def limit(parameter: Tensor, numbers: Numbers | None) -> Tensor:
    """Returns the parameter itself. The backward pass flips gradients whose descent leads further out of the interval.

    Args:
        parameter: of any shape.
        numbers: three numbers: whether gradients are flipped in this batch (1 or 0), and the lower and the upper end of
            the interval. If the host knows that the first is 0, the ends may be missing. None flips nothing.
    """
    if numbers is None or known_zero(numbers[0]):
        return parameter
    acts, low, high = numbers
    limited: Tensor = _Limit.apply(parameter, low, high, acts)
    return limited


class _Limit(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, low: Number, high: Number, acts: Number) -> Tensor:
        ctx.save_for_backward(x)
        ctx.low, ctx.high, ctx.acts = low, high, acts
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        (x,) = ctx.saved_tensors
        outward = ((grad < 0) & (x > ctx.high)) | ((grad > 0) & (x < ctx.low))
        return torch.where(outward, grad * (1 - 2 * ctx.acts), grad), None, None, None
