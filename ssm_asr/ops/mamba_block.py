"""What surrounds Mamba-2's operation: the causal convolution with its activation before it, the gated norm after it.

Source: Dao and Gu (arXiv 2405.21060), section 7. Shapes: B batch, T frames, C convolved channels, I inner channels,
K frames that the convolution keeps (its taps - 1).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from ssm_asr.ops import dispatch
from ssm_asr.ops.depthwise import depthwise


def causal_conv_silu(
    conv: nn.Conv1d, x_BTC: Tensor, padding_mask_BT: Tensor | None, cache_BCK: Tensor, *, fresh: bool
) -> tuple[Tensor, Tensor]:
    """SiLU of the causal depthwise convolution after the K frames in the cache.

    Args:
        conv: of all C channels, with K + 1 taps, a bias and no padding.
        x_BTC: T frames.
        padding_mask_BT: True at padding, which only the ends of sequences may have; x is taken for 0 there.
        cache_BCK: the K frames before.
        fresh: whether the caller knows that the cache holds zeros, so that it need not be read.

    Returns:
        (B, T, C), and the last K valid frames of each sequence, those of the cache included, in the type of the cache.
    """
    if fresh and dispatch.use_kernels(x_BTC) and cache_BCK.dtype == torch.float32:
        from ssm_asr.ops.mamba_block_kernel import convolve  # only where Triton is installed

        assert conv.bias is not None
        last_BCK = _last_frames(x_BTC, padding_mask_BT, cache_BCK.shape[2]).to(cache_BCK.dtype)
        return convolve(x_BTC, conv.weight, conv.bias, padding_mask_BT), last_BCK
    x_BCT, frames = x_BTC.transpose(1, 2), x_BTC.shape[1]
    if padding_mask_BT is not None:
        x_BCT = x_BCT.masked_fill(padding_mask_BT[:, None], 0.0)
    padded = torch.cat([cache_BCK.to(x_BCT.dtype), x_BCT], dim=2)
    if padding_mask_BT is None:
        last_BCK = padded[..., frames:]
    else:
        # Behind the K cached frames, the valid frames of a sequence end where their count says.
        index_BK = (~padding_mask_BT).sum(dim=1, keepdim=True) + torch.arange(cache_BCK.shape[2], device=x_BCT.device)
        last_BCK = padded.gather(2, index_BK[:, None].expand(-1, x_BCT.shape[1], -1))
    y_BCT = functional.silu(depthwise(conv, padded))
    return y_BCT.transpose(1, 2), last_BCK.to(cache_BCK.dtype)


def _last_frames(x_BTC: Tensor, padding_mask_BT: Tensor | None, count: int) -> Tensor:
    """The last `count` valid frames (B, C, K) of whole sequences, zeros before the first."""
    if padding_mask_BT is None:
        padding_mask_BT = torch.zeros(x_BTC.shape[:2], dtype=torch.bool, device=x_BTC.device)
    index_BK = (~padding_mask_BT).sum(dim=1, keepdim=True) + torch.arange(-count, 0, device=x_BTC.device)
    last_BKC = x_BTC.gather(1, index_BK.clamp(min=0)[..., None].expand(-1, -1, x_BTC.shape[2]))
    return last_BKC.masked_fill((index_BK < 0)[..., None], 0.0).transpose(1, 2)


def gated_norm(y_BTI: Tensor, z_BTI: Tensor, weight_I: Tensor, groups: int, eps: float) -> Tensor:
    """weight·v / rms(v) with v = y·SiLU(z), the rms over each of `groups` equal parts of the channels.

    The kernel's result has the type of z.
    """
    if dispatch.use_kernels(y_BTI) and y_BTI.dtype == torch.float32:
        from ssm_asr.ops.mamba_block_kernel import gated_norm as gated_norm_kernel  # only where Triton is installed

        return gated_norm_kernel(y_BTI, z_BTI, weight_I, groups, eps)
    B, T, _ = y_BTI.shape
    gated = (y_BTI * functional.silu(z_BTI)).reshape(B, T, groups, -1)
    normed = gated * torch.rsqrt(gated.square().mean(dim=-1, keepdim=True) + eps)
    return normed.flatten(2) * weight_I
