"""Checkpoints hold everything needed to use, average or resume a model, in one file that is written atomically.

A checkpoint is a dictionary of tensors and plain values, so that `torch.load(weights_only=True)` can open it: opening
one runs no code from it. It has these entries:

    format     the version of this layout
    config     the whole experiment, as nested dictionaries
    tokens     the tokenizer
    model      the weights, by published parameter names
    average    the running mean of the weights (only in checkpoints of training)
    progress   batches, epochs and hours of audio seen, and validation losses
    training   the optimiser, what the data are, the number of processes (only in files that a run can resume from)

Format 1 is version 0.1's. It differs in the configuration alone, which `load` converts: train.cuda_graphs is left out,
since captured graphs now come with data.fixed_shapes unless train.fast is off. Version 0.1 cannot read format 2, whose
configurations have fields that it does not know, and says so.
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

FORMAT = 2
DAMAGED = "no checkpoint of this program, or a damaged one; was it copied whole?"


class CheckpointError(ValueError):
    """A file is no checkpoint of this project, or does not fit. The message names the file and the remedy."""


class WarmStart(NamedTuple):
    """What a warm start copied and what it left out.

    Attributes:
        copied: The names of the parameters that were copied.
        kept: The names of the model's parameters that the checkpoint lacks, or has in another shape.
        unused: The names of the checkpoint's parameters that the model lacks.
    """

    copied: list[str]
    kept: list[str]
    unused: list[str]

    def summary(self) -> str:
        """Describes the warm start in three lines, in which stacks and layers are counted, not named."""
        lines = [f"copied {len(self.copied)} weights"]
        for what, names in (("not in it, left as they start", self.kept), ("in it, of no use here", self.unused)):
            counts = Counter(re.sub(r"\.\d+(?=\.)", ".*", name) for name in names)
            lines.append(f"  {what}: {', '.join(f'{name} ({n})' for name, n in counts.items()) or 'none'}")
        return "\n".join(lines)


class Loaded(NamedTuple):
    """A model ready for use, in evaluation mode, and all that belongs to it."""

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
    """Makes the dictionary of a checkpoint; `parts` are its optional entries."""
    return {
        "format": FORMAT,
        "config": config.to_dict(experiment),
        "tokens": tokenizer.to_dict(),
        "model": model_state,
        "progress": progress,
        **parts,
    }


def save(checkpoint: dict[str, Any], path: str | Path) -> None:
    """Writes the file whole or not at all: it gets a temporary name, is flushed to disk, and is then renamed.

    The new name is flushed, too, so that it is there after a loss of power.

    Raises:
        CheckpointError: The file cannot be written.
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
        _sync_directory(path.parent)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError about positions
        raise CheckpointError(f"{path}: cannot be written ({error}); is the disk full?") from error
    finally:
        temporary.unlink(missing_ok=True)


def _sync_directory(directory: Path) -> None:
    if hasattr(os, "O_DIRECTORY"):  # Windows opens no directories
        place = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(place)
        finally:
            os.close(place)


def load(path: str | Path) -> dict[str, Any]:
    """Reads a checkpoint of this or an older format to the CPU, in this version's form.

    Raises:
        CheckpointError: The file is missing, damaged, no checkpoint, or of a newer format.
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
        raise CheckpointError(f"{path}: {DAMAGED}")
    written = checkpoint["format"]
    if type(written) is not int or written < 1:
        raise CheckpointError(f"{path}: {DAMAGED}")
    if written > FORMAT:
        raise CheckpointError(
            f"{path}: format {written} is of a newer version of ssm-asr, this one reads up to {FORMAT}; update ssm-asr"
        )
    return _converted(checkpoint)


def _converted(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Brings a checkpoint of an older format into this one's form."""
    if checkpoint["format"] < 2:
        config_tree = checkpoint.get("config")
        train = config_tree.get("train") if isinstance(config_tree, dict) else None
        if isinstance(train, dict):
            train.pop("cuda_graphs", None)
    return {**checkpoint, "format": FORMAT}


def wrong_checksum(file: BinaryIO | Path) -> str | None:
    """Returns the first part of a zip file, which torch.save writes, whose checksum is wrong, or None.

    PyTorch itself does not compare them.
    """
    with zipfile.ZipFile(file) as archive:
        return archive.testzip()


def _read(file: BinaryIO) -> Any:
    """Reads what torch.save wrote; gives None if the file is damaged or something else."""
    try:
        whole = wrong_checksum(file) is None
        file.seek(0)
        return torch.load(file, map_location="cpu", weights_only=True) if whole else None
    except pickle.UnpicklingError:
        raise
    except Exception:  # zipfile and torch raise errors of many kinds
        return None


def load_model(path: str | Path, device: str | torch.device = "cpu") -> Loaded:
    """Builds the model of a checkpoint from the configuration that it carries.

    Raises:
        CheckpointError: The file is missing, damaged, no checkpoint, or has entries that this version cannot use.
    """
    checkpoint = load(path)
    try:
        experiment = config.from_dict(checkpoint["config"])
        tokenizer = Tokenizer.from_dict(checkpoint["tokens"])
        model = Transducer(experiment.model, tokenizer.vocab_size)
        model.load_state_dict(checkpoint["model"])
        progress = checkpoint["progress"]
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{path}: does not fit this version: {reason}") from None
    return Loaded(model.to(device).eval(), experiment, tokenizer, progress)


def warm_start(model: Transducer, path: str | Path) -> WarmStart:
    """Copies every weight of a checkpoint whose name and shape one of the model's weights has.

    Raises:
        CheckpointError: The file is no checkpoint, or nothing in it fits.
    """
    weights = load(path).get("model", {})
    state = model.state_dict()
    copied = [name for name in state if name in weights and weights[name].shape == state[name].shape]
    if not copied:
        raise CheckpointError(f"{path}: none of its weights has the name and shape of one of this model's")
    model.load_state_dict({name: weights[name] for name in copied}, strict=False)
    return WarmStart(
        copied, [name for name in state if name not in copied], [name for name in weights if name not in state]
    )
