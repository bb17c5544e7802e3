"""These kernels compute ScaledAdam's passes over all parameters. Each reads and writes an element once.

Shapes: T tensors of a parameter group, laid out in C rows of R elements.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _dots_kernel(x_ptr, y_ptr, dots_ptr, R: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0)
    place = row.to(tl.int64) * R + tl.arange(0, R)
    tl.store(dots_ptr + row, tl.sum(tl.load(x_ptr + place) * tl.load(y_ptr + place), axis=0))


@triton.jit
def _step_kernel(  # type: ignore[no-untyped-def]
    grad_ptr, exp_avg_sq_ptr, delta_ptr, param_ptr, tensor_of_row_ptr, scale_ptr, growth_ptr, factor_ptr, finite_ptr,
    beta1, rest1, beta2, rest2, correction, eps, GROWS: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    place = row.to(tl.int64) * R + tl.arange(0, R)
    tensor = tl.load(tensor_of_row_ptr + row)
    finite = tl.load(finite_ptr)
    grad = tl.where(finite > 0, tl.load(grad_ptr + place) * tl.load(factor_ptr), 0.0)
    exp_avg_sq = tl.load(exp_avg_sq_ptr + place) * beta2 + grad * grad * rest2
    tl.store(exp_avg_sq_ptr + place, exp_avg_sq)
    update = grad / (tl.sqrt(exp_avg_sq / correction) + eps) * tl.load(scale_ptr + tensor)
    param = tl.load(param_ptr + place)
    if GROWS:
        update += param * tl.load(growth_ptr + tensor)
    delta = tl.load(delta_ptr + place) * beta1 + update * rest1
    tl.store(delta_ptr + place, delta)
    tl.store(param_ptr + place, param + delta * finite)


def dots(x_CR: Tensor, y_CR: Tensor) -> Tensor:
    """Returns the dot product of each row of x with the row of y, (C,)."""
    C, R = x_CR.shape
    dots_C = x_CR.new_empty(C)
    _dots_kernel[(C,)](x_CR, y_CR, dots_C, R=R)
    return dots_C


def add_step(
    grad_CR: Tensor,
    exp_avg_sq_CR: Tensor,
    delta_CR: Tensor,
    param_CR: Tensor,
    tensor_of_row_C: Tensor,
    scale_T: Tensor,
    growth_T: Tensor | None,
    factor: Tensor,
    finite: Tensor,
    betas: tuple[float, float],
    correction: float,
    eps: float,
) -> None:
    """Computes `ssm_asr.ops.scaled_adam.add_step` by one kernel. It does not overwrite the gradients."""
    C, R = param_CR.shape
    beta1, beta2 = betas
    numbers: Any = (beta1, 1 - beta1, beta2, 1 - beta2, correction, eps)
    _step_kernel[(C,)](
        grad_CR, exp_avg_sq_CR, delta_CR, param_CR, tensor_of_row_C, scale_T, scale_T if growth_T is None else growth_T,
        factor, finite, *numbers, GROWS=growth_T is not None, R=R,
    )  # fmt: skip
