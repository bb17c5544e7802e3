"""What keeps Zipformer training stable: each module here is the identity (or plain dropout) in the forward pass and
acts on gradients, or drops at random, while training. In evaluation mode all of them do nothing.

Source: Yao et al., "Zipformer" (arXiv 2310.11230), sections 3.4 and 3.5 and appendix A.

Every probability and limit may be a `Schedule` in the batch count b, which the trainer sets by `set_batch_count`,
normalised to batches of 600 s of audio. Random yes/no decisions are drawn on the host with Python's `random`; masks
that belong to data are drawn with torch.

Shapes: B batch, T time, D channels (last dimension unless said), G groups, N frames (all dims but channels).
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from ssm_asr.encoder.schedule import (
    Number,
    Schedule,
    Scheduled,
    Value,
    decision,
    never,
    present,
)
from ssm_asr.encoder.schedule import set_batch_count as set_batch_count  # for those who train
from ssm_asr.ops import dispatch
from ssm_asr.ops.precision import at_least_float32


class _BalancerFunction(torch.autograd.Function):
    """Adds to each gradient element 0.04 |grad| times the unit-rms gradient of the balancer's penalty.

    With m = mean/std and r = rms of a channel over N frames, the penalty |m - clamp(m)| + |log(clamp(r)/r)| has a
    gradient that is affine in x, (a + b·x)/N a channel:
        d m/dx = (1 - m·(x - mean)/std) / (N·std),   d log r/dx = x / (N·r²)
    so the mean and the mean square of each channel are all that is needed of x beside x itself.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, limits: tuple[Number, ...], grad_scale: Number, channel_dim: int) -> Tensor:
        ctx.save_for_backward(x)
        ctx.limits, ctx.grad_scale, ctx.channel_dim = limits, grad_scale, channel_dim
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        (x,) = ctx.saved_tensors
        min_m, max_m, min_rms, max_rms = ctx.limits
        with torch.autocast(x.device.type, enabled=False):
            x = at_least_float32(x)
            frame_dims = [dim for dim in range(x.ndim) if dim != ctx.channel_dim % x.ndim]
            mean = x.mean(dim=frame_dims, keepdim=True)
            square = (x * x).mean(dim=frame_dims, keepdim=True)
            std = (square - mean * mean).clamp(min=1e-20).sqrt()
            rms = square.clamp(min=1e-20).sqrt()
            m = mean / std
            sign_m = torch.sign(m - m.clamp(min=min_m).clamp(max=max_m))
            sign_r = torch.sign(rms - rms.clamp(min=min_rms).clamp(max=max_rms))
            slope = sign_r / (rms * rms) - sign_m * m / (std * std)
            offset = sign_m * (1 + m * mean / std) / std
            # The rms of offset + slope·x over frames, without squares that overflow where a channel is all zeros.
            size = torch.hypot(offset + slope * mean, slope * std).clamp(min=1e-20)
            push = torch.addcmul(offset / size, x, slope / size) * ctx.grad_scale
            return (grad + grad.abs() * push.to(grad.dtype)), None, None, None


class _BalancerKernel(torch.autograd.Function):
    """The same by a kernel, which does next to nothing for a batch on which the balancer does not act."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, settings: Tensor, grad_scale: float, channel_dim: int) -> Tensor:
        ctx.save_for_backward(x)
        # The settings are part of a tensor that other modules write their part of meanwhile.
        ctx.settings, ctx.grad_scale, ctx.channel_dim = settings, grad_scale, channel_dim
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        from ssm_asr.ops.swoosh_kernel import balance  # only where Triton is installed

        (x,) = ctx.saved_tensors
        return balance(x, grads[0], ctx.settings, ctx.grad_scale, ctx.channel_dim), None, None, None


def _mean_limit(positive: float) -> float:
    """The limit on mean/std that stands for a share of positive values, for a roughly normal channel."""
    x, eps = 2 * positive - 1, 1e-10
    return 0.8139535143 * 0.5 * (math.log(1 + x + eps) - math.log(1 - x + eps))


def _rms_limit(mean_abs: float) -> float:
    """The root mean square of a normal variable with this mean absolute value."""
    return mean_abs * 1.25331413732


class Balancer(Scheduled):
    """Keeps each channel's share of positive values and its mean absolute value within limits (appendix A.3.2).

    Args:
        positive: least and greatest share of positive values; None sets no limit.
        abs: least and greatest mean absolute value, in the sense of a normal variable.
        prob: share of the training batches on which it acts.
        channel_dim: the dimension that is not averaged over.
    """

    def __init__(
        self,
        positive: tuple[Value, Value] | None = (0.05, 0.95),
        abs: tuple[Value, Value] = (0.2, 100.0),
        prob: Value = Schedule((0, 0.5), (8000, 0.125)),  # noqa: B008 - immutable
        channel_dim: int = -1,
        grad_scale: float = 0.04,
    ) -> None:
        super().__init__()
        self.positive, self.abs, self.prob = positive or (0.0, 1.0), abs, prob
        self.channel_dim, self.grad_scale = channel_dim, grad_scale

    def forward(self, x: Tensor) -> Tensor:
        if not x.requires_grad:
            return x
        settings = self.settings(x)
        if settings is not None:
            return _BalancerKernel.apply(x, settings, self.grad_scale, self.channel_dim)
        acts = self.chance(self.prob)
        if never(acts):
            return x
        limits = (*(self.now(p, _mean_limit) for p in self.positive), *(self.now(a, _rms_limit) for a in self.abs))
        return _BalancerFunction.apply(x, limits, acts * self.grad_scale, self.channel_dim)

    def settings(self, x: Tensor) -> Tensor | None:
        """The numbers for a kernel that balances x's gradient in the place of `forward`; None if none can."""
        if self.draws is None or not self.training or not x.requires_grad or not dispatch.usable(x):
            return None
        bounds = [(p, _mean_limit) for p in self.positive] + [(a, _rms_limit) for a in self.abs]
        return self.draws.numbers(self, (decision, self.prob, float), *((present, *bound) for bound in bounds))


