"""Checkpoints of a run: saving and loading them, and what it means when settings have changed since.

A run goes on from its newest checkpoint if model, tokens and data are the ones of the checkpoint. Other settings may
change on the way. If they concern which utterances are in which batch, the present epoch begins anew.
"""

import hashlib
import itertools
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from lhotse import CutSet

from ssm_asr import checkpoint
from ssm_asr.config import ConfigError, Experiment, from_dict, to_dict
from ssm_asr.data.filtering import text_of
from ssm_asr.data.tokens import Tokenizer
from ssm_asr.encoder.regularize import load_whitening_flags, whitening_flags
from ssm_asr.training import TrainingError, distributed
from ssm_asr.training.experiment_dir import epochs, load_newest, remove_unfinished, resumable, set_aside
from ssm_asr.training.optim import ScaledAdam
from ssm_asr.training.state import Progress, TrainingState

# These settings decide how, or how long, a model is trained, but not what its weights are after so many batches.
IRRELEVANT_TO_WEIGHTS = {
    "data.num_workers",
    *("train.num_epochs", "train.fast", "train.log_every", "train.validate_every"),
    *("train.checkpoint_every", "train.keep_checkpoints"),
}

MOST_UNWRITTEN = 3  # checkpoints in the memory of the host; the end of an epoch saves so many


class Checkpoints:
    """Saves the checkpoints of one run, and loads the newest one.

    Every process must call the methods, and the first one writes.

    Args:
        exp_dir: experiment directory.
        experiment: the present configuration, which goes into the checkpoints.
        tokenizer: goes into the checkpoints, too.
        fingerprint: of the training data (see `data_fingerprint`).
        place: this process.
    """

    def __init__(
        self, exp_dir: Path, experiment: Experiment, tokenizer: Tokenizer, fingerprint: str, place: distributed.Place
    ) -> None:
        self._exp_dir, self._experiment, self._tokenizer = exp_dir, experiment, tokenizer
        self._fingerprint, self._place = fingerprint, place
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoints")
        self._unwritten: list[Future[None]] = []

    def save(self, state: TrainingState, name: str, **entries: Any) -> None:
        """Saves the weights, their running mean and the progress, and more entries if given.

        They are copied to the host and written while training goes on.

        Raises:
            CheckpointError: if an earlier file could not be written.
        """
        if self._place.rank == 0:
            weights, average = state.model.state_dict(), state.average.state_dict()
            progress = state.progress.to_dict()
            packed = checkpoint.pack(self._experiment, self._tokenizer, weights, progress, average=average, **entries)
            self._wait_for_all_but(MOST_UNWRITTEN - 1)
            copies, on_cuda = _copied(packed), self._place.device.type == "cuda"
            copied = torch.cuda.current_stream().record_event() if on_cuda else None
            self._unwritten.append(self._writer.submit(self._write, copies, copied, name))

    def finish(self) -> None:
        """Waits until all files are written.

        Raises:
            CheckpointError: if one could not be written.
        """
        self._wait_for_all_but(0)

    def _wait_for_all_but(self, count: int) -> None:
        while len(self._unwritten) > count:
            self._unwritten.pop(0).result()

    def _write(self, packed: dict[str, Any], copied: torch.cuda.Event | None, name: str) -> None:
        """Writes one file; after one to resume from, removes the oldest ones beyond the number to keep."""
        if copied is not None:
            copied.synchronize()
        checkpoint.save(packed, self._exp_dir / name)
        if "training" in packed:
            for path in list(resumable(self._exp_dir).values())[: -self._experiment.train.keep_checkpoints]:
                path.unlink()

    def save_to_resume(self, state: TrainingState) -> None:
        """Saves the whole state to checkpoint-N.pt, and removes the oldest ones beyond the number to keep.

        Raises:
            CheckpointError: as `save` does.
        """
        training = {
            "optimizer": state.optimizer.state_dict(),
            "scaler": state.scaler.state_dict(),
            # Each process has its own flags.
            "whitening": distributed.gather(whitening_flags(state.model), self._place),
            "world_size": self._place.world_size,
            "data": self._fingerprint,
        }
        self.save(state, f"checkpoint-{state.progress.batch}.pt", training=training)

    def load_newest_into(self, state: TrainingState) -> bool:
        """Loads the newest checkpoint-N.pt into the state; returns whether there is one.

        Of a run that has had all its epochs, the progress alone is loaded, since nothing more is trained.

        Raises:
            CheckpointError: if the checkpoint cannot be read.
            TrainingError: if another number of processes trained it.
        """
        paths = list(resumable(self._exp_dir).values())
        if not paths:
            return False
        saved = checkpoint.load(paths[-1])
        progress = Progress.from_dict(saved["progress"])
        finished = progress.epoch > self._experiment.train.num_epochs
        if saved["training"]["world_size"] != self._place.world_size and not finished:
            raise TrainingError(
                f"{paths[-1]}: was trained by {saved['training']['world_size']} processes, now there are "
                f"{self._place.world_size}; use as many, or another --exp-dir"
            )
        state.progress = progress
        self._tell(f"resumed from {paths[-1]}: epoch {progress.epoch}, batch {progress.batch}")
        if not finished:
            self._load_parts(state, saved)
        return True

    def _load_parts(self, state: TrainingState, saved: dict[str, Any]) -> None:
        """Loads all parts but the progress; begins the epoch anew if the settings now give other batches."""
        training = saved["training"]
        state.model.load_state_dict(saved["model"])
        state.average.load_state_dict(saved["average"])
        _load_optimizer(state.optimizer, training["optimizer"])
        if training["scaler"]:  # It is empty unless the checkpoint was trained in fp16.
            state.scaler.load_state_dict(training["scaler"])
        load_whitening_flags(state.model, training["whitening"][self._place.rank])
        if state.progress.batch_in_epoch and _batching(from_dict(saved["config"])) != _batching(self._experiment):
            state.progress.batch_in_epoch = 0
            self._tell(f"epoch {state.progress.epoch} begins anew, since its batches are others now")

    def _tell(self, text: str) -> None:
        if self._place.rank == 0:
            print(text)


