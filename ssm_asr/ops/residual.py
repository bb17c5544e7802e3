"""These operations connect the modules of a layer: bypasses, residual connections with masks, and forks.

Source: Yao et al., "Zipformer" (arXiv 2310.11230), section 3.3.

Shapes: B batch, T frames, S frames at a lower rate, D channels.
"""

import torch
from torch import Tensor

from ssm_asr.ops import dispatch
from ssm_asr.ops.limit import limit
from ssm_asr.ops.numbers import Numbers, known_zero, on_device
from ssm_asr.ops.resample import upsample


def bypass(
    orig_BTD: Tensor,
    new_BSD: Tensor,
    scale_D: Tensor,
    keep_B11: Tensor | None = None,
    limits: Numbers | None = None,
    factor: int = 1,
) -> Tensor:
    """Returns orig + (new - orig)·scale, (B, T, D).

    Args:
        orig_BTD: the input of the bypassed modules.
        new_BSD: their output, with S = T / factor frames, rounded up. Each frame is repeated `factor` times.
        scale_D: the share of `new` in each channel of the result.
        keep_B11: False for sequences for which the result is `orig`; None keeps `new` for all.
        limits: the numbers of `ssm_asr.ops.limit.limit` for the scale; None does not limit it.
        factor: how many frames of `orig` one frame of `new` stands for.
    """
    if dispatch.use_kernels(orig_BTD) and orig_BTD.dtype == new_BSD.dtype:
        from ssm_asr.ops import residual_kernel  # only where Triton is installed

        if limits is not None:
            limits = None if known_zero(limits[0]) else on_device(limits, orig_BTD.device)
        return residual_kernel.bypass(orig_BTD, new_BSD, scale_D, keep_B11, limits, factor)
    new_BTD = upsample(new_BSD, factor, orig_BTD.shape[1])
    scale = limit(scale_D, limits)
    scale = scale if keep_B11 is None else scale * keep_B11
    return torch.addcmul(orig_BTD, new_BTD - orig_BTD, scale.to(orig_BTD.dtype))


def add_masked(x_BTD: Tensor | None, y_BTD: Tensor, mask_B1D: Tensor | None) -> Tensor:
    """Returns x + y·mask, (B, T, D).

    Args:
        x_BTD: None leaves out the sum.
        y_BTD: of the shape of x.
        mask_B1D: (B, 1, D) or (B, 1, 1), of any type; None leaves out the product.
    """
    if mask_B1D is not None and dispatch.use_kernels(y_BTD) and (x_BTD is None or x_BTD.dtype == y_BTD.dtype):
        from ssm_asr.ops import residual_kernel  # only where Triton is installed

        return residual_kernel.add_masked(x_BTD, y_BTD, mask_B1D)
    y_BTD = y_BTD if mask_B1D is None else y_BTD * mask_B1D
    return y_BTD if x_BTD is None else x_BTD + y_BTD


def fork(x: Tensor, branches: int) -> tuple[Tensor, ...]:
    """Returns x once for each branch, so that on a GPU one kernel can add up the branches' gradients.

    Args:
        x: of any shape.
        branches: number of modules that use x, at most 5.
    """
    if dispatch.use_kernels(x) and x.requires_grad:
        from ssm_asr.ops import residual_kernel  # only where Triton is installed

        return residual_kernel.fork(x, branches)
    return (x,) * branches
