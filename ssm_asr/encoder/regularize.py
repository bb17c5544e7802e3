"""Regularisers that keep the training of a Zipformer stable.

In training each module here either leaves its input alone and changes the gradient, or drops parts of its input at
random. In evaluation all of them do nothing. The operations are in ssm_asr.ops; these modules hold their settings.

Every probability and limit may be a `Schedule` over the batch count, counted in batches of 600 s of audio, which the
training step sets by `set_batch_count`. Whether a regulariser acts on a batch is drawn with Python's `random`; masks
over data are drawn with torch.

Source: Yao et al., "Zipformer" (arXiv 2310.11230), sections 3.4 and 3.5 and appendix A.

Shapes: B batch, T frames, D channels (the last dimension unless stated), G groups of channels, R rates.
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
    """Converts a limit on the share of positive values to a limit on mean/std, for a roughly normal channel."""
    x, eps = 2 * positive - 1, 1e-10
    return 0.8139535143 * 0.5 * (math.log(1 + x + eps) - math.log(1 - x + eps))


def _rms_limit(mean_abs: float) -> float:
    """Returns the root mean square of a normal variable of mean 0 with this mean absolute value."""
    return mean_abs * 1.25331413732


class Balancer(Scheduled):
    """Keeps each channel's share of positive values and its mean absolute value within limits (appendix A.3.2).

    The statistics are estimated from the channel's mean, standard deviation and rms, as if it were normal.

    Args:
        positive: least and greatest share of positive values; None sets no limit.
        abs: least and greatest mean absolute value, of a normal variable with the channel's rms.
        prob: probability of acting on a training batch.
        channel_dim: the dimension of the channels; the statistics are taken over all others.
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
        """Returns x, whose gradient is balanced."""
        return balance(x, self.settings(x))

    def settings(self, x: Tensor) -> Balance | None:
        """Returns how the gradient of x is to be changed in this batch, or None if it stays as it is.

        An operation that takes it balances the gradient in its own backward pass, at less cost than `forward`.
        """
        if not self.training or not x.requires_grad:
            return None
        return Balance(self.draw(*self.requests), self.grad_scale, self.channel_dim)


class Whiten(Scheduled):
    """Pushes the channels of each group towards a covariance with equal eigenvalues (appendix A.3.3).

    To save time it looks only at some of the training batches. While the last batch that it looked at was within the
    limit, it looks at a tenth of them.

    Args:
        limit: the value of `whitening_metric` above which it acts; uncorrelated channels of equal size have 1.
        groups: G.
        grad_scale: norm of the added gradient, relative to the norm of the gradient.
        prob: probability of looking at a training batch.
    """

    def __init__(self, limit: Value, groups: int = 1, grad_scale: float = 0.01, prob: Value = 0.25) -> None:
        super().__init__()
        self.requests = (Chance(prob), Chance(0.1), Now(limit))
        self.groups, self.grad_scale = groups, grad_scale
        self.over_limit: Tensor
        self.register_buffer("over_limit", torch.tensor(True), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Returns x (…, D), whose gradient is changed where the channels are too correlated."""
        if not self.training or not x.requires_grad:
            return x
        return whiten(x, self.draw(*self.requests), self.over_limit, self.groups, self.grad_scale)


class _ScaleGradient(torch.autograd.Function):
    """Computes `ScaleGradient`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0] * ctx.scale, None


class ScaleGradient(nn.Module):
    """Passes its input on, and multiplies the gradient by a constant."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        """Returns x, whose gradient is multiplied by `scale`."""
        return _ScaleGradient.apply(x, self.scale) if x.requires_grad else x


class LimitParameter(Scheduled):
    """Keeps a parameter near the interval [low, high] by flipping gradients that lead further out of it.

    Args:
        low: lower end of the interval.
        high: upper end of the interval.
        prob: probability of acting on a training batch.
    """

    def __init__(self, low: Value, high: Value, prob: float = 0.6) -> None:
        super().__init__()
        self.requests = (Chance(prob), Now(low), Now(high))

    def forward(self, parameter: Tensor) -> Tensor:
        """Returns the parameter, whose gradient is limited."""
        return limit(parameter, self.settings())

    def settings(self) -> Numbers | None:
        """Returns the numbers that `ssm_asr.ops.limit.limit` takes for this batch, or None in evaluation.

        An operation that takes them limits the gradient in its own backward pass, at less cost than `forward`.
        """
        return self.draw(*self.requests) if self.training else None


class Dropout(Scheduled):
    """Dropout whose rate may follow a schedule.

    Args:
        rate: probability that an element is dropped.
        shared_dim: a dimension along which all elements share one mask, such as time; None draws each element.
    """

    def __init__(self, rate: Value, shared_dim: int | None = None) -> None:
        super().__init__()
        self.rate, self.shared_dim = rate, shared_dim

    def forward(self, x: Tensor) -> Tensor:
        """Returns x with some of its elements set to 0 and the others divided by 1 - rate."""
        drop = self.settings(x)
        return x if drop is None else drop.apply(x)

    def settings(self, x: Tensor) -> Drop | None:
        """Returns which elements of x are to be dropped in this batch, or None if all stay.

        An operation that takes it drops the elements in its own pass, at less cost than `forward`.
        """
        if not self.training:
            return None
        rate = self.now(self.rate)
        if known_zero(rate):
            return None
        like = x if self.shared_dim is None else x.narrow(self.shared_dim, 0, 1)
        return Drop(torch.rand_like(like, dtype=torch.float32), rate)


def sequence_masks(module: Scheduled, x_BTD: Tensor, *drop_rates: Value) -> list[Tensor | None]:
    """Draws for each rate a mask (B, 1, 1), which is False, with the probability of the rate, for a whole sequence.

    Args:
        module: the module to which the rates belong; in evaluation nothing is dropped.
        x_BTD: the sequences; their number B and their device are used.
        drop_rates: R rates.

    Returns:
        R masks, each of which may be None where nothing is dropped.
    """
    if not module.training:
        return [None] * len(drop_rates)
    uniform_RB11 = torch.rand(len(drop_rates), x_BTD.shape[0], 1, 1, device=x_BTD.device)
    rates_R = module.draw(*map(Now, drop_rates))
    if isinstance(rates_R, Tensor):
        return list(uniform_RB11 > rates_R[:, None, None, None])
    return [u_B11 > rate if rate else None for u_B11, rate in zip(uniform_RB11, rates_R, strict=True)]


def whitening_flags(model: nn.Module) -> list[bool]:
    """Returns whether each `Whiten` of the model found its input over the limit when it last looked.

    The flags are the only state of the regularisers, so that a training run saves them to be resumed exactly.
    """
    return [bool(module.over_limit) for module in model.modules() if isinstance(module, Whiten)]


def load_whitening_flags(model: nn.Module, flags: list[bool]) -> None:
    """Restores what `whitening_flags` returned.

    Raises:
        ValueError: if the model has another number of `Whiten` modules.
    """
    modules = [module for module in model.modules() if isinstance(module, Whiten)]
    for module, flag in zip(modules, flags, strict=True):
        module.over_limit.fill_(flag)
