"""Prepare a corpus for training: check it, compute features, make tokens, make noises.

The verbs work on lhotse manifests of any corpus. A recipe calls them in this order:

    ssm-asr prepare check --manifests MANIFESTS --out CUTS
    ssm-asr prepare features --cuts CUTS/cuts_train.jsonl.gz --out DATA --speed-perturb --shuffle
    ssm-asr prepare tokens --cuts CUTS/cuts_train.jsonl.gz --out DATA/tokens --vocab-size 500
    ssm-asr prepare noise --cuts CUTS/cuts_train.jsonl.gz --out NOISE

An output appears only when it is complete, and a line says of everything that is left out of a corpus what and why.
"""

import argparse
import os
import sys
from pathlib import Path

from lhotse import CutSet, RecordingSet, SupervisionSet

from ssm_asr.cli.arguments import trust_arguments
from ssm_asr.cli.program import positive
from ssm_asr.config import TokensConfig, load_experiment
from ssm_asr.data.checks import check_corpus
from ssm_asr.data.features import BACKENDS
from ssm_asr.data.filtering import text_of
from ssm_asr.data.noise import made_noises, musan_noises
from ssm_asr.data.store import prepare_cuts, read_cuts
from ssm_asr.data.tokens import KINDS, train_tokenizer
from ssm_asr.data.trust import require_trusted
from ssm_asr.ops.devices import find_device

RECORDINGS_SUFFIX = "_recordings.jsonl.gz"
MAX_LINES_SHOWN = 20


def check(args: argparse.Namespace) -> None:
    """Reads all audio and transcripts, and writes OUT/cuts_NAME.jsonl.gz and a list of what is left out."""
    sources = sorted(args.manifests.glob(f"*{RECORDINGS_SUFFIX}"))
    if not sources:
        raise ValueError(
            f"{args.manifests}: no manifests here, expected NAME{RECORDINGS_SUFFIX} and NAME_supervisions.jsonl.gz"
        )
    args.out.mkdir(parents=True, exist_ok=True)
    for source in sources:
        name = source.name.removesuffix(RECORDINGS_SUFFIX)
        recordings = RecordingSet.from_file(source)
        require_trusted(source, recordings)
        cuts, report = check_corpus(
            recordings,
            SupervisionSet.from_file(source.with_name(f"{name}_supervisions.jsonl.gz")),
            num_jobs=args.jobs,
            title=f"checking {name}",
        )
        for line, _ in zip(report.lines(), range(MAX_LINES_SHOWN), strict=False):
            print(f"  {line}")
        left_out = args.out / f"cuts_{name}.left_out.tsv"
        report.write(left_out)
        print(f"{name}: {report.summary()}" + (f"; all in {left_out}" if report.left_out else ""))
        if not report.num_kept:
            raise ValueError(f"{source}: nothing usable is left; see {left_out}")
        write_cuts(cuts, args.out / f"cuts_{name}.jsonl.gz")


def features(args: argparse.Namespace) -> None:
    """Computes and stores the features of cut manifests."""
    if args.on_the_fly and args.backend != "torch":
        raise ValueError(
            f"--on-the-fly: training computes features by torch, not by {args.backend}; give one of the two"
        )
    for cuts in args.cuts:
        target = prepare_cuts(
            cuts,
            args.out,
            speed_perturb=args.speed_perturb,
            shuffle=args.shuffle,
            on_the_fly=args.on_the_fly,
            num_jobs=args.jobs,
            device=str(find_device(args.device)),
            backend=args.backend,
            shar=args.shar,
        )
        print(f"cuts in {target}")


def tokens(args: argparse.Namespace) -> None:
    """Trains a tokenizer on the transcripts of training cuts."""
    texts = (text_of(cut) for cut in read_cuts(args.cuts))
    wanted = load_experiment(args.config, args.set).tokens if args.config else TokensConfig()
    kind = args.kind or wanted.kind
    size = args.vocab_size or (wanted.vocab_size if kind in ("bpe", "unigram") else None)
    tokenizer = train_tokenizer(texts, kind, size)
    tokenizer.save(args.out)
    print(f"{tokenizer.vocab_size} {kind} tokens in {args.out}")


def noise(args: argparse.Namespace) -> None:
    """Writes OUT/cuts_noise.jsonl.gz with cuts of MUSAN or of made noises, and stores their features."""
    listed = args.out / "noise" / "cuts_noise.jsonl.gz"
    listed.parent.mkdir(parents=True, exist_ok=True)
    if args.musan is not None:
        cuts = musan_noises(args.musan)
    else:
        cuts = made_noises(listed.parent, read_cuts(args.cuts), count=args.count, seed=args.seed)
    write_cuts(cuts, listed)
    target = prepare_cuts(
        listed, args.out, speed_perturb=False, shuffle=False, on_the_fly=args.on_the_fly, num_jobs=args.jobs
    )
    print(f"{len(cuts)} noises in {target}")


