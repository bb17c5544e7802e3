"""Options that several programs share, and the types of their values."""

import argparse
from pathlib import Path
from typing import Any

from ssm_asr import units
from ssm_asr.data.trust import trust
from ssm_asr.search import SEARCHES


def frames(text: str) -> int:
    """A type of arguments: a chunk or left context, 320ms, 0.32s or a bare number of frames of 20 ms."""
    try:
        return units.parse_frames(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def frames_list(text: str) -> list[int]:
    """A type of arguments: several chunks or left contexts, with commas between them."""
    return [frames(part) for part in text.split(",")]


def chunk_arguments(parser: argparse.ArgumentParser, default: str = "the checkpoint's") -> None:
    """Adds --chunk and --left, which are None if not given.

    Args:
        default: what --help says about that.
    """
    written = "with its unit, or as a bare number of frames of 20 ms"
    parser.add_argument(
        "--chunk", type=frames, metavar="TIME", help=f"320ms, 0.32s or 16: {written} (default: {default})"
    )
    parser.add_argument(
        "--left", type=frames, metavar="TIME", help=f"left context: 1.28s, 1280ms or 64 (default: {default})"
    )


class _Trust(argparse.Action):
    """Trusts manifests as soon as its option is read."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option: str | None = None) -> None:
        trust(str(self.const))


def trust_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds --trust-commands and --trust-urls, of programs that read manifests."""
    for kind, what in (("commands", "run the commands that manifests name"), ("urls", "fetch what manifests name")):
        parser.add_argument(
            f"--trust-{kind}",
            action=_Trust,
            nargs=0,
            const=kind,
            default=argparse.SUPPRESS,
            help=f"{what} (default: refuse)",
        )


def decoding_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of programs that recognise speech: the checkpoint, chunks and the search."""
    parser.add_argument("--checkpoint", required=True, type=Path, help="checkpoint, best from average")
    chunk_arguments(parser)
    parser.add_argument("--method", choices=list(SEARCHES), help="search (default: the checkpoint's)")
    parser.add_argument("--beam", type=int, help="hypotheses that beam search keeps (default: the checkpoint's)")


def scoring_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of programs that score what they recognise."""
    parser.add_argument("--unit", choices=["word", "char"], help="error rate of (default: char for char tokens)")
    parser.add_argument("--out", type=Path, help="directory for the results (default: one beside the checkpoint)")


def result_dir(options: argparse.Namespace, what: str, chunk: int, left: int, method: str, beam: int) -> Path:
    """Makes the directory for the results of one manifest: --out, divided if there are several manifests.

    By default it lies beside the checkpoint, and its name tells the settings and the checkpoint, unless that is
    averaged.pt, so that no result takes the place of another.

    Args:
        what: the program and the name of the manifest.
        chunk, left: in frames of 20 ms.
    """
    out: Path = options.out or options.checkpoint.parent
    if options.out is None or len(options.cuts) > 1:
        weights = options.checkpoint.stem
        what = what if weights == "averaged" else f"{what}-{weights}"
        out /= f"{what}-chunk{chunk}-left{left}-{method}{beam if method == 'beam' else ''}"
    out.mkdir(parents=True, exist_ok=True)
    return out
