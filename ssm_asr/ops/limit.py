"""The gradient of a parameter that is kept near an interval (Yao et al., arXiv 2310.11230, section 3.4)."""

from typing import Any

import torch
from torch import Tensor

from ssm_asr.ops.numbers import Number, Numbers, known_zero


def limit(parameter: Tensor, numbers: Numbers | None) -> Tensor:
    """The parameter itself; gradients whose descent leads further out of the interval are flipped.

    Args:
        parameter: of any shape.
        numbers: whether it acts (0 or 1) and the interval's ends, which may be missing where the host knows that it
            does not act; None never acts.
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
