"""These are ScaledAdam's passes over all parameters. A kernel reads and writes each element once per pass.

Source: Yao et al., "Zipformer" (arXiv 2310.11230), section 3.5.

Shapes: T tensors of a parameter group, laid out in C rows of R elements.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ssm_asr.ops import dispatch


class Rows(NamedTuple):
    """Holds the tensors of a parameter group end to end, each starting a new row, and the tensor number of each row."""

    param_CR: Tensor
    grad_CR: Tensor
    delta_CR: Tensor  # the momentum: what the next step adds
    exp_avg_sq_CR: Tensor
    tensor_of_row_C: Tensor


def row_dots(x_CR: Tensor, y_CR: Tensor) -> Tensor:
    """Returns the dot product of each row of x with the row of y, (C,)."""
    if dispatch.use_kernels(x_CR) and x_CR.dtype == torch.float32:
        from ssm_asr.ops import scaled_adam_kernel  # only where Triton is installed

        return scaled_adam_kernel.dots(x_CR, y_CR)
    return (x_CR * y_CR).sum(dim=1)


def add_step(
    rows: Rows,
    scale_T: Tensor,
    growth_T: Tensor | None,
    factor: Tensor,
    finite: Tensor,
    betas: tuple[float, float],
    correction: float,
    eps: float,
) -> None:
    """Updates the moments in place and adds the resulting step to the parameters.

    The plain form overwrites the gradients.

    Args:
        rows: parameters, gradients and moments.
        scale_T: what Adam's step is multiplied by, for each tensor.
        growth_T: how much each tensor grows as a whole, relative to itself; None grows none.
        factor: what gradients are multiplied by; 0 if they are not finite.
        finite: 1, or 0 to leave the parameters as they are.
        betas: decay rates of the momentum and of the mean squared gradient.
        correction: what the mean squared gradient is divided by to correct its bias.
        eps: added to the root of the mean squared gradient.
    """
    param_CR, grad_CR, delta_CR, exp_avg_sq_CR, tensor_of_row_C = rows
    if dispatch.use_kernels(param_CR) and param_CR.dtype == torch.float32:
        from ssm_asr.ops import scaled_adam_kernel  # only where Triton is installed

        matrices = (grad_CR, exp_avg_sq_CR, delta_CR, param_CR, tensor_of_row_C)
        scaled_adam_kernel.add_step(*matrices, scale_T, growth_T, factor, finite, betas, correction, eps)
        return
    beta1, beta2 = betas
    # A factor of 0 makes NaN of a gradient that is not finite.
    grad_CR.mul_(factor).nan_to_num_(nan=0.0)
    exp_avg_sq_CR.mul_(beta2).addcmul_(grad_CR, grad_CR, value=1 - beta2)
    denominator_CR = (exp_avg_sq_CR / correction).sqrt_().add_(eps)
    update_CR = grad_CR.div_(denominator_CR).mul_(scale_T[tensor_of_row_C, None])
    if growth_T is not None:
        update_CR.addcmul_(param_CR, growth_T[tensor_of_row_C, None])
    delta_CR.mul_(beta1).add_(update_CR, alpha=1 - beta1)
    param_CR.addcmul_(delta_CR, finite)
