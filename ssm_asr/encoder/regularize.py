"""What keeps Zipformer training stable: each module here is the identity (or plain dropout) in the forward pass and
acts on gradients, or drops at random, while training. In evaluation mode all of them do nothing.

Source: Yao et al., "Zipformer" (arXiv 2310.11230), sections 3.4 and 3.5 and appendix A.

Every probability and limit may be a `Schedule` in the batch count b, which the trainer sets by `set_batch_count`,
normalised to batches of 600 s of audio. Random yes/no decisions are drawn on the host with Python's `random`; masks
that belong to data are drawn with torch.

Shapes: B batch, T time, D channels (last dimension unless said), G groups, N frames (all dims but channels).
"""

import random
from typing import Any

import torch
from torch import Tensor, nn


class Schedule:
    """A piecewise-linear function of the batch count; the ends are held.

    >>> Schedule((0, 0.2), (4000, 0.05))(2000)
    0.125
    """

    def __init__(self, *points: tuple[float, float]) -> None:
        self.points = points

    def __call__(self, batch_count: float) -> float:
        x0, y0 = self.points[0]
        if batch_count <= x0:
            return y0
        for x1, y1 in self.points[1:]:
            if batch_count < x1:
                return y0 + (y1 - y0) * (batch_count - x0) / (x1 - x0)
            x0, y0 = x1, y1
        return y0


Value = float | Schedule


class Scheduled(nn.Module):
    """A module some of whose settings follow the batch count."""

    batch_count: float = 0.0

    def now(self, value: Value) -> float:
        """The present value of a setting."""
        return value(self.batch_count) if isinstance(value, Schedule) else value

    def chance(self, probability: Value) -> bool:
        """True with the given probability while training, never in evaluation."""
        return self.training and random.random() < self.now(probability)


def set_batch_count(model: nn.Module, batch_count: float) -> None:
    """Moves every schedule of the model to `batch_count` (batches of 600 s)."""
    for module in model.modules():
        if isinstance(module, Scheduled):
            module.batch_count = batch_count


def at_least_float32(x: Tensor) -> Tensor:
    """x in float32 if it is in half precision, else as it is."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


class _BalancerFunction(torch.autograd.Function):
    """Adds to each gradient element 0.04 |grad| times the unit-rms gradient of the balancer's penalty.

    With m = mean/std and r = rms of a channel over N frames, the penalty |m - clamp(m)| + |log(clamp(r)/r)| has a
    gradient that is affine in x, (a + b·x)/N a channel:
        d m/dx = (1 - m·(x - mean)/std) / (N·std),   d log r/dx = x / (N·r²)
    so the mean and the mean square of each channel are all that is needed of x beside x itself.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, limits: tuple[float, float, float, float], grad_scale: float, channel_dim: int
    ) -> Tensor:
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
            sign_m = torch.sign(m - m.clamp(min_m, max_m))
            sign_r = torch.sign(rms - rms.clamp(min_rms, max_rms))
            slope = sign_r / (rms * rms) - sign_m * m / (std * std)
            offset = sign_m * (1 + m * mean / std) / std
            # The rms of offset + slope·x over frames, without squares that overflow where a channel is all zeros.
            size = torch.hypot(offset + slope * mean, slope * std).clamp(min=1e-20)
            push = torch.addcmul(offset / size, x, slope / size) * ctx.grad_scale
            return (grad + grad.abs() * push.to(grad.dtype)), None, None, None


def _mean_limit(positive: float) -> float:
    """The limit on mean/std that stands for a share of positive values, for a roughly normal channel."""
    x, eps = 2 * positive - 1, 1e-10
    logs = torch.tensor([1 + x + eps, 1 - x + eps], dtype=torch.float64).log()
    return 0.8139535143 * 0.5 * float(logs[0] - logs[1])


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
        if not (x.requires_grad and self.chance(self.prob)):
            return x
        min_m, max_m = (_mean_limit(self.now(p)) for p in self.positive)
        min_rms, max_rms = (self.now(a) * 1.25331413732 for a in self.abs)
        return _BalancerFunction.apply(x, (min_m, max_m, min_rms, max_rms), self.grad_scale, self.channel_dim)


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
    grad_cov = (cov_GCC - torch.diag_embed((mean_square / mean_diagonal).expand_as(diagonal))) * (
        2 / (channels * mean_diagonal * mean_diagonal)
    )
    grad_GNC = 2 * x_GNC @ grad_cov
    return metric, grad_GNC.transpose(0, 1).reshape_as(x_ND)


