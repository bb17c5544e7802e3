"""These operations lower the frame rate and raise it again.

Source: Yao et al., "Zipformer" (arXiv 2310.11230), section 3.1.

Shapes: B batch, T frames, S = T / F groups of F frames, rounded up, D channels.
"""

import torch
from torch import Tensor

from ssm_asr.ops import dispatch


def downsample(x_BTD: Tensor, bias_F: Tensor) -> Tensor:
    """Returns the weighted mean of each group of F frames, (B, S, D) in the type of x.

    The last frame is repeated until the last group is full.

    Args:
        x_BTD: at least one frame.
        bias_F: the weights of a group's frames are softmax(bias).
    """
    factor = len(bias_F)
    if dispatch.use_kernels(x_BTD) and factor & (factor - 1) == 0:
        from ssm_asr.ops.resample_kernel import downsample as downsample_kernel  # only where Triton is installed

        return downsample_kernel(x_BTD, bias_F)
    missing = -x_BTD.shape[1] % factor
    if missing:
        x_BTD = torch.cat([x_BTD, x_BTD[:, -1:].expand(-1, missing, -1)], dim=1)
    B, T, D = x_BTD.shape
    groups_BSFD = x_BTD.reshape(B, T // factor, factor, D)
    weights_F = bias_F.softmax(dim=0).to(x_BTD.dtype)
    return (groups_BSFD * weights_F[:, None]).sum(dim=2)


def upsample(x_BSD: Tensor, factor: int, frames: int) -> Tensor:
    """Repeats each frame `factor` times and returns the first `frames` frames."""
    if factor == 1:
        return x_BSD
    return x_BSD.repeat_interleave(factor, dim=1)[:, :frames]
