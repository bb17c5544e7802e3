"""This operation returns its input and adds a gradient that pushes large numbers down.

Source: Yao et al., "Zipformer" (arXiv 2310.11230), appendix A.
"""

from typing import Any

import torch
from torch import Tensor

from ssm_asr.ops.numbers import Number


def penalize_large(x: Tensor, limit: float, penalty: Number) -> Tensor:
    """Returns x itself. The backward pass adds the gradient of penalty · Σ max(0, |x| - limit).

    Args:
        x: of any shape.
        limit: the absolute value above which a number is penalised.
        penalty: weight of the penalty; 0 adds nothing.
    """
    penalized: Tensor = _PenalizeLarge.apply(x, limit, penalty)
    return penalized


class _PenalizeLarge(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, limit: float, penalty: Number) -> Tensor:
        ctx.save_for_backward((x > limit).to(torch.int8) - (x < -limit).to(torch.int8))
        ctx.penalty = penalty
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (sign,) = ctx.saved_tensors
        return grads[0] + (ctx.penalty * sign).to(grads[0].dtype), None, None
