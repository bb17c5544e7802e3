"""Settings of modules that follow the batch count, and the random decisions of modules.

A module asks for its numbers of a batch by `Scheduled.draw`. It gets floats, drawn on the host with Python's `random`.
While a training step has `Draws` in use, the module gets instead places on the device that hold the numbers, so that
one captured CUDA graph serves every batch.
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

    Args:
        points: pairs (batch count, value), in ascending order of the batch count.

    >>> Schedule((0, 0.2), (4000, 0.05))(2000)
    0.125
    """

    def __init__(self, *points: tuple[float, float]) -> None:
        self.points = points

    def __call__(self, batch_count: float) -> float:
        """Returns the value at a batch count."""
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
    """A request for the present value of a setting, transformed by a function."""

    value: Value
    transform: Callable[[float], float] = float

    def drawn(self, batch_count: float) -> float:
        """Returns the number at this batch count."""
        return self.transform(self.value(batch_count) if isinstance(self.value, Schedule) else self.value)


class Chance(NamedTuple):
    """A request for a random decision: 1 with the given probability, else 0."""

    probability: Value

    def drawn(self, batch_count: float) -> float:
        """Draws the number for this batch count with Python's `random`."""
        return float(random.random() < Now(self.probability).drawn(batch_count))


Request = Now | Chance


class Scheduled(nn.Module):
    """A module some of whose settings follow the batch count, which `set_batch_count` sets."""

    batch_count: float = 0.0

    def draw(self, *requests: Request) -> Numbers:
        """Returns a number for each request: floats or, in training with `Draws` in use, a tensor on the device."""
        draws = _in_use.get()
        if draws is not None and self.training:
            return draws.numbers(self, requests)
        return tuple(request.drawn(self.batch_count) for request in requests)

    def now(self, value: Value) -> Number:
        """Returns the present value of a setting; a constant is always a float, never a tensor."""
        return self.draw(Now(value))[0] if isinstance(value, Schedule) else value

    def chance(self, probability: Value) -> Number:
        """Draws 1 with the given probability in training, else 0; in evaluation it returns 0."""
        return self.draw(Chance(probability))[0] if self.training else 0.0


class Draws:
    """All decisions and scheduled values of some modules, as numbers in one tensor on the device.

    The first forward pass in training finds out which numbers the modules ask for. `renew` draws the numbers of the
    next batch, in the order of the first pass, and copies all of them to the device at once, without making the host
    wait.

    Args:
        device: where the numbers lie.
        capacity: numbers for which there is room.
    """

    def __init__(self, device: torch.device, capacity: int = 8192) -> None:
        self.all = torch.zeros(capacity, device=device)
        self._found: dict[tuple[Scheduled, tuple[Request, ...]], Tensor] = {}
        self._undrawn: list[tuple[Scheduled, tuple[Request, ...]]] = []
        self._count = 0

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Returns a context in which modules in training take their numbers from this object."""
        token = _in_use.set(self)
        try:
            yield
        finally:
            _in_use.reset(token)

    def numbers(self, module: Scheduled, requests: tuple[Request, ...]) -> Tensor:
        """Returns the place on the device (a slice of the tensor) that holds a module's numbers for this batch.

        Raises:
            ValueError: if the modules ask for more numbers than there is room for.
        """
        key = (module, requests)
        if key not in self._found:
            place = self.all[self._count : self._count + len(requests)]
            if len(place) < len(requests):
                raise ValueError(f"{len(self.all)} places are too few for the numbers of this model")
            self._found[key] = place
            self._count += len(requests)
            if place.is_cuda and torch.cuda.is_current_stream_capturing():
                self._undrawn.append(key)  # nothing can be copied now, and nothing is computed from it now
            else:
                place.copy_(torch.tensor(_drawn(*key)))
        return self._found[key]

    def draw_new(self) -> None:
        """Draws the numbers that were first asked for while a graph was captured, before it is replayed."""
        for key in self._undrawn:
            self._found[key].copy_(torch.tensor(_drawn(*key)))
        self._undrawn.clear()

    def renew(self) -> None:
        """Draws all numbers anew, for the next batch."""
        self._undrawn.clear()
        drawn = torch.tensor([number for key in self._found for number in _drawn(*key)])
        self.all[: self._count] = to_device(drawn, self.all.device)


_in_use: ContextVar[Draws | None] = ContextVar("draws in use", default=None)


def _drawn(module: Scheduled, requests: tuple[Request, ...]) -> list[float]:
    return [request.drawn(module.batch_count) for request in requests]


def scheduled_modules(model: nn.Module) -> list[Scheduled]:
    """Returns the modules of a model that have schedules."""
    return [module for module in model.modules() if isinstance(module, Scheduled)]


def set_batch_count(model: nn.Module | list[Scheduled], batch_count: float) -> None:
    """Moves every schedule to `batch_count`, counted in batches of 600 s of audio.

    Args:
        model: a model, or what `scheduled_modules` found in it, which takes a tenth of the time.
    """
    for module in scheduled_modules(model) if isinstance(model, nn.Module) else model:
        object.__setattr__(module, "batch_count", batch_count)  # PyTorch's own looks for parameters and modules
