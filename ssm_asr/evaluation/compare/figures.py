"""The figures of a comparison: error rate against chunk width, and against state bytes.

Colours tell models apart, and show on white and on black (after Okabe and Ito). Markers and dashes tell left contexts
or chunks apart. SVGs are dark on light, or light on dark where the reader prefers that.
"""

import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, LogLocator, NullLocator

from ssm_asr import units
from ssm_asr.evaluation.compare.cells import Row

COLOURS = ("#2b8cd6", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = "osD^vPX*<>"
DASHES = ("-", "--", ":", "-.")
INK = "#1b1c1f"  # text and axes; currentColor in SVGs
STYLE = (  # of an SVG by itself; on a page it takes the page's colours
    "<style>svg { color: #1b1c1f; background: #ffffff } "
    "@media (prefers-color-scheme: dark) { svg { color: #e4e4e7; background: #151619 } }</style>"
)
SETTINGS: dict[Any, Any] = {
    "text.parse_math": False,  # a name may have dollars
    "svg.fonttype": "none",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    **{name: INK for name in ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")},
    **{"axes.grid": True, "grid.color": INK, "grid.alpha": 0.15, "legend.frameon": False, "legend.columnspacing": 1.2},
}
Place = Literal["outside lower center", "outside upper center"]
COLUMNS = 3  # panels beside each other


class Series(NamedTuple):
    """A line of the first figure: one model with one left context, over chunk widths."""

    label: str
    colour: str
    dash: str
    rows: list[Row]


def left_text(frames: int) -> str:
    """Names a left context, given in frames of 20 ms, for a reader."""
    return f"left context {units.chunk_ms(frames)} ms" if frames else "no left context"


def rate_name(rows: list[Row]) -> str:
    """Returns the name of the error rate of rows, WER or CER."""
    return "WER" if rows[0]["unit"] == "word" else "CER"


def chunk_width_figure(rows: list[Row]) -> Figure:
    """Draws the error rate in % with 95 % intervals over chunk width.

    Each model and left context has a line, each test set a panel.
    """

    def draw(axes: Axes, rows: list[Row]) -> None:
        series = _series(rows)
        step = min(0.08, 0.5 / len(series))  # octaves: intervals stand beside each other
        for k, line in enumerate(series):
            shift = 2 ** (step * (k - (len(series) - 1) / 2))
            rates = [100 * row["error_rate"] for row in line.rows]
            # Without an interval there is no bar.
            below, above = (
                [
                    abs(100 * row[f"interval_{side}"] - rate) if row[f"interval_{side}"] is not None else 0.0
                    for row, rate in zip(line.rows, rates, strict=True)
                ]
                for side in ("low", "high")
            )
            axes.errorbar(
                [row["chunk_ms"] * shift for row in line.rows],
                rates,
                (below, above),
                label=line.label,
                color=line.colour,
                linestyle=line.dash,
                marker=MARKERS[k % len(MARKERS)],
                markersize=5.5,
                capsize=2.5,
                linewidth=1.6,
                elinewidth=1.0,
            )
        chunks_ms = sorted({row["chunk_ms"] for row in rows})
        axes.set_xscale("log", base=2)
        axes.set_xticks(chunks_ms, labels=[str(chunk) for chunk in chunks_ms])
        axes.xaxis.set_minor_locator(NullLocator())

    figure = _panels(rows, draw, "chunk width (ms)")
    _legend(figure, figure.axes[0].get_legend_handles_labels())
    return figure


def state_bytes_figure(rows: list[Row]) -> Figure:
    """Draws the error rate in % over the bytes of state that a stream takes.

    Each model and chunk width has a line, each test set a panel.
    """
    models = list(dict.fromkeys(row["model"] for row in rows))
    chunks_ms = sorted({row["chunk_ms"] for row in rows})
    colours = {model: COLOURS[k % len(COLOURS)] for k, model in enumerate(models)}
    markers = {chunk: MARKERS[k % len(MARKERS)] for k, chunk in enumerate(chunks_ms)}

    def draw(axes: Axes, rows: list[Row]) -> None:
        for model in models:
            for chunk in chunks_ms:
                line = [row for row in rows if (row["model"], row["chunk_ms"]) == (model, chunk)]
                axes.plot(
                    [row["state_bytes"] for row in line],
                    [100 * row["error_rate"] for row in line],
                    color=colours[model],
                    marker=markers[chunk],
                    markersize=6,
                    linewidth=1.0,
                    fillstyle="none",  # what lies on one point stays visible
                )
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        axes.xaxis.set_major_formatter(EngFormatter())
        axes.xaxis.set_minor_locator(NullLocator())
        axes.margins(x=0.1)

    figure = _panels(rows, draw, "state of a stream (bytes)")
    lines = [Line2D([], [], color=colour, linewidth=3) for colour in colours.values()]
    _legend(figure, (lines, models), "outside upper center")
    points = [Line2D([], [], color=INK, marker=marker, linestyle="", fillstyle="none") for marker in markers.values()]
    _legend(figure, (points, [f"chunk {chunk} ms" for chunk in chunks_ms]))
    return figure


def save(draw: Callable[[list[Row]], Figure], rows: list[Row], stem: Path) -> str:
    """Writes STEM.png and STEM.svg, with equal bytes for equal rows, and returns the SVG element for a page."""
    with matplotlib.rc_context(SETTINGS | {"svg.hashsalt": stem.name}):
        figure = draw(rows)
        figure.savefig(stem.with_suffix(".png"), dpi=160)
        buffer = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    text = buffer.getvalue().replace(INK, "currentColor")
    element = text[text.index("<svg") :]
    alone = element.replace(">", f">{STYLE}", 1)
    stem.with_suffix(".svg").write_text(f'<?xml version="1.0" encoding="utf-8"?>\n{alone}', encoding="utf-8")
    return element


def _series(rows: list[Row]) -> list[Series]:
    models = list(dict.fromkeys(row["model"] for row in rows))
    series = []
    for k, model in enumerate(models):
        own = [row for row in rows if row["model"] == model]
        lefts = sorted({left for row in own for left in row["asked_left_frames"]})
        for j, left in enumerate(lefts):
            line = sorted((row for row in own if left in row["asked_left_frames"]), key=lambda row: row["chunk_ms"])
            colour, dash = COLOURS[k % len(COLOURS)], DASHES[j % len(DASHES)]
            series.append(Series(f"{model}, {left_text(left)}", colour, dash, line))
    return series


def _panels(rows: list[Row], draw: Callable[[Axes, list[Row]], None], x_label: str) -> Figure:
    """A figure with a panel a test set, on one scale of error rates."""
    names = list(dict.fromkeys(row["cuts"] for row in rows))
    columns = min(COLUMNS, len(names))
    lines = math.ceil(len(names) / columns)
    figure = Figure(figsize=(8.0 if columns == 1 else 4.2 * columns, 4.0 * lines + 0.6), layout="constrained")
    grid = figure.subplots(lines, columns, sharey=True, squeeze=False)
    for axes, name in zip(grid.flat, names, strict=False):
        draw(axes, [row for row in rows if row["cuts"] == name])
        axes.set_title(name)
        axes.set_xlabel(x_label)
    for axes in grid[:, 0]:
        axes.set_ylabel(f"{rate_name(rows)} (%)")
    for axes in grid.flat[len(names) :]:
        axes.remove()
    return figure


def _legend(figure: Figure, entries: tuple[list[Any], list[str]], place: Place = "outside lower center") -> None:
    """Above or below the panels, where it covers nothing."""
    width = max(len(label) for label in entries[1]) * 0.08 + 0.5  # inches of an entry, about
    figure.legend(*entries, loc=place, ncols=max(1, int(figure.get_figwidth() / width)))
