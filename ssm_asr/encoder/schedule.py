"""Settings that follow the number of batches, and random decisions of modules.

A module asks for its numbers of a batch by `Scheduled.draw`. It gets floats, drawn on the host with Python's `random`.
While a training step has `Draws` in use, it gets places on the device that hold them, so that one captured CUDA graph
serves every batch.
"""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ssm_asr.ops.devices import to_device
from ssm_asr.ops.numbers import Number, Numbers


class Schedule:
    """A piecewise-linear function of the batch count, constant before its first point and after its last.

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


class Now(NamedTuple):
    """A request for the present value of a setting, or for a function of it."""

    value: Value
    transform: Callable[[float], float] = float

    def drawn(self, batch_count: float) -> float:
        """The number after so many batches."""
        return self.transform(self.value(batch_count) if isinstance(self.value, Schedule) else self.value)


class Chance(NamedTuple):
    """A request for a decision: 1 with a probability, else 0."""

    probability: Value

    def drawn(self, batch_count: float) -> float:
        """The number after so many batches, from Python's `random`."""
        return float(random.random() < Now(self.probability).drawn(batch_count))


Request = Now | Chance


class Scheduled(nn.Module):
    """A module some of whose settings follow the batch count, which `set_batch_count` moves."""

    batch_count: float = 0.0

    def draw(self, *requests: Request) -> Numbers:
        """The module's numbers of this batch: floats, or on the device while `Draws` are in use in training."""
        draws = _in_use.get()
        if draws is not None and self.training:
            return draws.numbers(self, requests)
        return tuple(request.drawn(self.batch_count) for request in requests)

    def now(self, value: Value) -> Number:
        """The present value of a setting; a constant is a float in any case."""
        return self.draw(Now(value))[0] if isinstance(value, Schedule) else value

    def chance(self, probability: Value) -> Number:
        """1 with the given probability while training, else 0; always 0 in evaluation."""
        return self.draw(Chance(probability))[0] if self.training else 0.0


class Draws:
    """All decisions and scheduled values of some modules, as numbers in one tensor on the device.

    The first forward pass in training tells which there are. `renew` draws those of the next batch, in the order of
    that pass, and brings them to the device in one copy, for which the host does not wait.

    Args:
        device: where the numbers lie.
        most: numbers for which there is room.
    """

    def __init__(self, device: torch.device, most: int = 8192) -> None:
        self.all = torch.zeros(most, device=device)
        self._found: dict[tuple[Scheduled, tuple[Request, ...]], Tensor] = {}
        self._count = 0

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Within it, modules in training take their numbers from here."""
        token = _in_use.set(self)
        try:
            yield
        finally:
            _in_use.reset(token)

    def numbers(self, module: Scheduled, requests: tuple[Request, ...]) -> Tensor:
        """The place of a module's numbers, which holds their values for this batch."""
        key = (module, requests)
        if key not in self._found:
            place = self.all[self._count : self._count + len(requests)]
            if len(place) < len(requests):
                raise ValueError(f"{len(self.all)} places are too few for the numbers of this model")
            place.copy_(torch.tensor(_drawn(*key)))
            self._found[key] = place
            self._count += len(requests)
        return self._found[key]

    def renew(self) -> None:
        """Draws all numbers anew."""
        drawn = torch.tensor([number for key in self._found for number in _drawn(*key)])
        self.all[: self._count] = to_device(drawn, self.all.device)


_in_use: ContextVar[Draws | None] = ContextVar("draws in use", default=None)


def _drawn(module: Scheduled, requests: tuple[Request, ...]) -> list[float]:
    return [request.drawn(module.batch_count) for request in requests]


def set_batch_count(model: nn.Module, batch_count: float) -> None:
    """Moves every schedule of the model to `batch_count` (batches of 600 s)."""
    for module in model.modules():
        if isinstance(module, Scheduled):
            module.batch_count = batch_count
