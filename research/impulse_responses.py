"""Analyse the kernels of trained mixers: python research/impulse_responses.py --checkpoint FILE --out DIR [--cuts FILE]

The model is a Conformer with any mixer but none. For every layer, the tables and figures show over its channels:
  Hankel singular values   say how many states matter. For a state-space model they come from its Gramians, so the
                           kernel has no end; for a convolution they come from the matrix h[i+j+1]. The direct term
                           h[0] needs no state.
  effective rank           is exp of the entropy of the normalised singular values (Roy and Vetterli, EUSIPCO 2007).
  sign changes             are counted in the kernel; N real poles can make N - 1 at most, by Descartes' rule.
  time constants           belong to the poles, before and after training. "Before" is what the seed of the run gives on
                           an equal version of PyTorch, or the checkpoint of --before, such as epoch-1.pt.
In a model with the mixer com, the state-space model after the convolution is analysed; with rep, the one whose first
samples are the taps.

A convolution is also fitted by N real poles, N = 1, 2, 4, 8. For given poles, the weights that make the squared error
over all lags least, those after the last tap included, solve a linear problem; Adam minimises it over the poles, from
several spreads of time constants, and each channel keeps its best start. Each fit is written as a checkpoint with `dir`
for `conv`, and decoded with --cuts. The program writes kernels.md and .json, and figures as .png and .svg.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that `research` is found when this file is run by its path

from research import impulse_report as report
from research.impulse_analysis import analyse, decode, fit_model, mixers_of
from ssm_asr import checkpoint
from ssm_asr.cli.program import run
from ssm_asr.evaluation.compare import figures
from ssm_asr.transducer.model import Transducer

FIT_STATES = (1, 2, 4, 8)


def main(arguments: list[str] | None = None) -> int:
    """Runs the program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, type=Path, help="trained model, best from average")
    parser.add_argument("--before", type=Path, help="checkpoint for 'before' (default: what the run's seed gives)")
    parser.add_argument("--cuts", type=Path, help="lhotse cuts with transcripts, to decode the fits (default: none)")
    parser.add_argument("--out", required=True, type=Path, help="directory for numbers, figures and fitted models")
    options = parser.parse_args(arguments)
    out: Path = options.out
    try:
        loaded = checkpoint.load_model(options.checkpoint)
        torch.manual_seed(loaded.experiment.train.seed)
        before = Transducer(loaded.experiment.model, loaded.tokenizer.vocab_size)
        if options.before:
            before.load_state_dict(checkpoint.load(options.before)["model"])
        pairs = zip(mixers_of(loaded.model, options.checkpoint), mixers_of(before, options.checkpoint), strict=True)
        layers = [analyse(mixer, start, number) for number, (mixer, start) in enumerate(pairs, 1)]
        mixer = loaded.experiment.model.encoder.mixer  # type: ignore[attr-defined]
        out.mkdir(parents=True, exist_ok=True)
        fits, original = [], None
        if mixer == "conv":
            fits = [fit_model(loaded, options.checkpoint, n, out / f"fit-{n}.pt") for n in FIT_STATES]
            if options.cuts:
                original = decode(options.checkpoint, options.cuts, out / "decode-original")
                for fit in fits:
                    fit.summary = decode(fit.model, options.cuts, out / f"decode-fit-{fit.states}")
    except (ValueError, RuntimeError) as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return 2
    text = report.layers_table(layers, f"{options.checkpoint}, mixer {mixer}")
    drawings: dict[str, Callable[[Any], Figure]] = {"kernels": report.kernels_figure, "hankel": report.hankel_figure}
    if mixer == "conv":
        text += "\n" + report.fits_table(fits, original)
        figures.save(lambda _: report.fits_figure(fits, original), [], out / "fits")
    else:
        drawings["time_constants"] = report.time_constants_figure
    for name, draw in drawings.items():
        figures.save(lambda _, draw=draw: draw(layers), [], out / name)  # type: ignore[misc]
    (out / "kernels.md").write_text(text, encoding="utf-8")
    (out / "kernels.json").write_text(json.dumps(report.as_tree(layers, fits, original)) + "\n", encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
