"""What trained kernels are: python research/impulse_responses.py --checkpoint FILE --out DIR [--cuts FILE]

For a Conformer with any mixer but none. For every layer, over its channels:
  Hankel singular values   of a state-space model from its Gramians, so of the kernel without end; of a convolution from
                           the matrix h[i+j+1]. They say how many states matter. The direct term h[0] needs no state.
  effective rank           exp of the entropy of the normalised singular values (Roy and Vetterli, EUSIPCO 2007)
  sign changes             of the kernel; N real poles can make N - 1 at most, by Descartes' rule
  time constants           of the poles, before and after training. "Before" is what the seed of the run gives, on the
                           same version of PyTorch; or --before, such as epoch-1.pt
Of com it is the state-space model after the convolution, of rep the one whose first samples are the taps.

A convolution is also fitted by N real poles, N = 1, 2, 4, 8: the squared error over all lags, those after the last tap
included, is least in the weights for given poles (a linear problem), and minimised over the poles by Adam from several
spreads of time constants; the best start is kept, channel by channel. Each fit is written as a checkpoint with `dir`
for `conv`, and decoded with --cuts. Writes kernels.md and .json, and figures as .png and .svg.

Shapes: D channels, L lags, M poles (pairs: both), N states of a fit.
"""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ssm_asr import checkpoint, units
from ssm_asr.cli import decode
from ssm_asr.cli.program import run
from ssm_asr.encoder.conformer import ConformerConfig, ConvolutionModule
from ssm_asr.encoder.mixer import ConvMixer, DropInMixer, Mixer
from ssm_asr.evaluation.compare import figures
from ssm_asr.evaluation.compare.tables import Table, markdown
from ssm_asr.evaluation.results import SUMMARY, rate_text
from ssm_asr.ssm.analysis import (
    Array,
    effective_rank,
    fit_real_poles,
    hankel_of_modes,
    hankel_of_taps,
    modes,
    set_modes,
    sign_changes,
)
from ssm_asr.ssm.s4d import S4D
from ssm_asr.transducer.model import Transducer

HORIZON_FRAMES = 1024  # over which sign changes are counted and fits compared
FIT_STATES = (1, 2, 4, 8)
SHOWN_LAYERS, SHOWN_CHANNELS, SHOWN_FRAMES = 6, 6, 24


@dataclass
class Layer:
    """The analysis of one layer; time constants in ms and of state-space models only."""

    number: int
    response_DL: Array  # of the whole mixer
    singular_values_DM: Array
    sign_changes_D: Array
    most_sign_changes: int | None  # that there can be
    before_ms: Array | None
    after_ms: Array | None

    @property
    def effective_rank_D(self) -> Array:
        """How many states matter, as a real number from 1."""
        return effective_rank(self.singular_values_DM)


@dataclass
class Fit:
    """A convolution of each layer, fitted by N real poles."""

    states: int
    errors: list[Array]  # a layer: relative error of each channel's kernel
    model: Path
    summary: dict[str, Any] | None = None  # of decoding


def mixers_of(model: Transducer, path: Path) -> list[Mixer]:
    """The mixers of all layers.

    Raises:
        ValueError: if there is nothing to analyse.
    """
    encoder = model.config.encoder
    if not isinstance(encoder, ConformerConfig) or encoder.mixer == "none":
        raise ValueError(f"{path}: has no kernels of S4D or convolutions; give a Conformer whose mixer is not none")
    return [module.mixer for module in model.encoder.modules() if isinstance(module, ConvolutionModule)]


def time_constants_ms(ssm: S4D) -> Array:
    """After how long a mode has fallen to 1/e: (D, M), a pair counted once."""
    with torch.no_grad():
        return (units.OUTPUT_FRAME_MS / (ssm.A_log.exp() * ssm.log_dt.exp()[:, None])).numpy()