class _WhitenFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, module: "Whiten", limit: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.module, ctx.limit = module, limit
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        (x,) = ctx.saved_tensors
        module: Whiten = ctx.module
        with torch.autocast(x.device.type, enabled=False):
            wide = at_least_float32(x)
            metric, metric_grad = whitening_metric(wide.reshape(-1, wide.shape[-1]), module.groups)
            module.over_limit = bool(metric > ctx.limit)
            if not module.over_limit:
                return grad, None, None
            scale = module.grad_scale * grad.norm(dtype=wide.dtype) / (metric_grad.norm() + 1e-20)
            return grad + (metric_grad * scale).reshape_as(grad).to(grad.dtype), None, None


class Whiten(Scheduled):
    """Pushes the channels of each group towards a covariance with equal eigenvalues (appendix A.3.3).

    Acts on a quarter of the training batches, and on a tenth of those while it finds nothing to do.

    Args:
        limit: the metric above which it acts; 1 is white.
        grad_scale: size of the added gradient, as a share of the gradient's norm.
    """

    def __init__(self, limit: Value, groups: int = 1, grad_scale: float = 0.01, prob: Value = 0.25) -> None:
        super().__init__()
        self.limit, self.groups, self.grad_scale, self.prob = limit, groups, grad_scale, prob
        self.over_limit = True

    def forward(self, x: Tensor) -> Tensor:
        if not x.requires_grad or not self.chance(self.now(self.prob) * (1.0 if self.over_limit else 0.1)):
            return x
        return _WhitenFunction.apply(x, self, self.now(self.limit))


class _PenalizeLarge(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, limit: float, penalty: float) -> Tensor:
        ctx.save_for_backward((x > limit).to(torch.int8) - (x < -limit).to(torch.int8))
        ctx.penalty = penalty
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (sign,) = ctx.saved_tensors
        return grads[0] + ctx.penalty * sign, None, None


def penalize_large(x: Tensor, limit: float, penalty: float) -> Tensor:
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
    def forward(ctx: Any, x: Tensor, low: float, high: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.low, ctx.high = low, high
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        (x,) = ctx.saved_tensors
        outward = ((grad < 0) & (x > ctx.high)) | ((grad > 0) & (x < ctx.low))
        return torch.where(outward, -grad, grad), None, None


class LimitParameter(Scheduled):
    """Keeps a parameter near [low, high]: on 60 % of the batches, gradients that lead further out are flipped."""

    def __init__(self, low: Value, high: Value, prob: float = 0.6) -> None:
        super().__init__()
        self.low, self.high, self.prob = low, high, prob

    def forward(self, parameter: Tensor) -> Tensor:
        if not self.chance(self.prob):
            return parameter
        return _LimitParameter.apply(parameter, self.now(self.low), self.now(self.high))


class Dropout(Scheduled):
    """Dropout with a scheduled rate, its mask shared along `shared_dim` (time) if given."""

    def __init__(self, rate: Value, shared_dim: int | None = None) -> None:
        super().__init__()
        self.rate, self.shared_dim = rate, shared_dim

    def forward(self, x: Tensor) -> Tensor:
        rate = self.now(self.rate)
        if not self.training or rate == 0.0:
            return x
        if self.shared_dim is None:
            return nn.functional.dropout(x, rate)
        return x * nn.functional.dropout(torch.ones_like(x.narrow(self.shared_dim, 0, 1)), rate)


def sequence_mask(x: Tensor, drop_rate: float) -> Tensor | None:
    """A (B, 1, …) mask that zeroes whole sequences with probability `drop_rate`; None when it would drop nothing."""
    if drop_rate == 0.0:
        return None
    keep_B = torch.rand(x.shape[0], device=x.device) > drop_rate
    return keep_B.to(x.dtype).reshape(-1, *([1] * (x.ndim - 1)))


def whitening_flags(model: nn.Module) -> list[bool]:
    """What every Whiten found last: the only state of the regularisers, to be saved with a training run."""
    return [module.over_limit for module in model.modules() if isinstance(module, Whiten)]


def load_whitening_flags(model: nn.Module, flags: list[bool]) -> None:
    """The inverse of `whitening_flags`."""
    modules = [module for module in model.modules() if isinstance(module, Whiten)]
    for module, flag in zip(modules, flags, strict=True):
        module.over_limit = flag
