"""What keeps Zipformer training stable.

Each module here is the identity (or plain dropout) in the forward pass, and acts on gradients or drops at random while
training. In evaluation all of them do nothing. What they compute is in ssm_asr.ops; here are their settings.

Source: Yao et al., "Zipformer" (arXiv 2310.11230), sections 3.4 and 3.5 and appendix A.

Every probability and limit may be a `Schedule` in the batch count b, which the training step sets by `set_batch_count`,
normalised to batches of 600 s of audio. Decisions are drawn with Python's `random`; masks that belong to data are drawn
with torch.

Shapes: B batch, T frames, D channels (last dimension unless said), G groups.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from ssm_asr.encoder.schedule import Chance, Now, Request, Schedule, Scheduled, Value
from ssm_asr.ops.balance import Balance, balance
from ssm_asr.ops.limit import limit
from ssm_asr.ops.numbers import Numbers, known_zero
from ssm_asr.ops.swoosh import Drop
from ssm_asr.ops.whiten import whiten


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
        abs: least and greatest mean absolute value of a normal variable with the channel's rms.
        prob: share of the training batches on which it acts.
        channel_dim: the dimension that is not averaged over.
        grad_scale: size of the added gradient, relative to each element of the gradient.
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
        bounds = [Now(p, _mean_limit) for p in positive or (0.0, 1.0)] + [Now(a, _rms_limit) for a in abs]
        self.requests: tuple[Request, ...] = (Chance(prob), *bounds)
        self.channel_dim, self.grad_scale = channel_dim, grad_scale

    def forward(self, x: Tensor) -> Tensor:
        """x itself."""
        return balance(x, self.settings(x))

    def settings(self, x: Tensor) -> Balance | None:
        """What it does to the gradient of x in this batch, for an operation that does it on its way; None is none."""
        if not self.training or not x.requires_grad:
            return None
        return Balance(self.draw(*self.requests), self.grad_scale, self.channel_dim)


class Whiten(Scheduled):
    """Pushes the channels of each group towards a covariance with equal eigenvalues (appendix A.3.3).

    It acts on a quarter of the training batches, and on a tenth of those while it finds nothing to do.

    Args:
        limit: the metric above which it acts; 1 is white.
        groups: G.
        grad_scale: size of the added gradient, relative to the gradient's norm.
        prob: share of the training batches on which it may act.
    """

    def __init__(self, limit: Value, groups: int = 1, grad_scale: float = 0.01, prob: Value = 0.25) -> None:
        super().__init__()
        self.requests = (Chance(prob), Chance(0.1), Now(limit))
        self.groups, self.grad_scale = groups, grad_scale
        self.over_limit: Tensor
        self.register_buffer("over_limit", torch.tensor(True), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """x itself."""
        if not self.training or not x.requires_grad:
            return x
        return whiten(x, self.draw(*self.requests), self.over_limit, self.groups, self.grad_scale)


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
        """x itself."""
        return _ScaleGradient.apply(x, self.scale) if x.requires_grad else x


class LimitParameter(Scheduled):
    """Keeps a parameter near [low, high]: on 60 % of the batches, gradients that lead further out are flipped."""

    def __init__(self, low: Value, high: Value, prob: float = 0.6) -> None:
        super().__init__()
        self.requests = (Chance(prob), Now(low), Now(high))

    def forward(self, parameter: Tensor) -> Tensor:
        """The parameter itself."""
        return limit(parameter, self.settings())

    def settings(self) -> Numbers | None:
        """What it does in this batch, for an operation that does it on its way; see ssm_asr.ops.limit."""
        return self.draw(*self.requests) if self.training else None


class Dropout(Scheduled):
    """Dropout with a scheduled rate, its mask shared along `shared_dim` (time) if given."""

    def __init__(self, rate: Value, shared_dim: int | None = None) -> None:
        super().__init__()
        self.rate, self.shared_dim = rate, shared_dim

    def forward(self, x: Tensor) -> Tensor:
        """x with some of its elements dropped, and the others scaled up."""
        drop = self.settings(x)
        return x if drop is None else drop.apply(x)

    def settings(self, x: Tensor) -> Drop | None:
        """What it drops of x in this batch, for an operation that does it on its way; None is nothing."""
        if not self.training:
            return None
        rate = self.now(self.rate)
        if known_zero(rate):
            return None
        like = x if self.shared_dim is None else x.narrow(self.shared_dim, 0, 1)
        return Drop(torch.rand_like(like, dtype=torch.float32), rate)


def sequence_masks(module: Scheduled, x_BTD: Tensor, *drop_rates: Value) -> list[Tensor | None]:
    """For each rate a mask (B, 1, 1), False with that probability for a whole sequence; None where nothing is dropped.

    Args:
        module: whose settings the rates are; in evaluation nothing is dropped.
        x_BTD: the sequences.
    """
    if not module.training:
        return [None] * len(drop_rates)
    uniform_RB11 = torch.rand(len(drop_rates), x_BTD.shape[0], 1, 1, device=x_BTD.device)
    rates_R = module.draw(*map(Now, drop_rates))
    if isinstance(rates_R, Tensor):
        return list(uniform_RB11 > rates_R[:, None, None, None])
    return [u_B11 > rate if rate else None for u_B11, rate in zip(uniform_RB11, rates_R, strict=True)]


def whitening_flags(model: nn.Module) -> list[bool]:
    """What every Whiten found last: the only state of the regularisers, to be saved with a training run."""
    return [bool(module.over_limit) for module in model.modules() if isinstance(module, Whiten)]


def load_whitening_flags(model: nn.Module, flags: list[bool]) -> None:
    """The inverse of `whitening_flags`."""
    modules = [module for module in model.modules() if isinstance(module, Whiten)]
    for module, flag in zip(modules, flags, strict=True):
        module.over_limit.fill_(flag)