def analyse(mixer: Mixer, before: Mixer, number: int) -> Layer:
    """The numbers of one layer."""
    ssm, ssm_before = getattr(mixer, "ssm", None), getattr(before, "ssm", None)
    with torch.no_grad():
        if isinstance(mixer, ConvMixer):
            taps_DL = mixer.taps().numpy()
            return Layer(number, taps_DL, hankel_of_taps(taps_DL), sign_changes(taps_DL), None, None, None)
        assert isinstance(ssm, S4D) and isinstance(ssm_before, S4D)
        impulse = torch.zeros(1, ssm.channels, SHOWN_FRAMES)
        impulse[..., 0] = 1
        response_DL = mixer(impulse)[0].numpy()
    poles_DM, weights_DM = modes(ssm)
    powers_DML = np.exp(np.log(poles_DM)[..., None] * np.arange(HORIZON_FRAMES))
    kernel_DL = (weights_DM[..., None] * powers_DML).sum(axis=1).real
    scale_DL = np.abs(weights_DM[..., None] * powers_DML).sum(axis=1)
    return Layer(
        number,
        response_DL,
        hankel_of_modes(poles_DM, weights_DM),
        sign_changes(kernel_DL, scale_DL),
        None if ssm.pairs else ssm.states - 1,
        time_constants_ms(ssm_before),
        time_constants_ms(ssm),
    )


def fit_model(loaded: checkpoint.Loaded, path: Path, states: int, out: Path) -> Fit:
    """Writes OUT, the model with its convolutions replaced by fits of so many states."""
    config = loaded.experiment.model
    assert isinstance(config.encoder, ConformerConfig)
    encoder = replace(config.encoder, mixer="dir", ssm_states=states, ssm_param="real")
    experiment = replace(loaded.experiment, model=replace(config, encoder=encoder))
    model = Transducer(experiment.model, loaded.tokenizer.vocab_size)
    kept = {name: value for name, value in loaded.model.state_dict().items() if ".mixer." not in name}
    model.load_state_dict(kept, strict=False)
    errors = []
    pairs = zip(mixers_of(loaded.model, path), mixers_of(model, path), strict=True)
    for conv, fitted in pairs:
        assert isinstance(conv, ConvMixer) and isinstance(fitted, DropInMixer)
        taps_DL = conv.taps().detach()
        poles_DN, weights_DN = fit_real_poles(taps_DL, states)
        set_modes(fitted.ssm, poles_DN, weights_DN, taps_DL[:, 0].double())
        with torch.no_grad():
            missed_DL = fitted.ssm.impulse_response(HORIZON_FRAMES)
            missed_DL[:, : taps_DL.shape[1]] -= taps_DL
        errors.append((missed_DL.norm(dim=1) / taps_DL.norm(dim=1)).numpy())
    checkpoint.save(checkpoint.pack(experiment, loaded.tokenizer, model.state_dict(), loaded.progress), out)
    return Fit(states, errors, out)


def decoded(model: Path, cuts: Path, out: Path) -> dict[str, Any]:
    """The summary of decoding with the settings of the checkpoint."""
    if decode.main(["--checkpoint", str(model), "--cuts", str(cuts), "--out", str(out), "--device", "cpu"]):
        raise ValueError(f"{cuts}: could not be decoded")
    return json.loads((out / SUMMARY).read_text(encoding="utf-8"))


def spread(values: Array) -> tuple[float, float, float]:
    """The 10 %, 50 % and 90 % quantiles."""
    low, middle, high = np.quantile(values, [0.1, 0.5, 0.9]).tolist()
    return low, middle, high


def _text(values: Array | None, digits: int = 2) -> str:
    if values is None:
        return "–"
    low, middle, high = spread(values)
    return f"{middle:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def layers_table(layers: list[Layer], what: str) -> str:
    """A row a layer, in Markdown: medians over channels and, in brackets, the 10 % and 90 % quantiles."""
    bound = layers[0].most_sign_changes
    most = max(int(layer.sign_changes_D.max()) for layer in layers)
    note = "Medians over the channels [10 %, 90 %]."
    if bound is not None:
        holds = "as it must be" if most <= bound else "which real poles cannot have: this is an error"
        note += f" Sign changes: at most {most}, of {bound} that N - 1 = {bound} allows, {holds}."
    rows = []
    for layer in layers:
        second_D = layer.singular_values_DM[:, 1:2] / layer.singular_values_DM[:, :1]
        rows.append(
            [
                *(str(layer.number), _text(layer.effective_rank_D), _text(second_D if second_D.size else None, 3)),
                f"{_text(layer.sign_changes_D, 0)}, at most {layer.sign_changes_D.max()}",
                *(_text(layer.before_ms, 0), _text(layer.after_ms, 0)),
            ]
        )
    head = ["layer", "effective rank", "second / first singular value", "sign changes"]
    times = ["time constants before, ms", "after, ms"]
    return markdown(Table(f"Kernels of {what}", note, [*head, *times], rows))