def write_cuts(cuts: CutSet, target: Path) -> None:
    """Writes a manifest, which appears only when it is complete."""
    unfinished = target.with_name(f"unfinished-{target.name}")
    cuts.to_file(unfinished)
    os.replace(unfinished, target)


def make_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="ssm-asr prepare", description=__doc__, formatter_class=plain)
    verbs = parser.add_subparsers(dest="verb", required=True)

    verb = verbs.add_parser(
        "check", help="find unusable audio and transcripts, write cuts of the rest", description=check.__doc__
    )
    verb.set_defaults(run=check)
    verb.add_argument(
        "--manifests",
        type=Path,
        required=True,
        help="directory with NAME_recordings.jsonl.gz and NAME_supervisions.jsonl.gz",
    )
    verb.add_argument("--out", type=Path, required=True, help="gets cuts_NAME.jsonl.gz")
    verb.add_argument("--jobs", type=positive, default=2, help="processes (default: 2)")

    verb = verbs.add_parser(
        "features", help="compute and store features; resumes where it was stopped", description=features.__doc__
    )
    verb.set_defaults(run=features)
    verb.add_argument("--cuts", type=Path, nargs="+", required=True, help="cut manifests NAME.jsonl.gz")
    verb.add_argument("--out", type=Path, required=True, help="gets NAME.jsonl.gz and NAME.features/, or NAME.shar/")
    verb.add_argument("--speed-perturb", action="store_true", help="add copies at 0.9 and 1.1 times the speed")
    verb.add_argument("--shuffle", action="store_true", help="mix the order of the cuts (for training cuts)")
    storage = verb.add_mutually_exclusive_group()
    storage.add_argument("--on-the-fly", action="store_true", help="store no features, compute them in training")
    storage.add_argument(
        "--shar",
        action="store_true",
        help="write NAME.shar/ instead, lhotse Shar: few large files, for disks that a cluster shares. Give that "
        "directory for cuts anywhere; training reads it in any order, and resumes as exactly as from a manifest",
    )
    verb.add_argument("--jobs", type=positive, default=2, help="processes (default: 2)")
    verb.add_argument("--device", default="cpu", help="where to compute: auto, cpu or cuda (default: cpu)")
    verb.add_argument(
        "--backend",
        choices=BACKENDS,
        default="torch",
        help="what computes: torch (lhotse's Fbank), or kaldifeat, which needs its package built for this version of "
        "PyTorch and CUDA (https://csukuangfj.github.io/kaldifeat); both give the same features (default: torch)",
    )

    verb = verbs.add_parser("tokens", help="make a tokenizer from training transcripts", description=tokens.__doc__)
    verb.set_defaults(run=tokens)
    verb.add_argument("--cuts", type=Path, required=True, help="training cuts")
    verb.add_argument("--out", type=Path, required=True, help="gets tokens.txt and KIND.model")
    verb.add_argument("--config", type=Path, help="YAML file of the experiment, whose 'tokens' says which")
    verb.add_argument("--set", action="append", default=[], metavar="A.B=VALUE", help="change one field of it")
    verb.add_argument("--kind", choices=KINDS, help="in place of the configuration's (default: bpe)")
    verb.add_argument(
        "--vocab-size", type=positive, help="of bpe and unigram tokens, in place of the configuration's (default: 500)"
    )

    verb = verbs.add_parser(
        "noise", help="MUSAN, or made noises, as cuts to mix into training speech", description=noise.__doc__
    )
    verb.set_defaults(run=noise)
    source = verb.add_mutually_exclusive_group(required=True)
    source.add_argument("--musan", type=Path, help="MUSAN directory with music/, speech/ and noise/")
    source.add_argument("--cuts", type=Path, help="training cuts, to make coloured noise and babble from")
    verb.add_argument("--out", type=Path, required=True, help="gets cuts_noise.jsonl.gz, made noises in noise/")
    verb.add_argument(
        "--on-the-fly",
        action="store_true",
        help="store no features (0.3 MB for 10 s, 12.6 GB for MUSAN); each worker of a training run then computes the "
        "features of a noise each time it draws it",
    )
    verb.add_argument("--jobs", type=positive, default=2, help="processes (default: 2)")
    verb.add_argument("--count", type=positive, default=60, help="made noises of 10 s (default: 60)")
    verb.add_argument("--seed", type=int, default=1, help="of made noises (default: 1)")
    for verb in verbs.choices.values():
        trust_arguments(verb)
    return parser


def main() -> None:
    """Runs one verb; a fault of the input is one line on stderr and exit status 1."""
    args = make_parser().parse_args()
    for name in ("cuts", "manifests"):
        given = getattr(args, name, None) or []
        for path in given if isinstance(given, list) else [given]:
            if not path.exists():
                sys.exit(f"{path}: no such file or directory")
    try:
        args.run(args)
    except ValueError as error:
        sys.exit(str(error))
