"""Running average of the weights, and the average over any part of the training between two of its states."""

from typing import Any

import torch
from torch import Tensor, nn


class RunningAverage:
    """Mean of a model's weights over all its updates so far, every `period` batches.

    The mean is held in float64, so that the difference of two of its states gives the mean over the batches
    between them (see average_between). Buffers that are not floating-point are copied, not averaged.
    """

    def __init__(self, period: int = 200) -> None:
        if period < 1:
            raise ValueError(f"period of {period} batches: give a positive number")
        self._period = period
        self._count = 0
        self._mean: dict[str, Tensor] = {}

    @torch.no_grad()
    def update(self, model: nn.Module, batch: int) -> None:
        """Take the weights into the mean if `batch`, the batches trained so far, is a multiple of period."""
        if batch % self._period:
            return
        self._count += 1
        for name, value in model.state_dict().items():
            if not value.is_floating_point():
                self._mean[name] = value.clone()
            elif name not in self._mean:
                self._mean[name] = value.to(torch.float64, copy=True)
            else:
                mean = self._mean[name] = self._mean[name].to(value.device)  # a loaded one may be elsewhere
                mean += (value - mean) / self._count

    def state_dict(self) -> dict[str, Any]:
        """The number of updates ("count") and the means ("mean"), copies that later updates leave alone."""
        return {"count": self._count, "mean": {name: mean.clone() for name, mean in self._mean.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state`; later updates leave it alone."""
        self._count = state["count"]
        self._mean = {name: mean.clone() for name, mean in state["mean"].items()}


def average_between(start_state: dict[str, Any] | None, end_state: dict[str, Any]) -> dict[str, Tensor]:
    """Mean of the weights over the updates after `start_state`, up to and including `end_state`.

    For cumulative means m_a over n_a updates and m_b over n_b it is (n_b m_b - n_a m_a) / (n_b - n_a).

    Args:
        start_state: state_dict of a RunningAverage; None stands for the start of the training.
        end_state: a later state_dict of the same RunningAverage.

    Returns:
        A state_dict for the model: float32, with the buffers that are not floating-point from end_state.

    Raises:
        ValueError: if there is no update between the states, or they are of different models.
    """
    n_a = start_state["count"] if start_state else 0
    n_b = end_state["count"]
    if n_b <= n_a:
        raise ValueError(f"no average between {n_a} and {n_b} updates: give a later end, or an earlier start")
    mean_b = end_state["mean"]
    mean_a = start_state["mean"] if start_state and n_a else mean_b
    if mean_a.keys() != mean_b.keys():
        differing = sorted(mean_a.keys() ^ mean_b.keys())
        raise ValueError(f"averages of different models: {differing[0]} is in only one of them")
    weight_b, weight_a = n_b / (n_b - n_a), n_a / (n_b - n_a)
    return {
        name: (weight_b * end - weight_a * mean_a[name]).float() if end.is_floating_point() else end.clone()
        for name, end in mean_b.items()
    }
