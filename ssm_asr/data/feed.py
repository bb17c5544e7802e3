"""Gives a training run all its batches, of training and of validation, in the order in which it needs them.

One set of workers serves the whole run and loads ahead of it. So the first batch of an epoch is ready when the epoch
before ends, and so are the batches of a validation when it is due.
"""

import enum
from collections.abc import Iterator
from typing import NamedTuple

import torch
from lhotse import CutSet

from ssm_asr.data.batches import Batch, TrainingJobs, eval_jobs, load_batches
from ssm_asr.data.config import DataConfig
from ssm_asr.data.loading import Job, Loader


class Position(NamedTuple):
    """Where in its data a run begins: 0 batches, epoch 1, 0 batches of it, or where a checkpoint was saved."""

    batch: int
    epoch: int
    batch_in_epoch: int


class Event(enum.Enum):
    """What a run does next."""

    TRAIN = "train on a batch"
    VALIDATE = "validate on the batches of `Feed.validation`"
    END_EPOCH = "end the epoch"


class Feed(Iterator[tuple[Event, Batch | None]]):
    """Iterates over what a run does: a batch comes with TRAIN, and none with the other events.

    Args:
        jobs: decides what the training batches are.
        valid_cuts: this process's part of the validation cuts.
        loader: loads training batches.
        config: of the data.
        start: where the run begins.
        num_epochs: the last epoch.
        validate_every: a run validates after each so many batches, and at the end of an epoch.
        device: where the batches are.
    """

    def __init__(
        self,
        jobs: TrainingJobs,
        valid_cuts: CutSet,
        loader: Loader,
        config: DataConfig,
        *,
        start: Position,
        num_epochs: int,
        validate_every: int,
        device: torch.device,
    ) -> None:
        self._jobs, self._start, self._num_epochs, self._validate_every = jobs, start, num_epochs, validate_every
        self._valid_jobs = eval_jobs(valid_cuts, config.max_duration_s)
        # The events stay here, in the order of the jobs that are loaded; workers need not know them.
        self._events: list[Event] = []
        self._batches = load_batches(self._all_jobs, loader, config.num_workers, device)
        self._fetched: list[Batch] = []

    def _all_jobs(self) -> Iterator[Job]:
        """Yields all jobs, and notes the events in their order."""
        batch = self._start.batch
        for epoch in range(self._start.epoch, self._num_epochs + 1):
            validated = False
            first = self._start.batch_in_epoch if epoch == self._start.epoch else 0
            for job in self._jobs.of_epoch(epoch, first):
                self._events.append(Event.TRAIN)
                yield job
                batch += 1
                validated = batch % self._validate_every == 0
                if validated:
                    yield from self._validation_jobs()
            if not validated:
                yield from self._validation_jobs()
            self._events.append(Event.END_EPOCH)

    def _validation_jobs(self) -> Iterator[Job]:
        self._events.append(Event.VALIDATE)
        yield from self._valid_jobs

    def fetch_next(self) -> None:
        """Fetches the batch that comes next, unless it has been fetched, so that it is ready at its turn."""
        if not self._fetched:
            self._fetched += [batch for batch in [next(self._batches, None)] if batch is not None]

    def _take(self) -> Batch:
        self.fetch_next()
        return self._fetched.pop()

    def __next__(self) -> tuple[Event, Batch | None]:
        if not self._events:
            self.fetch_next()  # the events that come next are noted when a job is asked for
        if not self._events:
            raise StopIteration
        event = self._events.pop(0)
        return event, self._take() if event is Event.TRAIN else None

    def close(self) -> None:
        """Ends the workers."""
        self._batches.close()

    def validation(self) -> Iterator[Batch]:
        """Yields the batches of a validation, after its event."""
        for _ in self._valid_jobs:
            yield self._take()
