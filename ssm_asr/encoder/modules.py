"""Small building blocks of the Zipformer: activations, BiasNorm, bypass, feed-forward, change of frame rate.

Source: Yao et al. (arXiv 2310.11230), sections 3.1 - 3.3. Shapes: B batch, T time, D channels, F hidden channels.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ssm_asr.encoder.regularize import Balancer, Dropout, LimitParameter, Schedule, Scheduled, Value, Whiten, never
from ssm_asr.ssm import kernels


class _Swoosh(torch.autograd.Function):
    """log(1 + exp(x - shift)) - 0.08·x - offset, keeping only x for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shift: float, offset: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.shift = shift
        if kernels.usable(x) and _dense(x):
            from ssm_asr.encoder.kernels.elementwise import swoosh  # only where Triton is installed

            return swoosh(x, shift, offset)
        return nn.functional.softplus(x - shift).sub_(offset).sub_(x, alpha=0.08)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        if kernels.usable(x) and _dense(x):
            from ssm_asr.encoder.kernels.elementwise import swoosh

            return swoosh(x, ctx.shift, 0.0, grads[0]), None, None
        return (x - ctx.shift).sigmoid_().sub_(0.08).mul_(grads[0]), None, None


def _dense(x: Tensor) -> bool:
    return x.is_contiguous() or (x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last))


class Swoosh(nn.Module):
    """One of the two Swoosh activations (equations 5 and 6)."""

    def __init__(self, shift: float, offset: float) -> None:
        super().__init__()
        self.shift, self.offset = shift, offset

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_tracing() or torch.compiler.is_compiling():
            return nn.functional.softplus(x - self.shift) - 0.08 * x - self.offset
        return _Swoosh.apply(x, self.shift, self.offset)


class SwooshL(Swoosh):
    """log(1 + exp(x - 4)) - 0.08·x - 0.035: for outputs that should be nearly off for most inputs."""

    def __init__(self) -> None:
        super().__init__(4.0, 0.035)


class SwooshR(Swoosh):
    """log(1 + exp(x - 1)) - 0.08·x - 0.313261687, which is 0 at 0."""

    def __init__(self) -> None:
        super().__init__(1.0, 0.313261687)


def scaled_linear(in_features: int, out_features: int, scale: float, bias: bool = True) -> nn.Linear:
    """nn.Linear with default weights times `scale` and a bias uniform in ±0.1·scale."""
    linear = nn.Linear(in_features, out_features, bias=bias)
    scale_parameters_(linear, scale)
    return linear


def scale_parameters_(module: nn.Linear | nn.Conv1d | nn.Conv2d, scale: float) -> None:
    """Scales a fresh layer's weights in place and draws its bias anew, uniform in ±0.1·scale."""
    with torch.no_grad():
        module.weight.mul_(scale)
        if module.bias is not None:
            module.bias.uniform_(-0.1 * scale, 0.1 * scale)


class BiasNorm(nn.Module):
    """y = x · exp(log_scale) / rms(x - bias), the rms over channels (equation 4); any shape (…, D)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(1.0))
        self.bias = nn.Parameter(torch.randn(channels) * 1e-4)
        self.limit = LimitParameter(-1.5, 1.5)

    def forward(self, x: Tensor) -> Tensor:
        log_scale = self.limit(self.log_scale) if self.training else self.log_scale
        # x is float16 or bfloat16 under autocast, the bias never: the mean square is taken in the bias's precision.
        mean_square = (x - self.bias).square().mean(dim=-1, keepdim=True)
        return x * (mean_square.rsqrt() * log_scale.exp()).to(x.dtype)


class Bypass(Scheduled):
    """orig + (new - orig)·bypass_scale, a learned scale a channel (section 3.3).

    Args:
        skip_rate: probability that a training sequence skips the module altogether.
    """

    def __init__(self, channels: int, skip_rate: Value = 0.0) -> None:
        super().__init__()
        self.bypass_scale = nn.Parameter(torch.full((channels,), 0.5))
        self.limit = LimitParameter(Schedule((0, 0.9), (20000, 0.2)), 1.0)
        self.skip_rate = skip_rate

    def forward(self, orig_BTD: Tensor, new_BTD: Tensor) -> Tensor:
        scale = self.bypass_scale
        if self.training:
            scale = self.limit(scale)
            skip_rate = self.now(self.skip_rate)
            if not never(skip_rate):
                keep_B11 = torch.rand(orig_BTD.shape[0], 1, 1, device=orig_BTD.device) > skip_rate
                scale = scale * keep_B11
        return torch.addcmul(orig_BTD, new_BTD - orig_BTD, scale.to(orig_BTD.dtype))


class FeedForward(nn.Module):
    """Linear, SwooshL, dropout with one mask along time, Linear."""

    def __init__(self, channels: int, hidden: int, dropout: Value) -> None:
        super().__init__()
        self.in_proj = nn.Linear(channels, hidden)
        self.balancer = Balancer(positive=(0.3, 1.0), abs=(0.75, 5.0))
        self.activation = SwooshL()
        self.dropout = Dropout(dropout, shared_dim=1)
        self.out_proj = scaled_linear(hidden, channels, 0.1)
        self.whiten = Whiten(Schedule((0, 7.5), (20000, 15.0)))

    def forward(self, x_BTD: Tensor) -> Tensor:
        hidden_BTF = self.dropout(self.activation(self.balancer(self.in_proj(x_BTD))))
        return self.whiten(self.out_proj(hidden_BTF))


class Downsample(nn.Module):
    """Weighted mean of each group of `factor` frames, with learned weights softmax(bias).

    The last frame is repeated to fill the last group: (B, T, D) -> (B, ceil(T/factor), D).
    """

    def __init__(self, factor: int) -> None:
        super().__init__()
        self.factor = factor
        self.bias = nn.Parameter(torch.zeros(factor))

    def forward(self, x_BTD: Tensor) -> Tensor:
        missing = -x_BTD.shape[1] % self.factor
        if missing:
            x_BTD = torch.cat([x_BTD, x_BTD[:, -1:].expand(-1, missing, -1)], dim=1)
        B, T, D = x_BTD.shape
        groups = x_BTD.reshape(B, T // self.factor, self.factor, D)
        weights = self.bias.softmax(dim=0).to(x_BTD.dtype)
        return (groups * weights[:, None]).sum(dim=2)


def upsample(x_BTD: Tensor, factor: int, frames: int) -> Tensor:
    """Repeats each frame `factor` times and cuts to `frames`."""
    return x_BTD.repeat_interleave(factor, dim=1)[:, :frames]


def set_channels(x_BTD: Tensor, channels: int) -> Tensor:
    """Cuts, or fills with zeros, to the given number of channels."""
    if channels <= x_BTD.shape[-1]:
        return x_BTD[..., :channels]
    return nn.functional.pad(x_BTD, (0, channels - x_BTD.shape[-1]))
