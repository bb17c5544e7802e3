"""Batch normalisation of padded sequences.

Shapes: B batch, D channels, T frames.
"""

import torch
from torch import Tensor, nn

from ssm_asr.ops.precision import at_least_float32


class MaskedBatchNorm(nn.Module):
    """Batch norm whose means and variances, in training, leave out padding.

    Its parameters and buffers have the names and the meaning that nn.BatchNorm1d gives them. When several processes
    train, each normalises by its own batch. In evaluation it is a fixed affine map of each frame, so that streaming and
    whole-utterance results agree.

    Source: Ioffe and Szegedy (arXiv 1502.03167).

    Args:
        channels: D.
        momentum: weight of the new batch in the running statistics.
        eps: is added to the variance before its root is taken.
    """

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, channels: int, momentum: float = 0.1, eps: float = 1e-5) -> None:
        super().__init__()
        self.momentum, self.eps = momentum, eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.register_buffer("num_batches_tracked", torch.tensor(0))

    def forward(self, x_BDT: Tensor, padding_mask_BT: Tensor | None = None) -> Tensor:
        """Normalises (B, D, T) and returns (B, D, T); the mask is True at padding, and None means no padding."""
        if not self.training:
            return nn.functional.batch_norm(
                x_BDT, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
            )
        x_float = at_least_float32(x_BDT)
        if padding_mask_BT is None:
            padding_mask_BT = x_BDT.new_zeros(x_BDT.shape[0], x_BDT.shape[2], dtype=torch.bool)
        padding_B1T = padding_mask_BT[:, None]
        count = (~padding_mask_BT).sum()
        mean_D = x_float.masked_fill(padding_B1T, 0.0).sum(dim=(0, 2)) / count.clamp(min=1)
        centred_BDT = x_float - mean_D[:, None]
        squares_D = centred_BDT.square().masked_fill(padding_B1T, 0.0).sum(dim=(0, 2))
        self._track(mean_D.detach(), squares_D.detach() / (count - 1).clamp(min=1))
        scale_D = self.weight * (squares_D / count.clamp(min=1) + self.eps).rsqrt()
        return (centred_BDT * scale_D[:, None] + self.bias[:, None]).to(x_BDT.dtype)

    def _track(self, mean_D: Tensor, var_D: Tensor) -> None:
        """Moves the running statistics towards the batch's, but never to inf or NaN, which would stay for ever."""
        for running_D, new_D in ((self.running_mean, mean_D), (self.running_var, var_D)):
            new_D = new_D.to(running_D.dtype)
            running_D.lerp_(torch.where(new_D.isfinite(), new_D, running_D), self.momentum)
        self.num_batches_tracked += 1
