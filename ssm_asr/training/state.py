"""Everything that training changes, and that a checkpoint must therefore hold."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch

from ssm_asr.training.averaging import RunningAverage
from ssm_asr.training.optim import ScaledAdam
from ssm_asr.transducer.model import Transducer


@dataclass
class Progress:
    """How far a run has come. All processes of a run hold equal values.

    Checkpoints and trained.json hold these fields as a dictionary, in this order.
    """

    batch: int = 0  # This many batches have been trained in all epochs together.
    epoch: int = 1  # This epoch is being trained; a finished run has num_epochs + 1 here.
    batch_in_epoch: int = 0  # This many batches have been trained in this epoch.
    audio_s: float = 0.0  # All processes together have trained on this many seconds of audio.
    best_valid_loss: float = math.inf  # Losses are in nats per feature frame.
    skipped_utterances: int = 0  # No alignment fits the transcripts of this many utterances.
    bad_batches: int = 0  # This many batches, each of one process, were skipped for want of a finite loss.
    valid_loss: float | None = None  # There is none before the first validation, and no entry in the dictionary.

    def to_dict(self) -> dict[str, Any]:
        """Returns the dictionary that checkpoints and trained.json hold."""
        values = dataclasses.asdict(self)
        if self.valid_loss is None:
            del values["valid_loss"]
        return values

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> "Progress":
        """Reads the dictionary of a checkpoint; entries that this version does not know are ignored."""
        known = {field.name for field in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in saved.items() if name in known})


@dataclass
class TrainingState:
    """The parts of a run that change as it trains."""

    model: Transducer
    optimizer: ScaledAdam
    scaler: torch.amp.GradScaler  # It is enabled for fp16 alone.
    average: RunningAverage  # The first process alone updates it.
    progress: Progress = dataclasses.field(default_factory=Progress)
