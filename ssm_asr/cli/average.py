"""Average the weights over the last epochs: ssm-asr average --exp-dir DIR --epoch E --last A

Every epoch's checkpoint holds the running mean of all weights so far. The difference of two of these means is the mean
over the epochs between them. By default the program averages the last epochs, as many as the configuration says.
"""

import argparse
import sys
from pathlib import Path

from ssm_asr import checkpoint
from ssm_asr.config import load_experiment
from ssm_asr.training.averaging import average_epochs


def main(arguments: list[str] | None = None) -> int:
    """Runs the program, and returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--exp-dir", required=True, type=Path, help="directory that training wrote")
    parser.add_argument("--epoch", type=int, help="last epoch to average (default: the last there is)")
    parser.add_argument("--last", type=int, help="how many epochs (default: decode.average_epochs)")
    parser.add_argument("--out", type=Path, help="checkpoint to write (default: EXP_DIR/averaged.pt)")
    parser.add_argument(
        "--config",
        help="YAML file whose decode section the checkpoint gets; it also limits the default of --epoch to its "
        "train.num_epochs (default: as in training)",
    )
    parser.add_argument("--set", action="append", default=[], metavar="A.B=VALUE", help="change one field of --config")
    options = parser.parse_args(arguments)
    out = options.out or options.exp_dir / "averaged.pt"
    try:
        if options.set and not options.config:
            raise ValueError("--set: changes a field of --config, so give that as well")
        settings = load_experiment(options.config, options.set) if options.config else None
        first, last = average_epochs(options.exp_dir, options.epoch, options.last, out, settings)
    except (checkpoint.CheckpointError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{out}: mean of the weights over epochs {first} to {last}")
    return 0
