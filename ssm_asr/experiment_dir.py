"""The directory of a training run, and whether a run can go on in it.

In it are config.yaml, checkpoint-N.pt (after N batches; the last few, to resume from), epoch-N.pt and best.pt (weights
and their running mean), tensorboard/, bad_batches.jsonl if there were any, and trained.json when all is done.
"""

import hashlib
import itertools
import re
from pathlib import Path
from typing import Any

from lhotse import CutSet

from ssm_asr import checkpoint
from ssm_asr.config import ConfigError, Experiment, from_dict
from ssm_asr.data.tokens import Tokenizer


def resumable(exp_dir: Path) -> dict[int, Path]:
    """Batches trained -> checkpoint-N.pt, in order."""
    return _numbered(exp_dir, "checkpoint")


def epochs(exp_dir: Path) -> dict[int, Path]:
    """Epochs trained -> epoch-N.pt, in order."""
    return _numbered(exp_dir, "epoch")


def fingerprint(cuts: CutSet, tokenizer: Tokenizer) -> str:
    """A short name for what a model is trained on: which cuts, how long, in which order, and the tokens."""
    digest = hashlib.sha256(repr(tokenizer.symbols).encode())
    for cut in cuts:
        digest.update(f"{cut.id} {cut.duration}".encode())
    return digest.hexdigest()[:16]


def make_ready(exp_dir: Path, experiment: Experiment, data: str) -> None:
    """Makes the directory, or looks what is in it: what a run of `experiment` cannot go on from is moved aside.

    It can go on from a run of the same model on the same data; other settings may change on the way. Anything else
    goes into superseded-N. Damaged checkpoints are renamed if an older one is whole.

    Args:
        data: `fingerprint` of the training data.

    Raises:
        CheckpointError: if there are checkpoints, but none that can be read.
    """
    exp_dir.mkdir(parents=True, exist_ok=True)
    saved = _newest_whole(exp_dir)
    if saved is None and not epochs(exp_dir):
        return
    if saved is not None and _can_go_on(saved, experiment, data):
        return
    kept = next(path for n in itertools.count(1) if not (path := exp_dir / f"superseded-{n}").exists())
    kept.mkdir()
    for path in list(exp_dir.iterdir()):
        if not path.name.startswith(("superseded-", ".stages")):
            path.rename(kept / path.name)
    reason = "a run of another model or other data" if saved else "a run without checkpoints to resume from"
    print(f"{exp_dir}: held {reason}, which is now in {kept}; training starts anew")


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


def _can_go_on(saved: dict[str, Any], experiment: Experiment, data: str) -> bool:
    try:
        before = from_dict(saved["config"])
    except ConfigError:  # of a version with other fields
        return False
    same_model = (before.model, before.tokens) == (experiment.model, experiment.tokens)
    return same_model and saved["training"]["data"] == data
