"""Settings that follow the number of batches, and random decisions: drawn by each module itself, or all at once.

Random yes/no decisions are drawn on the host with Python's `random`. With `Draws`, they and the values of the schedules
reach the modules as numbers on the device, so that a captured CUDA graph serves every batch.
"""

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ssm_asr.ops.devices import to_device


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
Number = float | Tensor


class Scheduled(nn.Module):
    """A module some of whose settings follow the batch count."""

    batch_count: float = 0.0
    draws: "Draws | None" = None

    def now(self, value: Value, of: Callable[[float], float] = float) -> Any:
        """The present value of a setting, or a function of it: a float; of a schedule with `Draws`, on the device."""
        if self.draws is not None and self.training and isinstance(value, Schedule):
            return self.draws.numbers(self, (present, value, of))[0]
        return present(self, value, of)

    def chance(self, probability: Value) -> Any:
        """1 with the given probability while training, else 0; always 0 in evaluation. With `Draws`, on the device."""
        if not self.training:
            return 0.0
        if self.draws is not None:
            return self.draws.numbers(self, (decision, probability, float))[0]
        return decision(self, probability, float)


def present(module: Scheduled, value: Value, of: Callable[[float], float]) -> float:
    """The present value of a module's setting, or a function of it."""
    return of(value(module.batch_count) if isinstance(value, Schedule) else value)


def decision(module: Scheduled, probability: Value, of: Callable[[float], float]) -> float:
    """1 with a module's present probability, else 0, or a function of that."""
    return of(random.random() < present(module, probability, float))


def never(number: Number) -> bool:
    """Whether the host knows the number to be 0, so that what it switches on can be left out."""
    return not isinstance(number, Tensor) and number == 0.0


class Draws:
    """All decisions and scheduled values of a model, as numbers in one tensor on the device.

    The first forward pass in training tells which there are. `renew` draws those of the next batch, in the same order
    in which the model itself would, and brings them to the device in one copy, for which nobody waits.

    Args:
        model: takes its numbers from here from now on.
        most: numbers for which there is room.
    """

    def __init__(self, model: nn.Module, device: torch.device, most: int = 8192) -> None:
        self.all = torch.zeros(most, device=device)
        self._found: dict[Any, Tensor] = {}
        self._count = 0
        for module in model.modules():
            if isinstance(module, Scheduled):
                module.draws = self

    def numbers(
        self, module: Scheduled, *wanted: tuple[Callable[..., float], Value, Callable[[float], float]]
    ) -> Tensor:
        """The place of a module's numbers, which holds their values for this batch."""
        key = (module, wanted)
        if key not in self._found:
            self._found[key] = self.all[self._count : self._count + len(wanted)]
            self._found[key].copy_(torch.tensor(_drawn(module, wanted)))
            self._count += len(wanted)
        return self._found[key]

    def renew(self) -> None:
        """Draws all numbers anew."""
        drawn = torch.tensor([number for key in self._found for number in _drawn(*key)])
        self.all[: self._count] = to_device(drawn, self.all.device)


def _drawn(module: Scheduled, wanted: Any) -> list[float]:
    return [kind(module, value, of) for kind, value, of in wanted]


def set_batch_count(model: nn.Module, batch_count: float) -> None:
    """Moves every schedule of the model to `batch_count` (batches of 600 s)."""
    for module in model.modules():
        if isinstance(module, Scheduled):
            module.batch_count = batch_count
