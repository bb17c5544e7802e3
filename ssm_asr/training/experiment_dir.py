"""The directory of a training run, and whether a run can go on in it.

In it are config.yaml, checkpoint-N.pt (after N batches; the last few, to resume from), epoch-N.pt and best.pt (weights
and their running mean), tensorboard/, bad_batches.jsonl if there were any, and trained.json when all is done.
"""

import hashlib
import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lhotse import CutSet

from ssm_asr import checkpoint
from ssm_asr.config import ConfigError, Experiment, from_dict, to_dict
from ssm_asr.data.filtering import text_of
from ssm_asr.data.tokens import Tokenizer

# Settings that decide how, or how long, a model is trained, but not what its weights are after so many batches.
ASIDE = {
    "data.num_workers",
    *("train.num_epochs", "train.fast", "train.log_every", "train.validate_every"),
    *("train.checkpoint_every", "train.keep_checkpoints"),
}


def resumable(exp_dir: Path) -> dict[int, Path]:
    """Batches trained -> checkpoint-N.pt, in order."""
    return _numbered(exp_dir, "checkpoint")


def epochs(exp_dir: Path) -> dict[int, Path]:
    """Epochs trained -> epoch-N.pt, in order."""
    return _numbered(exp_dir, "epoch")


def fingerprint(cuts: CutSet, tokenizer: Tokenizer, noise_cuts: CutSet | None = None) -> str:
    """A short name for what a model is trained on: cuts and noises, their order, lengths and texts, and the tokens."""
    digest = hashlib.sha256(repr(tokenizer.symbols).encode())
    for cut in itertools.chain(cuts, noise_cuts or ()):
        digest.update(f"{cut.id} {cut.duration} {text_of(cut)}\n".encode())
    return digest.hexdigest()[:16]


def make_ready(exp_dir: Path, experiment: Experiment, data: str) -> None:
    """Makes the directory, or looks what is in it: what a run of `experiment` cannot go on from is moved aside.

    It can go on from a run of the same model on the same data; other settings may change on the way, which is said.
    Anything else goes into superseded-N, and so does a run that has had all its epochs with other settings. Damaged
    checkpoints are renamed if an older one is whole.

    Args:
        data: `fingerprint` of the training data.

    Raises:
        CheckpointError: if there are checkpoints, but none that can be read.
    """
    exp_dir.mkdir(parents=True, exist_ok=True)
    for unfinished in exp_dir.glob(".*.pt.part"):  # of a run that was killed while it wrote
        unfinished.unlink()
    saved = _newest_whole(exp_dir)
    if saved is None and not epochs(exp_dir):
        return
    other = "a run without checkpoints to resume from" if saved is None else _other_run(saved, experiment, data)
    if not other:
        return
    kept = next(path for n in itertools.count(1) if not (path := exp_dir / f"superseded-{n}").exists())
    kept.mkdir()
    for path in list(exp_dir.iterdir()):
        if not path.name.startswith(("superseded-", ".stages")):
            path.rename(kept / path.name)
    print(f"{exp_dir}: held {other}, which is now in {kept}; training starts anew")


def _numbered(exp_dir: Path, kind: str) -> dict[int, Path]:
    matches = ((re.fullmatch(rf"{kind}-(\d+)\.pt", path.name), path) for path in exp_dir.glob(f"{kind}-*.pt"))
    return dict(sorted((int(match[1]), path) for match, path in matches if match))


def _newest_whole(exp_dir: Path) -> dict[str, Any] | None:
    """The newest checkpoint that can be read; None if there are no checkpoints at all."""
    damaged: list[tuple[Path, checkpoint.CheckpointError]] = []
    for path in reversed(resumable(exp_dir).values()):
        try:
            saved = checkpoint.load(path)
        except checkpoint.CheckpointError as error:
            damaged.append((path, error))
            continue
        for bad, reason in damaged:
            print(f"{reason}; it is now {bad.name}.damaged, and training goes on from {path.name}")
            bad.rename(f"{bad}.damaged")
        return saved
    if damaged:
        raise checkpoint.CheckpointError(
            f"{exp_dir}: no checkpoint to resume from can be read ({damaged[0][1]}); "
            "move the directory away to train anew, or give another --exp-dir"
        )
    return None


def _other_run(saved: dict[str, Any], experiment: Experiment, data: str) -> str:
    """What the saved run is, if training cannot go on from it."""
    try:
        before = from_dict(saved["config"])
    except ConfigError:  # of a version with other fields
        return "a run of another version"
    if (before.model, before.tokens) != (experiment.model, experiment.tokens) or saved["training"]["data"] != data:
        return "a run of another model or other data"
    was, now = _settings(before), _settings(experiment)
    changes = ", ".join(f"{name} {was.get(name)} -> {value}" for name, value in now.items() if was.get(name) != value)
    if changes and saved["progress"]["epoch"] > experiment.train.num_epochs:
        return f"a finished run of other settings ({changes})"
    if changes:
        print(f"training goes on with other settings: {changes}")
    return ""


def _settings(experiment: Experiment) -> dict[str, Any]:
    """Dotted names -> values of what decides about weights beside model and tokens."""
    sections = {name: to_dict(experiment)[name] for name in ("data", "optim", "train")}
    return {name: value for name, value in _dotted(sections) if name not in ASIDE}


def _dotted(tree: dict[str, Any], under: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _dotted(value, f"{under}{key}.")
        else:
            yield under + key, value
