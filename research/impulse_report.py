"""Tabulates and draws the impulse responses of trained mixers."""

from collections.abc import Callable
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from research.impulse_analysis import Fit, Layer
from ssm_asr import units
from ssm_asr.evaluation.compare import figures
from ssm_asr.evaluation.compare.tables import Table, markdown
from ssm_asr.evaluation.results import rate_text
from ssm_asr.ssm.analysis import Array

SHOWN_LAYERS, SHOWN_CHANNELS = 6, 6


def spread(values: Array) -> tuple[float, float, float]:
    """Returns the 10 %, 50 % and 90 % quantiles."""
    low, middle, high = np.quantile(values, [0.1, 0.5, 0.9]).tolist()
    return low, middle, high


def _text(values: Array | None, digits: int = 2) -> str:
    if values is None:
        return "–"
    low, middle, high = spread(values)
    return f"{middle:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def layers_table(layers: list[Layer], what: str) -> str:
    """Returns a Markdown table with a row for each layer: medians over channels [10 % and 90 % quantiles]."""
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
                *(_text(layer.before_DM_ms, 0), _text(layer.after_DM_ms, 0)),
            ]
        )
    head = ["layer", "effective rank", "second / first singular value", "sign changes"]
    times = ["time constants before, ms", "after, ms"]
    return markdown(Table(f"Kernels of {what}", note, [*head, *times], rows))


def fits_table(fits: list[Fit], original: dict[str, Any] | None) -> str:
    """Returns a Markdown table with a row for each number of states."""
    rows = [["the convolution", "0", rate_text(original) if original else "–"]]
    for fit in fits:
        error = _text(100 * np.concatenate(fit.errors), 1)
        rows.append([f"real poles, N = {fit.states}", error, rate_text(fit.summary) if fit.summary else "–"])
    note = "Relative error of the kernel, median over all channels [10 %, 90 %]; the rest of the model is as it was."
    return markdown(Table("Fits in place of the convolutions", note, ["mixer", "error %", "error rate"], rows))


def as_tree(layers: list[Layer], fits: list[Fit], original: dict[str, Any] | None) -> dict[str, Any]:
    """Returns all numbers in a form that JSON takes."""
    return {
        "layers": [
            {
                "layer": layer.number,
                "hankel_singular_values": layer.singular_values_DM.tolist(),
                "effective_rank": layer.effective_rank_D.tolist(),
                "sign_changes": layer.sign_changes_D.tolist(),
                "most_sign_changes": layer.most_sign_changes,
                "time_constants_before_ms": None if layer.before_DM_ms is None else layer.before_DM_ms.tolist(),
                "time_constants_after_ms": None if layer.after_DM_ms is None else layer.after_DM_ms.tolist(),
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
    """Draws a panel for each of some layers, which are evenly spread over all layers."""
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
    """Draws impulse responses, scaled to a largest value of 1, of channels evenly spread over the effective ranks."""

    def draw(axes: Axes, layer: Layer) -> None:
        order = layer.effective_rank_D.argsort()
        order = order[np.linspace(0, len(order) - 1, min(len(order), SHOWN_CHANNELS)).round().astype(int)]
        lag_ms = units.OUTPUT_FRAME_MS * np.arange(layer.response_DL.shape[1])
        for k, channel in enumerate(order):
            response_L = layer.response_DL[channel]
            axes.plot(lag_ms, response_L / np.abs(response_L).max(), color=figures.COLOURS[k], linewidth=1.2)

    return _panels(layers, draw, "lag (ms)", "impulse response, largest value 1")


def hankel_figure(layers: list[Layer]) -> Figure:
    """Draws singular values relative to the first: the median of the channels, and a band from 10 to 90 %."""

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
    """Draws histograms of the time constants of all poles, before and after training."""
    times = [np.log10(t_ms) for layer in layers for t_ms in (layer.before_DM_ms, layer.after_DM_ms) if t_ms is not None]
    bins = np.logspace(min(t.min() for t in times), max(t.max() for t in times), 25).tolist()

    def draw(axes: Axes, layer: Layer) -> None:
        assert layer.before_DM_ms is not None and layer.after_DM_ms is not None
        axes.hist(layer.after_DM_ms.ravel(), bins, color=figures.COLOURS[0], alpha=0.5, label="after training")
        axes.hist(
            layer.before_DM_ms.ravel(), bins, histtype="step", color=figures.COLOURS[1], linewidth=1.6, label="before"
        )
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")

    figure = _panels(layers, draw, "time constant of a pole (ms)", "poles")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper right", ncols=2)
    return figure


def fits_figure(fits: list[Fit], original: dict[str, Any] | None) -> Figure:
    """Draws the error of the kernels and the error rate with fits for convolutions, over the number of states."""
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
