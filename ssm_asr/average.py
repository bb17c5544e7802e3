"""Average the weights over the last epochs: python -m ssm_asr.average --exp-dir DIR --epoch E --last A

Every epoch's checkpoint holds the running mean of all weights so far. The difference of two such means is the mean
over the epochs between them: the default averages the last epochs that the configuration names.
"""

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

from ssm_asr import checkpoint
from ssm_asr.averaging import average_between
from ssm_asr.config import Experiment, from_dict, load_experiment, to_dict
from ssm_asr.experiment_dir import epochs
from ssm_asr.program import run


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


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--exp-dir", required=True, type=Path, help="directory that training wrote")
    parser.add_argument("--epoch", type=int, help="last epoch to average (default: the last there is)")
    parser.add_argument("--last", type=int, help="how many epochs (default: decode.average_epochs)")
    parser.add_argument("--out", type=Path, help="checkpoint to write (default: EXP_DIR/averaged.pt)")
    parser.add_argument("--config", help="YAML file whose decode section the checkpoint gets (default: of training)")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=VALUE", help="change one field of --config")
    options = parser.parse_args(arguments)
    out = options.out or options.exp_dir / "averaged.pt"
    try:
        if options.set and not options.config:
            raise ValueError("--set: changes a field of --config, so give that as well")
        settings = load_experiment(options.config, options.set) if options.config else None
        first, last = average(options.exp_dir, options.epoch, options.last, out, settings)
    except (checkpoint.CheckpointError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{out}: mean of the weights over epochs {first} to {last}")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
