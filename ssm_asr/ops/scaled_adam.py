"""The passes of ScaledAdam over all elements, of which a kernel reads and writes each once.

Source: Yao et al. (arXiv 2310.11230), section 3.5. Shapes: T tensors, laid out in C rows of R elements.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ssm_asr.ops import dispatch


class Rows(NamedTuple):
    """The tensors of a parameter group laid end to end, each starting a new row, and each row's tensor number."""

    param_CR: Tensor
    grad_CR: Tensor
    delta_CR: Tensor  # the momentum: what the next step adds
    exp_avg_sq_CR: Tensor
    tensor_of_row_C: Tensor


def row_dots(x_CR: Tensor, y_CR: Tensor) -> Tensor:
    """The dot product of each row of one with the row of the other: (C,)."""
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
    """Brings the moments up to date, and adds the step that follows from them to the parameters, all in place.

    Args:
        scale_T: of Adam's step, for each tensor.
        growth_T: how much each tensor grows as a whole, relative to itself; None for not at all.
        factor: what the gradients are multiplied by, 0 where they are not finite.
        finite: 1, or 0 to leave the parameters as they are.
        betas: decay rates of the momentum and of the mean squared gradient.
        correction: of the mean squared gradient's bias.
        eps: added to its root.
    """
    param_CR, grad_CR, delta_CR, exp_avg_sq_CR, tensor_of_row_C = rows
    if dispatch.use_kernels(param_CR) and param_CR.dtype == torch.float32:
        from ssm_asr.ops import scaled_adam_kernel  # only where Triton is installed

        matrices = (grad_CR, exp_avg_sq_CR, delta_CR, param_CR, tensor_of_row_C)
        scaled_adam_kernel.add_step(*matrices, scale_T, growth_T, factor, finite, betas, correction, eps)
        return
    beta1, beta2 = betas
    # A factor of zero leaves NaN where the gradient was not finite.
    grad_CR.mul_(factor).nan_to_num_(nan=0.0)
    exp_avg_sq_CR.mul_(beta2).addcmul_(grad_CR, grad_CR, value=1 - beta2)
    denominator_CR = (exp_avg_sq_CR / correction).sqrt_().add_(eps)
    update_CR = grad_CR.div_(denominator_CR).mul_(scale_T[tensor_of_row_C, None])
    if growth_T is not None:
        update_CR.addcmul_(param_CR, growth_T[tensor_of_row_C, None])
    delta_CR.mul_(beta1).add_(update_CR, alpha=1 - beta1)
    param_CR.addcmul_(delta_CR, finite)
