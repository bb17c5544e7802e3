"""Batch normalisation of padded sequences. Shapes: B batch, D channels, T frames."""

import torch
from torch import Tensor, nn

from ssm_asr.ops.precision import at_least_float32


class MaskedBatchNorm(nn.Module):
    """Batch norm (Ioffe and Szegedy, arXiv 1502.03167) whose means and variances in training leave out padding.

    Parameters and buffers are named as those of nn.BatchNorm1d, and mean the same; among several processes, each
    uses its own batch. In evaluation it is a fixed affine map, frame by frame, and so the same in streaming.
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
        """(B, D, T) -> (B, D, T); True in the mask is padding."""
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
        """Moves the running statistics; not to what is no number, since it would stay for ever."""
        for running_D, new_D in ((self.running_mean, mean_D), (self.running_var, var_D)):
            new_D = new_D.to(running_D.dtype)
            running_D.lerp_(torch.where(new_D.isfinite(), new_D, running_D), self.momentum)
        self.num_batches_tracked += 1