def _copied(part: Any) -> Any:
    """Returns a copy of a checkpoint, or of a part of it, in the memory of the host; a GPU copies in the background."""
    if isinstance(part, torch.Tensor):
        return part.detach().to("cpu", non_blocking=True, copy=True)
    if isinstance(part, dict):
        return {name: _copied(value) for name, value in part.items()}
    return [_copied(value) for value in part] if isinstance(part, list) else part


def make_ready(exp_dir: Path, experiment: Experiment, fingerprint: str) -> None:
    """Makes the experiment directory. If it holds a run from which `experiment` cannot go on, this run is set aside.

    A run is set aside if it has another model, other tokens or other data, if it has had all its epochs with other
    settings, or if it has no checkpoint to resume from. Changed settings of a run that goes on are printed.

    Args:
        fingerprint: of the training data (see `data_fingerprint`).

    Raises:
        CheckpointError: if there are checkpoints, but none can be read.
    """
    exp_dir.mkdir(parents=True, exist_ok=True)
    remove_unfinished(exp_dir)
    saved = load_newest(exp_dir)
    if saved is not None:
        obstacle = _obstacle(saved, experiment, fingerprint)
    else:
        obstacle = "a run without checkpoints to resume from" if epochs(exp_dir) else ""
    if obstacle:
        superseded = set_aside(exp_dir)
        print(f"{exp_dir}: held {obstacle}, which is now in {superseded}; training starts anew")


def data_fingerprint(cuts: CutSet, tokenizer: Tokenizer, noise_cuts: CutSet | None = None) -> str:
    """Returns a short name for cuts and noises, with their order, lengths and texts, and for the tokens."""
    digest = hashlib.sha256(repr(tokenizer.symbols).encode())
    for cut in itertools.chain(cuts, noise_cuts or ()):
        digest.update(f"{cut.id} {cut.duration} {text_of(cut)}\n".encode())
    return digest.hexdigest()[:16]


def _obstacle(saved: dict[str, Any], experiment: Experiment, fingerprint: str) -> str:
    """Says which other run a checkpoint is of, if training cannot go on from it; else prints the changed settings."""
    try:
        before = from_dict(saved["config"])
    except ConfigError:  # That version had other fields.
        return "a run of another version"
    same_model = (before.model, before.tokens) == (experiment.model, experiment.tokens)
    if not same_model or saved["training"]["data"] != fingerprint:
        return "a run of another model or other data"
    changes = ", ".join(_changes(before, experiment))
    if changes and saved["progress"]["epoch"] > experiment.train.num_epochs:
        return f"a finished run of other settings ({changes})"
    if changes:
        print(f"training goes on with other settings: {changes}")
    return ""


def _changes(before: Experiment, now: Experiment) -> list[str]:
    """Lists the changes of settings that matter for the weights, model and tokens aside."""
    old, new = (
        dict(_flatten({section: to_dict(experiment)[section] for section in ("data", "optim", "train", "loss")}))
        for experiment in (before, now)
    )
    return [
        f"{name} {old.get(name)} -> {value}"
        for name, value in new.items()
        if old.get(name) != value and name not in IRRELEVANT_TO_WEIGHTS
    ]


def _flatten(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the leaves of nested dictionaries under dotted names."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _batching(experiment: Experiment) -> tuple[Any, ...]:
    """Returns the settings that decide which utterances are in which batch of an epoch."""
    data = experiment.data
    return experiment.train.seed, data.max_duration_s, data.num_buckets, data.fixed_shapes


def _load_optimizer(optimizer: ScaledAdam, saved: dict[str, Any]) -> None:
    """Loads the state of an optimiser, but not the learning rates in it: the present settings count."""
    rates = [{name: group[name] for name in ("initial_lr", "lr_scale")} for group in optimizer.param_groups]
    optimizer.load_state_dict(saved)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group.update(rate)