def fits_table(fits: list[Fit], original: dict[str, Any] | None) -> str:
    """A row a number of states, in Markdown."""
    rows = [["the convolution", "0", rate_text(original) if original else "–"]]
    for fit in fits:
        error = _text(100 * np.concatenate(fit.errors), 1)
        rows.append([f"real poles, N = {fit.states}", error, rate_text(fit.summary) if fit.summary else "–"])
    note = "Relative error of the kernel, median over all channels [10 %, 90 %]; the rest of the model is as it was."
    return markdown(Table("Fits in place of the convolutions", note, ["mixer", "error %", "error rate"], rows))


def as_tree(layers: list[Layer], fits: list[Fit], original: dict[str, Any] | None) -> dict[str, Any]:
    """All numbers, for JSON."""
    return {
        "layers": [
            {
                "layer": layer.number,
                "hankel_singular_values": layer.singular_values_DM.tolist(),
                "effective_rank": layer.effective_rank_D.tolist(),
                "sign_changes": layer.sign_changes_D.tolist(),
                "most_sign_changes": layer.most_sign_changes,
                "time_constants_before_ms": None if layer.before_ms is None else layer.before_ms.tolist(),
                "time_constants_after_ms": None if layer.after_ms is None else layer.after_ms.tolist(),
            }
            for layer in layers
        ],
        "fits": [
            {"states": fit.states, "relative_errors": [e_D.tolist() for e_D in fit.errors], "decoding": fit.summary}
            for fit in fits
        ],
        "decoding": original,
    }


def _panels(layers: list[Layer], draw: Callable[[Axes, Layer], None], x_label: str, y_label: str) -> Figure:
    """A panel a layer, of layers evenly spread."""
    chosen = np.unique(np.linspace(0, len(layers) - 1, min(len(layers), SHOWN_LAYERS)).round().astype(int))
    columns = min(3, len(chosen))
    lines = -(-len(chosen) // columns)
    figure = Figure(figsize=(3.6 * columns, 2.6 * lines + 0.4), layout="constrained")
    grid = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
    for axes, index in zip(grid.flat, chosen, strict=False):
        draw(axes, layers[index])
        axes.set_title(f"layer {layers[index].number}")
        axes.tick_params(labelbottom=True)
    for axes in grid.flat[len(chosen) :]:
        axes.remove()
    figure.supxlabel(x_label)
    figure.supylabel(y_label)
    return figure


def kernels_figure(layers: list[Layer]) -> Figure:
    """Impulse responses of some channels, evenly spread over the effective ranks, each to its largest value."""

    def draw(axes: Axes, layer: Layer) -> None:
        order = layer.effective_rank_D.argsort()
        order = order[np.linspace(0, len(order) - 1, min(len(order), SHOWN_CHANNELS)).round().astype(int)]
        lag_ms = units.OUTPUT_FRAME_MS * np.arange(layer.response_DL.shape[1])
        for k, channel in enumerate(order):
            response_L = layer.response_DL[channel]
            axes.plot(lag_ms, response_L / np.abs(response_L).max(), color=figures.COLOURS[k], linewidth=1.2)

    return _panels(layers, draw, "lag (ms)", "impulse response, largest value 1")


def hankel_figure(layers: list[Layer]) -> Figure:
    """Singular values relative to the first: the median channel, and a band from 10 to 90 % of the channels."""

    def draw(axes: Axes, layer: Layer) -> None:
        share_DM = (layer.singular_values_DM / layer.singular_values_DM[:, :1]).clip(min=1e-5)
        low_M, middle_M, high_M = np.quantile(share_DM, [0.1, 0.5, 0.9], axis=0)
        number = np.arange(1, len(middle_M) + 1)
        axes.fill_between(number, low_M, high_M, color=figures.COLOURS[0], alpha=0.25, linewidth=0)
        axes.plot(number, middle_M, color=figures.COLOURS[0], marker="o", markersize=3.5)
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))

    return _panels(layers, draw, "number of the Hankel singular value", "relative to the first")


