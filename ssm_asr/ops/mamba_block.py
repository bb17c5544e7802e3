"""These operations stand around Mamba-2's state-space operation in its block.

A causal convolution with SiLU comes before it, a gated RMS norm after it.

Source: Dao and Gu, "Transformers are SSMs" (arXiv 2405.21060), section 7.

Shapes: B batch, T frames, C convolved channels, I inner channels, K frames in the cache of the convolution, which has
K + 1 taps.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from ssm_asr.ops import dispatch
from ssm_asr.ops.depthwise import depthwise


def causal_conv_silu(
    conv: nn.Conv1d, x_BTC: Tensor, padding_mask_BT: Tensor | None, cache_BCK: Tensor, *, fresh: bool
) -> tuple[Tensor, Tensor]:
    """Computes the SiLU of a causal depthwise convolution, which continues after the K frames in the cache.

    Args:
        conv: a depthwise convolution with K + 1 taps, a bias and no padding.
        x_BTC: the frames.
        padding_mask_BT: True at padding, which may only be at the ends of sequences. x counts as 0 there.
        cache_BCK: the K frames before x.
        fresh: whether the caller knows that the cache holds zeros. A kernel can then do without it.

    Returns:
        The output (B, T, C), and the new cache, in the type of the given one: the last K valid frames of each sequence,
        which may reach back into the given cache.
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
        # K cached frames come first, so the last K valid frames start at the number of valid frames in x.
        index_BK = (~padding_mask_BT).sum(dim=1, keepdim=True) + torch.arange(cache_BCK.shape[2], device=x_BCT.device)
        last_BCK = padded.gather(2, index_BK[:, None].expand(-1, x_BCT.shape[1], -1))
    y_BCT = functional.silu(depthwise(conv, padded))
    return y_BCT.transpose(1, 2), last_BCK.to(cache_BCK.dtype)


def _last_frames(x_BTC: Tensor, padding_mask_BT: Tensor | None, count: int) -> Tensor:
    """Returns the last `count` valid frames of whole sequences, (B, C, K), with zeros before the first frame."""
    if padding_mask_BT is None:
        padding_mask_BT = torch.zeros(x_BTC.shape[:2], dtype=torch.bool, device=x_BTC.device)
    index_BK = (~padding_mask_BT).sum(dim=1, keepdim=True) + torch.arange(-count, 0, device=x_BTC.device)
    last_BKC = x_BTC.gather(1, index_BK.clamp(min=0)[..., None].expand(-1, -1, x_BTC.shape[2]))
    return last_BKC.masked_fill((index_BK < 0)[..., None], 0.0).transpose(1, 2)


def gated_norm(y_BTI: Tensor, z_BTI: Tensor, weight_I: Tensor, groups: int, eps: float) -> Tensor:
    """Returns weight·v / rms(v) with v = y·SiLU(z), (B, T, I). The result of the kernel has the type of z.

    Args:
        y_BTI: output of the state-space operation.
        z_BTI: the gate.
        weight_I: learned weights.
        groups: number of equal parts of the channels, over each of which an rms is taken.
        eps: added to the mean square.
    """
    if dispatch.use_kernels(y_BTI) and y_BTI.dtype == torch.float32:
        from ssm_asr.ops.mamba_block_kernel import gated_norm as gated_norm_kernel  # only where Triton is installed

        return gated_norm_kernel(y_BTI, z_BTI, weight_I, groups, eps)
    B, T, _ = y_BTI.shape
    gated = (y_BTI * functional.silu(z_BTI)).reshape(B, T, groups, -1)
    normed = gated * torch.rsqrt(gated.square().mean(dim=-1, keepdim=True) + eps)
    return normed.flatten(2) * weight_I
