"""Averages of weights: the running mean that training keeps, and the mean over some epochs, which two of them give."""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ssm_asr import checkpoint
from ssm_asr.config import Experiment, from_dict, to_dict
from ssm_asr.training.experiment_dir import epochs


class RunningAverage:
    """Keeps the mean of a model's weights over all its updates so far, of which there is one every `period` batches.

    The mean is held in float64, so that two of its states give the mean over the batches between them (see
    `average_between`). Buffers that are not floating-point are copied, not averaged.
    """

    def __init__(self, period: int = 200) -> None:
        if period < 1:
            raise ValueError(f"period of {period} batches: give a positive number")
        self._period = period
        self._count = 0
        self._mean: dict[str, Tensor] = {}

    @torch.no_grad()
    def update(self, model: nn.Module, batch: int) -> None:
        """Takes the weights into the mean if `batch`, the number of batches trained, is a multiple of the period."""
        if batch % self._period:
            return
        self._count += 1
        for name, value in model.state_dict().items():
            if not value.is_floating_point():
                self._mean[name] = value.clone()
            elif name not in self._mean:
                self._mean[name] = value.to(torch.float64, copy=True)
            else:
                mean = self._mean[name] = self._mean[name].to(value.device)  # A loaded mean may be on another device.
                mean += (value - mean) / self._count

    def state_dict(self) -> dict[str, Any]:
        """Returns the number of updates ("count") and copies of the means ("mean")."""
        return {"count": self._count, "mean": {name: mean.clone() for name, mean in self._mean.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from a state, which later updates do not change."""
        self._count = state["count"]
        self._mean = {name: mean.clone() for name, mean in state["mean"].items()}


def average_between(start_state: dict[str, Any] | None, end_state: dict[str, Any]) -> dict[str, Tensor]:
    """Computes the mean of the weights over the updates after `start_state`, up to and including `end_state`.

    With the mean m_a of the first n_a updates and the mean m_b of the first n_b, it is
    (n_b m_b - n_a m_a) / (n_b - n_a).

    Args:
        start_state: state_dict of a RunningAverage; None stands for the start of the training.
        end_state: a later state_dict of this RunningAverage.

    Returns:
        A state_dict for the model in float32; buffers that are not floating-point come from end_state.

    Raises:
        ValueError: if there is no update between the states, or they belong to different models.
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


def average_epochs(
    exp_dir: Path, epoch: int | None, last: int | None, out: Path, settings: Experiment | None = None
) -> tuple[int, int]:
    """Writes a checkpoint whose weights are the mean over the `last` epochs up to and including `epoch`.

    Args:
        exp_dir: directory of a training run.
        epoch: by default the last epoch that there is, or the last one of `settings` if they have fewer.
        last: by default what the configuration says, `decode.average_epochs`.
        out: the checkpoint to write.
        settings: if given, the checkpoint gets their decode section instead of the one that training had.

    Returns:
        The first and the last epoch that the mean covers.

    Raises:
        CheckpointError: if a checkpoint is missing.
        ValueError: if there is nothing to average.
    """
    files = epochs(exp_dir)
    if not files:
        raise checkpoint.CheckpointError(f"{exp_dir}: no epoch-*.pt; train first, or give another --exp-dir")
    if epoch is None:
        epoch = max(files) if settings is None else min(max(files), settings.train.num_epochs)
    end = _load_epoch(files, epoch, exp_dir)
    experiment = from_dict(end["config"])
    if settings is not None:
        experiment = dataclasses.replace(experiment, decode=settings.decode)
        end["config"] = to_dict(experiment)
    last = experiment.decode.average_epochs if last is None else last
    if last < 1:
        raise ValueError(f"--last {last}: give a positive number of epochs")
    start_epoch = max(0, epoch - last)
    start = _load_epoch(files, start_epoch, exp_dir)["average"] if start_epoch else None
    if end["average"]["count"] == (start["count"] if start else 0):
        raise ValueError(
            f"{exp_dir}: the running mean was not updated in epochs {start_epoch + 1} to {epoch}; average more epochs, "
            f"or train with a train.average_period below {experiment.train.average_period} batches"
        )
    end["model"] = average_between(start, end["average"])
    del end["average"]
    end["progress"]["averaged_epochs"] = [start_epoch + 1, epoch]
    checkpoint.save(end, out)
    return start_epoch + 1, epoch


def _load_epoch(files: dict[int, Path], epoch: int, exp_dir: Path) -> dict[str, Any]:
    if epoch not in files:
        there = ", ".join(map(str, files))
        raise checkpoint.CheckpointError(
            f"{exp_dir}: no epoch-{epoch}.pt; there are epochs {there}: give another --epoch or --last"
        )
    return checkpoint.load(files[epoch])
