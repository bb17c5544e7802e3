"""A gradient that pushes large numbers down, beside the identity (Yao et al., arXiv 2310.11230, appendix A)."""

from typing import Any

import torch
from torch import Tensor

from ssm_asr.ops.numbers import Number


def penalize_large(x: Tensor, limit: float, penalty: Number) -> Tensor:
    """x itself; its gradient gets the one of penalty · Σ max(0, |x| - limit)."""
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