def time_constants_figure(layers: list[Layer]) -> Figure:
    """Histograms of the time constants of all poles, before and after training."""
    times = [np.log10(t_ms) for layer in layers for t_ms in (layer.before_ms, layer.after_ms) if t_ms is not None]
    bins = np.logspace(min(t.min() for t in times), max(t.max() for t in times), 25).tolist()

    def draw(axes: Axes, layer: Layer) -> None:
        assert layer.before_ms is not None and layer.after_ms is not None
        axes.hist(layer.after_ms.ravel(), bins, color=figures.COLOURS[0], alpha=0.5, label="after training")
        axes.hist(
            layer.before_ms.ravel(), bins, histtype="step", color=figures.COLOURS[1], linewidth=1.6, label="before"
        )
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")

    figure = _panels(layers, draw, "time constant of a pole (ms)", "poles")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper right", ncols=2)
    return figure


def fits_figure(fits: list[Fit], original: dict[str, Any] | None) -> Figure:
    """Error of the kernels, and error rate with the fits in place of the convolutions, over the number of states."""
    decoded_too = original is not None
    figure = Figure(figsize=(9 if decoded_too else 4.8, 3.8), layout="constrained")
    grid = figure.subplots(1, 2 if decoded_too else 1, squeeze=False)[0]
    states = [fit.states for fit in fits]
    for k in range(len(fits[0].errors)):
        middle = [100 * float(np.median(fit.errors[k])) for fit in fits]
        style: dict[str, Any] = {"marker": figures.MARKERS[k % len(figures.MARKERS)], "label": f"layer {k + 1}"}
        grid[0].plot(states, middle, color=figures.COLOURS[k % len(figures.COLOURS)], **style)
    grid[0].set_ylabel("error of the kernel (%), median channel")
    if original is not None:
        rows = [fit.summary for fit in fits if fit.summary]
        rates = [100 * row["error_rate"] for row in rows]
        bars = np.abs([[100 * row["interval"][side] for row in rows] for side in (0, 1)] - np.array(rates))
        grid[1].errorbar(states, rates, bars, color=figures.COLOURS[0], marker="o", capsize=3, label="fits")
        rate = 100 * original["error_rate"]
        grid[1].axhline(rate, color=figures.COLOURS[1], linestyle="--", label="the convolutions")
        grid[1].set_ylabel(f"{figures.rate_name([original])} (%)")
        grid[1].legend()
    for axes in grid:
        axes.set_xscale("log", base=2)
        axes.set_xticks(states, labels=[str(n) for n in states])
        axes.set_xlabel("real poles N")
        axes.set_ylim(bottom=0)
    grid[0].legend()
    return figure


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
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
                original = decoded(options.checkpoint, options.cuts, out / "decode-original")
                for fit in fits:
                    fit.summary = decoded(fit.model, options.cuts, out / f"decode-fit-{fit.states}")
    except (ValueError, RuntimeError) as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return 2
    text = layers_table(layers, f"{options.checkpoint}, mixer {mixer}")
    drawings: dict[str, Callable[[Any], Figure]] = {"kernels": kernels_figure, "hankel": hankel_figure}
    if mixer == "conv":
        text += "\n" + fits_table(fits, original)
        figures.save(lambda _: fits_figure(fits, original), [], out / "fits")
    else:
        drawings["time_constants"] = time_constants_figure
    for name, draw in drawings.items():
        figures.save(lambda _, draw=draw: draw(layers), [], out / name)  # type: ignore[misc]
    (out / "kernels.md").write_text(text, encoding="utf-8")
    (out / "kernels.json").write_text(json.dumps(as_tree(layers, fits, original)) + "\n", encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
