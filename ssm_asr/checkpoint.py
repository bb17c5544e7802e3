"""Checkpoints: everything needed to use, average or resume a model, in one file, written atomically.

A checkpoint is a dictionary of tensors and plain values, so that `torch.load(weights_only=True)` can open it: opening
one runs no code from it. Its entries:

    format     version of this layout
    config     the whole experiment, as nested dictionaries
    tokens     the tokenizer
    model      weights, by published parameter names
    average    the running mean of the weights (training checkpoints only)
    progress   batches, epochs and hours of audio seen; validation losses
    training   optimiser, what the data are, number of processes (files that a run can resume from only)
"""

import os
import pickle
import re
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch

from ssm_asr import config
from ssm_asr.data.tokens import Tokenizer
from ssm_asr.transducer.model import Transducer

FORMAT = 1


class CheckpointError(ValueError):
    """A file that is no checkpoint of this project, or does not fit; the message names file and remedy."""


class WarmStart(NamedTuple):
    """What a warm start copied and what it left out, as parameter names."""

    copied: list[str]
    kept: list[str]  # parameters of the model that the checkpoint lacks, or has in another shape
    unused: list[str]  # parameters of the checkpoint that the model lacks

    def summary(self) -> str:
        """A few lines for a reader; stacks and layers are counted, not named."""
        lines = [f"copied {len(self.copied)} weights"]
        for what, names in (("not in it, left as they start", self.kept), ("in it, of no use here", self.unused)):
            counts = Counter(re.sub(r"\.\d+(?=\.)", ".*", name) for name in names)
            lines.append(f"  {what}: {', '.join(f'{name} ({n})' for name, n in counts.items()) or 'none'}")
        return "\n".join(lines)


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
    """Writes the file whole or not at all: under a temporary name beside it, flushed to disk, then renamed.

    Raises:
        CheckpointError: if it cannot be written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    try:
        with temporary.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError about positions
        raise CheckpointError(f"{path}: cannot be written ({error}); is the disk full?") from error
    finally:
        temporary.unlink(missing_ok=True)


def load(path: str | Path) -> dict[str, Any]:
    """Reads a checkpoint to the CPU.

    Raises:
        CheckpointError: if the file is missing, damaged, or something else.
    """
    try:
        with open(path, "rb") as file:
            checkpoint = _read(file)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such checkpoint; train first, or give another path") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    except pickle.UnpicklingError:
        reason = "damaged, or holds more than tensors and plain values, which may be code"
        raise CheckpointError(f"{path}: refused: {reason}") from None
    if not isinstance(checkpoint, dict) or "format" not in checkpoint:
        raise CheckpointError(f"{path}: no checkpoint of this program, or a damaged one; was it copied whole?")
    if checkpoint["format"] != FORMAT:
        raise CheckpointError(f"{path}: format {checkpoint['format']}, this version reads {FORMAT}; train anew")
    return checkpoint


def _read(file: BinaryIO) -> Any:
    """What torch.save wrote; None if the file is damaged or something else."""
    try:
        with zipfile.ZipFile(file) as archive:
            whole = archive.testzip() is None  # torch itself does not compare the checksums
        file.seek(0)
        return torch.load(file, map_location="cpu", weights_only=True) if whole else None
    except pickle.UnpicklingError:
        raise
    except Exception:  # zipfile and torch raise many kinds
        return None


def load_model(path: str | Path, device: str | torch.device = "cpu") -> Loaded:
    """The model of a checkpoint, built from the configuration it carries.

    Raises:
        CheckpointError: if the file is missing, damaged, something else, or of a version with another configuration.
    """
    checkpoint = load(path)
    try:
        experiment = config.from_dict(checkpoint["config"])
        tokenizer = Tokenizer.from_dict(checkpoint["tokens"])
        model = Transducer(experiment.model, tokenizer.vocab_size)
        model.load_state_dict(checkpoint["model"])
    except (config.ConfigError, KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{path}: does not fit this version: {reason}") from None
    return Loaded(model.to(device).eval(), experiment, tokenizer, checkpoint["progress"])


def warm_start(model: Transducer, path: str | Path) -> WarmStart:
    """Copies every weight of a checkpoint that the model has by the same name and shape.

    Raises:
        CheckpointError: if the file is no checkpoint, or nothing in it fits.
    """
    weights = load(path)["model"]
    state = model.state_dict()
    copied = [name for name in state if name in weights and weights[name].shape == state[name].shape]
    if not copied:
        raise CheckpointError(f"{path}: none of its weights has the name and shape of one of this model's")
    model.load_state_dict({name: weights[name] for name in copied}, strict=False)
    return WarmStart(
        copied, [name for name in state if name not in copied], [name for name in weights if name not in state]
    )
