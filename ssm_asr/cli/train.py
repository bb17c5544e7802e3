"""Train a transducer.

ssm-asr train --config FILE --train-cuts FILE --valid-cuts FILE --tokens DIR --exp-dir DIR

Several GPUs: torchrun --nproc-per-node N -m ssm_asr.train …

The command of a run that was stopped goes on from its last checkpoint, exactly: weights, optimiser, running mean and
position in the data are in the checkpoint, and the random numbers of a batch depend only on the seed, the number of
the batch and the process. The exit status is 0 after the last epoch, 130 if the run was stopped before, 1 if training
cannot go on, and 2 if an argument or a file is wrong.
"""

import argparse
import json
import shlex
import sys
from contextlib import ExitStack
from pathlib import Path

from ssm_asr import checkpoint
from ssm_asr.cli.arguments import trust_arguments
from ssm_asr.config import load_experiment, to_yaml
from ssm_asr.data.filtering import filter_cuts
from ssm_asr.data.store import read_cuts
from ssm_asr.data.tokens import Tokenizer
from ssm_asr.training import TrainingError, distributed
from ssm_asr.training.experiment_dir import claim, resumable
from ssm_asr.training.resume import make_ready
from ssm_asr.training.trainer import Trainer


def main(arguments: list[str] | None = None) -> int:
    """Runs the program, and returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="YAML file of the experiment")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=VALUE", help="change one field")
    parser.add_argument("--train-cuts", required=True, type=Path, help="lhotse cuts to train on")
    parser.add_argument("--valid-cuts", required=True, type=Path, help="lhotse cuts to validate on")
    parser.add_argument("--noise-cuts", type=Path, help="lhotse cuts of noise to mix in (default: none)")
    parser.add_argument("--tokens", required=True, type=Path, help="directory that 'prepare tokens' wrote")
    parser.add_argument("--exp-dir", required=True, type=Path, help="where everything of this run goes")
    parser.add_argument("--init-from", type=Path, help="start from the weights of this checkpoint that fit")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    trust_arguments(parser)
    options = parser.parse_args(arguments)
    with ExitStack() as held:
        try:
            place = distributed.join(options.device)
            trainer = _make_trainer(options, place, held)
        except (ValueError, OSError) as error:
            print(error, file=sys.stderr)
            return 2
        return _train(trainer, place)


def _train(trainer: Trainer, place: distributed.Place) -> int:
    """Trains, and returns the exit status."""
    try:
        finished = trainer.run()
    except TrainingError as error:
        print(error, file=sys.stderr)
        return 1
    except checkpoint.CheckpointError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped at once; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    if place.rank == 0:
        _report(trainer, finished)
    distributed.leave(place)
    return 0 if finished else 130


def _make_trainer(options: argparse.Namespace, place: distributed.Place, held: ExitStack) -> Trainer:
    """Reads the files, makes the experiment directory ready, and gives the model the initial weights, if any.

    Args:
        held: gets the claim to the experiment directory.
    """
    experiment = load_experiment(options.config, options.set)
    tokenizer = Tokenizer.load(options.tokens)
    if tokenizer.kind != experiment.tokens.kind:
        raise ValueError(f"{options.tokens}: {tokenizer.kind} tokens, but tokens.kind is {experiment.tokens.kind}")
    cuts, filter_report = filter_cuts(read_cuts(options.train_cuts).to_eager(), tokenizer, experiment.data)
    valid_cuts = read_cuts(options.valid_cuts).to_eager()
    noise_cuts = read_cuts(options.noise_cuts).to_eager() if options.noise_cuts else None
    if place.rank == 0:
        held.enter_context(claim(options.exp_dir))
    trainer = Trainer(experiment, tokenizer, options.exp_dir, cuts, valid_cuts, noise_cuts, place)
    if place.rank == 0:
        print(f"utterances to train on: {filter_report.summary()}")
        print("\n".join(trainer.fast.lines()))
        make_ready(options.exp_dir, experiment, trainer.fingerprint)
        (options.exp_dir / "config.yaml").write_text(to_yaml(experiment), encoding="utf-8")
    distributed.wait(place)
    if options.init_from and resumable(options.exp_dir):
        if place.rank == 0:
            print(f"{options.init_from}: not used again, since training goes on from a checkpoint of its own")
    elif options.init_from:
        warm_start = checkpoint.warm_start(trainer.model, options.init_from)
        if place.rank == 0:
            print(f"{options.init_from}: {warm_start.summary()}")
    return trainer


def _report(trainer: Trainer, finished: bool) -> None:
    """Prints what was trained and what to do next; writes trained.json after the last epoch."""
    progress, exp_dir, epochs = trainer.state.progress, trainer.exp_dir, trainer.experiment.train.num_epochs
    if not finished:
        print(f"stopped after {progress.batch} batches; the same command goes on from there")
        return
    last = min(trainer.experiment.decode.average_epochs, epochs)
    nonfinite_steps = trainer.state.optimizer.statistics().get("nonfinite_steps", 0)
    (exp_dir / "trained.json").write_text(json.dumps(progress.to_dict(), indent=2) + "\n", encoding="utf-8")
    print(
        f"trained {progress.batch} batches, {progress.audio_s / 3600:.2f} h of audio; "
        f"best validation loss {progress.best_valid_loss:.4f}\n"
        f"skipped: {progress.skipped_utterances} utterances without an alignment, {progress.bad_batches} batches "
        f"without a finite loss, {nonfinite_steps:g} steps without finite gradients\n"
        f"next: ssm-asr average --exp-dir {shlex.quote(str(exp_dir))} --epoch {epochs} --last {last}\n"
        f"then: ssm-asr decode --checkpoint {shlex.quote(str(exp_dir / 'averaged.pt'))} --cuts CUTS"
    )