def whitening_metric(x_ND: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """How far the channels of each group are from uncorrelated and equally large: 1 when they are, up to D/G.

    Args:
        x_ND: frames by channels; the G groups are contiguous.

    Returns:
        The metric (scalar) and its gradient with respect to x_ND (appendix A.3.3).
    """
    x_NGC = x_ND.reshape(x_ND.shape[0], groups, -1)
    x_GNC = (x_NGC - x_NGC.mean(dim=0)).transpose(0, 1)
    cov_GCC = x_GNC.transpose(1, 2) @ x_GNC
    channels = x_ND.shape[1]
    diagonal = cov_GCC.diagonal(dim1=1, dim2=2)
    mean_square = (cov_GCC * cov_GCC).sum() / channels
    mean_diagonal = diagonal.mean() + 1e-20
    metric = mean_square / (mean_diagonal * mean_diagonal)
    grad_cov_GCC = (cov_GCC - torch.diag_embed((mean_square / mean_diagonal).expand_as(diagonal))) * (
        2 / (channels * mean_diagonal * mean_diagonal)
    )
    grad_GNC = 2 * x_GNC @ grad_cov_GCC
    return metric, grad_GNC.transpose(0, 1).reshape_as(x_ND)


class _WhitenFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, module: "Whiten", limit: Number, acts: Number) -> Tensor:
        ctx.save_for_backward(x)
        ctx.module, ctx.limit, ctx.acts = module, limit, acts
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        (x,) = ctx.saved_tensors
        module: Whiten = ctx.module
        with torch.autocast(x.device.type, enabled=False):
            wide = at_least_float32(x)
            metric, metric_grad = whitening_metric(wide.reshape(-1, wide.shape[-1]), module.groups)
            scale = module.strength(metric, ctx.limit, ctx.acts)
            scale = scale * grad.norm(dtype=wide.dtype) / (metric_grad.norm() + 1e-20)
            return grad + (metric_grad * scale).reshape_as(grad).to(grad.dtype), None, None, None


class _WhitenKernel(torch.autograd.Function):
    """The same by kernels, which do next to nothing for a batch on which the module does not act."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: "Whiten", settings: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        # The settings are part of a tensor that other modules write their part of meanwhile.
        ctx.module, ctx.settings = module, settings
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        from ssm_asr.ops.whitening_kernel import whiten  # only where Triton is installed

        (x,) = ctx.saved_tensors
        module: Whiten = ctx.module
        out = whiten(x, grads[0], ctx.settings, module.over_limit, module.groups, module.grad_scale)
        return out, None, None


class Whiten(Scheduled):
    """Pushes the channels of each group towards a covariance with equal eigenvalues (appendix A.3.3).

    Acts on a quarter of the training batches, and on a tenth of those while it finds nothing to do. On a GPU that is
    decided there, so that the host need not wait to know it.

    Args:
        limit: the metric above which it acts; 1 is white.
        grad_scale: size of the added gradient, as a share of the gradient's norm.
    """

    def __init__(self, limit: Value, groups: int = 1, grad_scale: float = 0.01, prob: Value = 0.25) -> None:
        super().__init__()
        self.limit, self.groups, self.grad_scale, self.prob = limit, groups, grad_scale, prob
        self.over_limit: Tensor
        self.register_buffer("over_limit", torch.tensor(True), persistent=False)

    def strength(self, metric: Tensor, limit: Number, acts: Number) -> Tensor:
        """`grad_scale` where the metric is over the limit and there is a call to act, else 0; notes what it found."""
        over_limit = metric > limit
        self.over_limit.copy_(torch.where(torch.as_tensor(acts > 0), over_limit, self.over_limit))
        return self.grad_scale * over_limit * acts

    def forward(self, x: Tensor) -> Tensor:
        if not x.requires_grad:
            return x
        if self.draws is not None and self.training and dispatch.usable(x):
            settings = self.draws.numbers(
                self, (decision, self.prob, float), (decision, 0.1, float), (present, self.limit, float)
            )
            return _WhitenKernel.apply(x, self, settings)
        due, anyway = self.chance(self.prob), self.chance(0.1)
        if never(due) or (never(anyway) and not x.is_cuda and not self.over_limit):
            return x
        acts = due * torch.clamp(self.over_limit + anyway, max=1)
        return _WhitenFunction.apply(x, self, self.now(self.limit), acts)


class _PenalizeLarge(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, limit: float, penalty: Number) -> Tensor:
        ctx.save_for_backward((x > limit).to(torch.int8) - (x < -limit).to(torch.int8))
        ctx.penalty = penalty
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (sign,) = ctx.saved_tensors
        return grads[0] + (ctx.penalty * sign).to(grads[0].dtype), None, None


def penalize_large(x: Tensor, limit: float, penalty: Number) -> Tensor:
    """x itself; its gradient gets that of penalty · Σ max(0, |x| - limit)."""
    return _PenalizeLarge.apply(x, limit, penalty)


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0] * ctx.scale, None


class ScaleGradient(nn.Module):
    """The identity, with gradients multiplied by a constant."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return _ScaleGradient.apply(x, self.scale) if x.requires_grad else x


