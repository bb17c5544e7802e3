"""Checkpoints: everything needed to use, average or resume a model, in one file, written atomically.

A checkpoint is a dictionary of tensors and plain values, so that `torch.load(weights_only=True)` can open it: opening
one runs no code from it. Its entries:

    format     version of this layout
    config     the whole experiment, as nested dictionaries
    tokens     the tokenizer
    model      weights, by published parameter names
    average    the running mean of the weights (training checkpoints only)
    progress   batches, epochs and hours of audio seen; validation losses
    training   optimiser, random state, position in the data (files that a run can resume from only)
"""

import os
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ssm_asr import config
from ssm_asr.data.tokens import Tokenizer
from ssm_asr.transducer.model import Transducer

FORMAT = 1


class CheckpointError(ValueError):
    """A file that is no checkpoint of this project, or does not fit; the message names file and remedy."""


class Loaded(NamedTuple):
    """A model ready for use, in evaluation mode, with all that belongs to it."""

    model: Transducer
    experiment: config.Experiment
    tokenizer: Tokenizer
    progress: dict[str, Any]


def pack(
    experiment: config.Experiment,
    tokenizer: Tokenizer,
    model_state: dict[str, torch.Tensor],
    progress: dict[str, Any],
    **parts: Any,
) -> dict[str, Any]:
    """The dictionary of a checkpoint; `parts` are the optional entries."""
    return {
        "format": FORMAT,
        "config": config.to_dict(experiment),
        "tokens": tokenizer.to_dict(),
        "model": model_state,
        "progress": progress,
        **parts,
    }


def save(checkpoint: dict[str, Any], path: str | Path) -> None:
    """Writes the file whole or not at all: to a temporary name beside it, flushed to disk, then renamed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())  # a temporary file is its owner's alone
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _umask() -> int:
    """The process's file mode mask; it can only be read by setting it."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def load(path: str | Path) -> dict[str, Any]:
    """Reads a checkpoint to the CPU.

    Raises:
        CheckpointError: if the file is missing, damaged, or something else.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such checkpoint; train first, or give another --checkpoint") from None
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{path}: cannot be read as a checkpoint ({reason}); is the file whole?") from None
    if not isinstance(checkpoint, dict) or "format" not in checkpoint:
        raise CheckpointError(f"{path}: not a checkpoint of ssm_asr (no entry 'format')")
    if checkpoint["format"] != FORMAT:
        raise CheckpointError(f"{path}: format {checkpoint['format']}, this version reads {FORMAT}")
    return checkpoint


def load_model(path: str | Path, device: str | torch.device = "cpu") -> Loaded:
    """The model of a checkpoint, built from the configuration it carries."""
    checkpoint = load(path)
    experiment = config.from_dict(checkpoint["config"])
    tokenizer = Tokenizer.from_dict(checkpoint["tokens"])
    model = Transducer(experiment.model, tokenizer.vocab_size)
    model.load_state_dict(checkpoint["model"])
    return Loaded(model.to(device).eval(), experiment, tokenizer, checkpoint["progress"])
