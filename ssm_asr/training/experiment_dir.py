"""The files of a training run.

config.yaml          the configuration
checkpoint-N.pt      all that the run needs to resume, after N batches; the last few are kept
epoch-N.pt, best.pt  weights and their running mean, after N epochs and after the best validation
tensorboard/         figures
bad_batches.jsonl    batches without a finite loss, if there were any
trained.json         the progress of a finished run
.run                 which process trains here, locked as long as it does
superseded-N/        the files of an earlier run, from which this one could not go on
"""

import itertools
import json
import os
import re
import socket
from datetime import datetime
from pathlib import Path
from typing import IO, Any

from ssm_asr import checkpoint


def claim(exp_dir: Path) -> IO[str]:
    """Makes the directory and claims it for this process, until the file that it returns is closed.

    The system gives the claim up when the process ends in any way, so that none is left behind.

    Raises:
        ValueError: if another process has claimed it; the message names it.
    """
    exp_dir.mkdir(parents=True, exist_ok=True)
    file = open(exp_dir / ".run", "a+", encoding="utf-8")  # noqa: SIM115  (it stays open)
    try:
        import fcntl  # where there is none, such as on Windows, nothing is claimed

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:
        return file
    except BlockingIOError:
        file.seek(0)
        text = file.read()
        file.close()
        raise ValueError(f"{exp_dir}: {_who(text)} trains here now; stop it, or give another --exp-dir") from None
    file.truncate(0)
    now = datetime.now().astimezone().isoformat(timespec="seconds")
    json.dump({"process": os.getpid(), "host": socket.gethostname(), "since": now}, file)
    file.flush()
    return file


def _who(text: str) -> str:
    try:
        run = json.loads(text)
        return f"process {run['process']} on {run['host']}, since {run['since']},"
    except (ValueError, TypeError, KeyError):
        return "another process"


def resumable(exp_dir: Path) -> dict[int, Path]:
    """Maps numbers of batches to the files checkpoint-N.pt, in ascending order."""
    return _numbered(exp_dir, "checkpoint")


def epochs(exp_dir: Path) -> dict[int, Path]:
    """Maps numbers of epochs to the files epoch-N.pt, in ascending order."""
    return _numbered(exp_dir, "epoch")


def _numbered(exp_dir: Path, kind: str) -> dict[int, Path]:
    matches = ((re.fullmatch(rf"{kind}-(\d+)\.pt", path.name), path) for path in exp_dir.glob(f"{kind}-*.pt"))
    return dict(sorted((int(match[1]), path) for match, path in matches if match))


def remove_unfinished(exp_dir: Path) -> None:
    """Removes the files that a run was writing when it was killed."""
    for path in exp_dir.glob(".*.pt.part"):
        path.unlink()


def load_newest(exp_dir: Path) -> dict[str, Any] | None:
    """Loads the newest checkpoint that can be read; newer ones, which are damaged, are renamed to NAME.damaged.

    Returns:
        The checkpoint; None if the run has no checkpoints at all.

    Raises:
        CheckpointError: if there are checkpoints, but none can be read.
    """
    damaged: list[tuple[Path, checkpoint.CheckpointError]] = []
    for path in reversed(resumable(exp_dir).values()):
        try:
            saved = checkpoint.load(path)
        except checkpoint.CheckpointError as error:
            damaged.append((path, error))
            continue
        for damaged_path, reason in damaged:
            print(f"{reason}; it is now {damaged_path.name}.damaged, and training goes on from {path.name}")
            damaged_path.rename(f"{damaged_path}.damaged")
        return saved
    if damaged:
        raise checkpoint.CheckpointError(
            f"{exp_dir}: no checkpoint to resume from can be read ({damaged[0][1]}); "
            "move the directory away to train anew, or give another --exp-dir"
        )
    return None


def set_aside(exp_dir: Path) -> Path:
    """Moves the files of a run into a new directory superseded-N in its own; returns this directory.

    The records of a recipe's stages (.stages) and what was set aside before stay where they are.
    """
    superseded = next(path for n in itertools.count(1) if not (path := exp_dir / f"superseded-{n}").exists())
    superseded.mkdir()
    for path in list(exp_dir.iterdir()):
        if not path.name.startswith(("superseded-", ".stages", ".run")):
            path.rename(superseded / path.name)
    return superseded
