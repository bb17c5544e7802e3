"""The mean of the weights over the last epochs, from the running means that checkpoints hold."""

import dataclasses
from pathlib import Path
from typing import Any

from ssm_asr import checkpoint
from ssm_asr.config import Experiment, from_dict, to_dict
from ssm_asr.training.averaging import average_between
from ssm_asr.training.experiment_dir import epochs


def average(
    exp_dir: Path, epoch: int | None, last: int | None, out: Path, settings: Experiment | None = None
) -> tuple[int, int]:
    """Writes a checkpoint whose weights are the mean over the `last` epochs up to `epoch`.

    Args:
        epoch: the last there is if None, or the last of `settings`.
        last: what the configuration says if None.
        settings: those of decoding go into the checkpoint, instead of those that training had.

    Returns:
        (first, last) epoch that the mean covers.

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
