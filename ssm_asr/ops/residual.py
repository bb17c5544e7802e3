"""What connects the modules of a layer: bypass, residuals with masks, forks.

Source: Yao et al. (arXiv 2310.11230), section 3.3. Shapes: B batch, T frames, S frames at a lower rate, D channels.
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
    """orig + (new - orig)·scale, (B, T, D).

    Args:
        orig_BTD: T frames.
        new_BSD: S = T / factor frames, rounded up; each stands for `factor` frames.
        scale_D: the share of `new` in each channel.
        keep_B11: False for sequences that stay as they are in `orig`.
        limits: how the gradient of the scale is limited; see ssm_asr.ops.limit.
        factor: frames of `orig` for one of `new`.
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
    """x + y·mask, the mask (B, 1, D) or (B, 1, 1); without x or without a mask what is left of it."""
    if mask_B1D is not None and dispatch.use_kernels(y_BTD) and (x_BTD is None or x_BTD.dtype == y_BTD.dtype):
        from ssm_asr.ops import residual_kernel  # only where Triton is installed

        return residual_kernel.add_masked(x_BTD, y_BTD, mask_B1D)
    y_BTD = y_BTD if mask_B1D is None else y_BTD * mask_B1D
    return y_BTD if x_BTD is None else x_BTD + y_BTD


def fork(x: Tensor, branches: int) -> tuple[Tensor, ...]:
    """x for each of at most 5 users; on a GPU their gradients are added up in one pass."""
    if dispatch.use_kernels(x) and x.requires_grad:
        from ssm_asr.ops import residual_kernel  # only where Triton is installed

        return residual_kernel.fork(x, branches)
    return (x,) * branches
