"""Options that several programs share."""

import argparse
from pathlib import Path


def decoding_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that decode and stream share."""
    parser.add_argument("--checkpoint", required=True, type=Path, help="checkpoint, best from average")
    parser.add_argument("--chunk", type=int, help="frames of 20 ms: 16 is 320 ms (default: the checkpoint's)")
    parser.add_argument("--left", type=int, help="left context in frames of 20 ms (default: the checkpoint's)")
    parser.add_argument("--method", choices=["greedy", "beam"], help="search (default: the checkpoint's)")
    parser.add_argument("--beam", type=int, help="hypotheses that beam search keeps (default: the checkpoint's)")
    parser.add_argument("--unit", choices=["word", "char"], help="error rate of (default: char for char tokens)")
    parser.add_argument("--out", type=Path, help="directory for the results (default: one beside the checkpoint)")


def result_dir(options: argparse.Namespace, what: str, chunk: int, left: int, method: str, beam: int) -> Path:
    """Makes the directory for the results of one manifest: --out, divided if there are several manifests."""
    out: Path = options.out or options.checkpoint.parent
    if options.out is None or len(options.cuts) > 1:
        out /= f"{what}-chunk{chunk}-left{left}-{method}{beam if method == 'beam' else ''}"
    out.mkdir(parents=True, exist_ok=True)
    return out
