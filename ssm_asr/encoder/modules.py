"""Small building blocks of the Zipformer: activations, BiasNorm, bypass, feed-forward, change of frame rate.

Source: Yao et al., "Zipformer" (arXiv 2310.11230), sections 3.1 to 3.3.

Shapes: B batch, T frames, S frames at a lower rate, D channels, F hidden channels.
"""

import torch
from torch import Tensor, nn

from ssm_asr.encoder.regularize import Balancer, Dropout, LimitParameter, Schedule, Value, Whiten
from ssm_asr.ops.bias_norm import bias_norm
from ssm_asr.ops.linear import linear
from ssm_asr.ops.resample import downsample
from ssm_asr.ops.residual import bypass
from ssm_asr.ops.swoosh import swoosh


class Swoosh(nn.Module):
    """One of the two Swoosh activations (equations 5 and 6): log(1 + exp(x - shift)) - 0.08·x - offset."""

    def __init__(self, shift: float, offset: float) -> None:
        super().__init__()
        self.shift, self.offset = shift, offset

    def forward(self, x: Tensor, balancer: Balancer | None = None, dropout: Dropout | None = None) -> Tensor:
        """Returns dropout(swoosh(balancer(x))), in the shape of x.

        The balancer and the dropout are arguments so that one GPU kernel can compute all three in one pass.
        """
        by = None if balancer is None else balancer.settings(x)
        drop = None if dropout is None else dropout.settings(x)
        return swoosh(x, self.shift, self.offset, by, drop)


class SwooshL(Swoosh):
    """log(1 + exp(x - 4)) - 0.08·x - 0.035, for modules whose output should be near 0 for most inputs."""

    def __init__(self) -> None:
        super().__init__(4.0, 0.035)


class SwooshR(Swoosh):
    """log(1 + exp(x - 1)) - 0.08·x - 0.313261687, which is 0 at x = 0."""

    def __init__(self) -> None:
        super().__init__(1.0, 0.313261687)


class Linear(nn.Linear):
    """nn.Linear, computed by ssm_asr.ops.linear, which has a faster bias gradient on a GPU."""

    def forward(self, x: Tensor) -> Tensor:
        """Maps (…, in_features) -> (…, out_features)."""
        return linear(x, self.weight, self.bias)


def scaled_linear(in_features: int, out_features: int, scale: float, bias: bool = True) -> Linear:
    """Makes a linear layer: `scale` multiplies the default initial weights, and the bias is uniform in ±0.1·scale."""
    layer = Linear(in_features, out_features, bias=bias)
    scale_parameters_(layer, scale)
    return layer


def scale_parameters_(module: nn.Linear | nn.Conv1d | nn.Conv2d, scale: float) -> None:
    """Multiplies the weights of a new layer by `scale` in place, and draws its bias anew, uniform in ±0.1·scale."""
    with torch.no_grad():
        module.weight.mul_(scale)
        if module.bias is not None:
            module.bias.uniform_(-0.1 * scale, 0.1 * scale)


class BiasNorm(nn.Module):
    """Computes x · exp(log_scale) / rms(x - bias), with the rms taken over channels (equation 4)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(1.0))
        self.bias = nn.Parameter(torch.randn(channels) * 1e-4)
        self.limit = LimitParameter(-1.5, 1.5)

    def forward(self, x: Tensor) -> Tensor:
        """Normalises x, of any shape (…, D)."""
        return bias_norm(x, self.bias, self.log_scale, self.limit.settings())


class Bypass(nn.Module):
    """Computes orig + (new - orig)·bypass_scale, with a learned scale for each channel (section 3.3).

    Args:
        channels: D.
        factor: frames of `orig` for one frame of `new`, which is repeated to match.
    """

    def __init__(self, channels: int, factor: int = 1) -> None:
        super().__init__()
        self.factor = factor
        self.bypass_scale = nn.Parameter(torch.full((channels,), 0.5))
        self.limit = LimitParameter(Schedule((0, 0.9), (20000, 0.2)), 1.0)

    def forward(self, orig_BTD: Tensor, new_BSD: Tensor, keep_B11: Tensor | None = None) -> Tensor:
        """Returns (B, T, D).

        Args:
            orig_BTD: the input of the bypassed module.
            new_BSD: its output, of S = T / factor frames, rounded up.
            keep_B11: False for sequences that skip the module; None if none does.
        """
        return bypass(orig_BTD, new_BSD, self.bypass_scale, keep_B11, self.limit.settings(), self.factor)


class FeedForward(nn.Module):
    """Applies a linear layer, SwooshL, dropout and a linear layer. Dropout uses one mask for all frames.

    Args:
        channels: D.
        hidden: F.
        dropout: rate of dropout.
    """

    def __init__(self, channels: int, hidden: int, dropout: Value) -> None:
        super().__init__()
        self.in_proj = Linear(channels, hidden)
        self.balancer = Balancer(positive=(0.3, 1.0), abs=(0.75, 5.0))
        self.activation = SwooshL()
        self.dropout = Dropout(dropout, shared_dim=1)
        self.out_proj = scaled_linear(hidden, channels, 0.1)
        self.whiten = Whiten(Schedule((0, 7.5), (20000, 15.0)))

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Maps (B, T, D) -> (B, T, D)."""
        hidden_BTF = self.activation(self.in_proj(x_BTD), self.balancer, self.dropout)
        return self.whiten(self.out_proj(hidden_BTF))


class Downsample(nn.Module):
    """Replaces each group of `factor` frames by its weighted mean, with the learned weights softmax(bias).

    The last frame is repeated to fill the last group.
    """

    def __init__(self, factor: int) -> None:
        super().__init__()
        self.factor = factor
        self.bias = nn.Parameter(torch.zeros(factor))

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Maps (B, T, D) -> (B, S, D), with S = T / factor rounded up."""
        return downsample(x_BTD, self.bias)


def set_channels(x_BTD: Tensor, channels: int) -> Tensor:
    """Cuts x to its first `channels` channels, or appends channels of zeros: (B, T, D) -> (B, T, channels)."""
    if channels <= x_BTD.shape[-1]:
        return x_BTD[..., :channels]
    return nn.functional.pad(x_BTD, (0, channels - x_BTD.shape[-1]))
