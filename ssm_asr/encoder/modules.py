"""Small building blocks of the Zipformer: activations, BiasNorm, bypass, feed-forward, change of frame rate.

Source: Yao et al. (arXiv 2310.11230), sections 3.1 - 3.3. Shapes: B batch, T time, D channels, F hidden channels.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ssm_asr.encoder.regularize import Balancer, Dropout, LimitParameter, Schedule, Value, Whiten
from ssm_asr.ops import dispatch


def _swoosh(x: Tensor, shift: float, offset: float) -> Tensor:
    return nn.functional.softplus(x - shift).sub_(offset).sub_(x, alpha=0.08)


class _Swoosh(torch.autograd.Function):
    """log(1 + exp(x - shift)) - 0.08·x - offset, keeping only x for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shift: float, offset: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.shift = shift
        return _swoosh(x, shift, offset)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        return (x - ctx.shift).sigmoid_().sub_(0.08).mul_(grads[0]), None, None


class Swoosh(nn.Module):
    """One of the two Swoosh activations (equations 5 and 6)."""

    def __init__(self, shift: float, offset: float) -> None:
        super().__init__()
        self.shift, self.offset = shift, offset

    def forward(self, x: Tensor, balancer: Balancer | None = None, dropout: Dropout | None = None) -> Tensor:
        """dropout(swoosh(balancer(x))): given to it, the other two take part in its kernels."""
        settings = None if balancer is None else balancer.settings(x)
        if balancer is not None and settings is None:
            x = balancer(x)
        if torch.jit.is_tracing() or torch.compiler.is_compiling():
            x = nn.functional.softplus(x - self.shift) - 0.08 * x - self.offset
        elif dispatch.usable(x):
            from ssm_asr.ops.swoosh_kernel import swoosh  # only where Triton is installed

            channel_dim, grad_scale = (1 if x.ndim == 4 and not x.is_contiguous() else -1), 0.0  # images: channels last
            if balancer is not None:
                channel_dim, grad_scale = balancer.channel_dim, balancer.grad_scale
            drop = None if dropout is None else dropout.numbers(x)
            x = swoosh(x, self.shift, self.offset, channel_dim, settings, grad_scale, *(drop or ()))
            if drop is not None:
                return x
        else:
            # Streaming is spared what the gradient costs.
            x = (_Swoosh.apply if x.requires_grad else _swoosh)(x, self.shift, self.offset)
        return x if dropout is None else dropout(x)


class SwooshL(Swoosh):
    """log(1 + exp(x - 4)) - 0.08·x - 0.035: for outputs that should be nearly off for most inputs."""

    def __init__(self) -> None:
        super().__init__(4.0, 0.035)


class SwooshR(Swoosh):
    """log(1 + exp(x - 1)) - 0.08·x - 0.313261687, which is 0 at 0."""

    def __init__(self) -> None:
        super().__init__(1.0, 0.313261687)


class _AddBias(torch.autograd.Function):
    """The identity for what has the bias in it already; its gradient's sums over frames, the bias's, by a kernel."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, bias: Tensor) -> Tensor:
        ctx.dtype = bias.dtype
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        from ssm_asr.ops.sums_kernel import column_sums  # only where Triton is installed

        return grads[0], column_sums(grads[0], ctx.dtype)


def biased(layer: Callable[[Tensor | None], Tensor], x: Tensor, bias: Tensor | None) -> Tensor:
    """layer(bias), which adds the bias to the last dimension; on a GPU its gradient takes a fourth of the time.

    Args:
        x: what the layer is applied to.
    """
    if bias is None or not bias.requires_grad or not torch.is_grad_enabled() or not dispatch.usable(x):
        return layer(bias)
    y: Tensor = _AddBias.apply(layer(bias.detach()), bias)
    return y


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """torch.nn.functional.linear, `biased`."""
    return biased(lambda bias: nn.functional.linear(x, weight, bias), x, bias)


class Linear(nn.Linear):
    """nn.Linear, `biased`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def scaled_linear(in_features: int, out_features: int, scale: float, bias: bool = True) -> Linear:
    """Linear with default weights times `scale` and a bias uniform in ±0.1·scale."""
    linear = Linear(in_features, out_features, bias=bias)
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
        settings = self.limit.settings(self.log_scale)
        log_scale = self.limit(self.log_scale) if settings is None else self.log_scale
        if dispatch.usable(x):
            from ssm_asr.ops.bias_norm_kernel import bias_norm  # only where Triton is installed

            return bias_norm(x, self.bias, log_scale, settings)
        # x is float16 or bfloat16 under autocast, the bias never: the mean square is taken in the bias's precision.
        mean_square = (x - self.bias).square().mean(dim=-1, keepdim=True)
        return x * (mean_square.rsqrt() * log_scale.exp()).to(x.dtype)