class _LimitParameter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, low: Number, high: Number, acts: Number) -> Tensor:
        ctx.save_for_backward(x)
        ctx.low, ctx.high, ctx.acts = low, high, acts
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        (x,) = ctx.saved_tensors
        outward = ((grad < 0) & (x > ctx.high)) | ((grad > 0) & (x < ctx.low))
        return torch.where(outward, grad * (1 - 2 * ctx.acts), grad), None, None, None


class LimitParameter(Scheduled):
    """Keeps a parameter near [low, high]: on 60 % of the batches, gradients that lead further out are flipped."""

    def __init__(self, low: Value, high: Value, prob: float = 0.6) -> None:
        super().__init__()
        self.low, self.high, self.prob = low, high, prob

    def forward(self, parameter: Tensor) -> Tensor:
        acts = self.chance(self.prob)
        if never(acts):
            return parameter
        return _LimitParameter.apply(parameter, self.now(self.low), self.now(self.high), acts)

    def settings(self, parameter: Tensor) -> Tensor | None:
        """The numbers for a kernel that limits the gradient in the place of `forward`; None if none can."""
        if self.draws is None or not self.training or not dispatch.usable(parameter):
            return None
        bounds = ((present, self.low, float), (present, self.high, float))
        return self.draws.numbers(self, (decision, self.prob, float), *bounds)


class Dropout(Scheduled):
    """Dropout with a scheduled rate, its mask shared along `shared_dim` (time) if given."""

    def __init__(self, rate: Value, shared_dim: int | None = None) -> None:
        super().__init__()
        self.rate, self.shared_dim = rate, shared_dim

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        rate = self.now(self.rate)
        if never(rate):
            return x
        keep = self._uniform(x) >= rate
        return x * (keep / (1 - rate)).to(x.dtype)

    def numbers(self, x_BTD: Tensor) -> tuple[Tensor, Tensor] | None:
        """Uniform random numbers (B, 1, D) and the rate below which they drop, for a kernel; None if none can."""
        if not self.training or self.shared_dim != 1 or x_BTD.ndim != 3 or not dispatch.usable(x_BTD):
            return None
        rate = self.now(self.rate)
        return (self._uniform(x_BTD), rate) if isinstance(rate, Tensor) else None

    def _uniform(self, x: Tensor) -> Tensor:
        like = x if self.shared_dim is None else x.narrow(self.shared_dim, 0, 1)
        return torch.rand_like(like, dtype=torch.float32)


def sequence_masks(module: Scheduled, x_BTD: Tensor, *drop_rates: Value) -> list[Tensor | None]:
    """For each rate a mask (B, 1, 1), False with that probability for a whole sequence; None where nothing is dropped.

    Args:
        module: whose settings the rates are; outside training it drops nothing.
    """
    if not module.training:
        return [None] * len(drop_rates)
    uniform_RB11 = torch.rand(len(drop_rates), x_BTD.shape[0], 1, 1, device=x_BTD.device)
    if module.draws is not None:
        rates_R = module.draws.numbers(module, *((present, rate, float) for rate in drop_rates))
        return list(uniform_RB11 > rates_R[:, None, None, None])
    rates = [present(module, rate, float) for rate in drop_rates]
    return [u_B11 > rate if rate else None for u_B11, rate in zip(uniform_RB11, rates, strict=True)]


def whitening_flags(model: nn.Module) -> list[bool]:
    """What every Whiten found last: the only state of the regularisers, to be saved with a training run."""
    return [bool(module.over_limit) for module in model.modules() if isinstance(module, Whiten)]


def load_whitening_flags(model: nn.Module, flags: list[bool]) -> None:
    """The inverse of `whitening_flags`."""
    modules = [module for module in model.modules() if isinstance(module, Whiten)]
    for module, flag in zip(modules, flags, strict=True):
        module.over_limit.fill_(flag)