class Bypass(nn.Module):
    """orig + (new - orig)·bypass_scale, a learned scale a channel (section 3.3).

    Args:
        factor: how many frames of `orig` there are for one of `new`, which is repeated.
    """

    def __init__(self, channels: int, factor: int = 1) -> None:
        super().__init__()
        self.factor = factor
        self.bypass_scale = nn.Parameter(torch.full((channels,), 0.5))
        self.limit = LimitParameter(Schedule((0, 0.9), (20000, 0.2)), 1.0)

    def forward(self, orig_BTD: Tensor, new_BSD: Tensor, keep_B11: Tensor | None = None) -> Tensor:
        """(B, T, D) from S = T / factor frames, rounded up. Sequences for which `keep` is False skip the module."""
        by_kernel = dispatch.usable(orig_BTD) and orig_BTD.dtype == new_BSD.dtype
        settings = self.limit.settings(self.bypass_scale) if by_kernel else None
        scale = self.limit(self.bypass_scale) if settings is None else self.bypass_scale
        if by_kernel:
            from ssm_asr.ops.residual_kernel import bypass  # only where Triton is installed

            return bypass(orig_BTD, new_BSD, scale, keep_B11, settings, self.factor)
        new_BTD = upsample(new_BSD, self.factor, orig_BTD.shape[1])
        scale = scale if keep_B11 is None else scale * keep_B11
        return torch.addcmul(orig_BTD, new_BTD - orig_BTD, scale.to(orig_BTD.dtype))


def add_masked(x_BTD: Tensor | None, y_BTD: Tensor, mask_B1D: Tensor | None) -> Tensor:
    """x + y·mask, the mask (B, 1, D) or (B, 1, 1); without x or without a mask the rest of it."""
    if mask_B1D is not None and dispatch.usable(y_BTD) and (x_BTD is None or x_BTD.dtype == y_BTD.dtype):
        from ssm_asr.ops import residual_kernel as layer  # only where Triton is installed

        return layer.add_masked(x_BTD, y_BTD, mask_B1D)
    y_BTD = y_BTD if mask_B1D is None else y_BTD * mask_B1D
    return y_BTD if x_BTD is None else x_BTD + y_BTD


def fork(x: Tensor, branches: int) -> tuple[Tensor, ...]:
    """x for each of at most 5 users; on a GPU their gradients are added up at once."""
    if dispatch.usable(x) and x.requires_grad:
        from ssm_asr.ops import residual_kernel as layer  # only where Triton is installed

        return layer.fork(x, branches)
    return (x,) * branches


class FeedForward(nn.Module):
    """Linear, SwooshL, dropout with one mask along time, Linear."""

    def __init__(self, channels: int, hidden: int, dropout: Value) -> None:
        super().__init__()
        self.in_proj = Linear(channels, hidden)
        self.balancer = Balancer(positive=(0.3, 1.0), abs=(0.75, 5.0))
        self.activation = SwooshL()
        self.dropout = Dropout(dropout, shared_dim=1)
        self.out_proj = scaled_linear(hidden, channels, 0.1)
        self.whiten = Whiten(Schedule((0, 7.5), (20000, 15.0)))

    def forward(self, x_BTD: Tensor) -> Tensor:
        hidden_BTF = self.activation(self.in_proj(x_BTD), self.balancer, self.dropout)
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
        if dispatch.usable(x_BTD) and self.factor & (self.factor - 1) == 0:
            from ssm_asr.ops.downsample_kernel import downsample  # only where Triton is installed

            return downsample(x_BTD, self.bias)
        missing = -x_BTD.shape[1] % self.factor
        if missing:
            x_BTD = torch.cat([x_BTD, x_BTD[:, -1:].expand(-1, missing, -1)], dim=1)
        B, T, D = x_BTD.shape
        groups = x_BTD.reshape(B, T // self.factor, self.factor, D)
        weights = self.bias.softmax(dim=0).to(x_BTD.dtype)
        return (groups * weights[:, None]).sum(dim=2)


def upsample(x_BTD: Tensor, factor: int, frames: int) -> Tensor:
    """Repeats each frame `factor` times and cuts to `frames`."""
    if factor == 1:
        return x_BTD
    return x_BTD.repeat_interleave(factor, dim=1)[:, :frames]


def set_channels(x_BTD: Tensor, channels: int) -> Tensor:
    """Cuts, or fills with zeros, to the given number of channels."""
    if channels <= x_BTD.shape[-1]:
        return x_BTD[..., :channels]
    return nn.functional.pad(x_BTD, (0, channels - x_BTD.shape[-1]))
