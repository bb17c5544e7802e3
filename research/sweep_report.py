"""Tabulates and draws the results of a sweep."""

from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, NullLocator

from research.sweep_plan import Grid
from ssm_asr.evaluation.compare import figures
from ssm_asr.evaluation.compare.tables import Table, markdown


def series_table(pairs: list[dict[str, Any]], rate: str) -> str:
    """Returns the comparisons of series as a Markdown table."""
    lines = []
    for pair in pairs:
        low, high = pair["difference_interval"]
        difference = f"{100 * (pair['mean_b'] - pair['mean_a']):+.2f} [{100 * low:+.2f}, {100 * high:+.2f}]"
        means = [f"{100 * pair[key]:.2f}" for key in ("mean_a", "mean_b")]
        lines.append(
            [pair["a"], pair["b"], ", ".join(f"{x:g}" for x in pair["x"]), *means, difference, pair["verdict"]]
        )
    columns = ["A", "B", "at", f"A, {rate} %", f"B, {rate} %", "B less A [95 %]", "verdict"]
    return markdown(Table("Series, two at a time", "Means over the values of the axis that both have.", columns, lines))


def table(rows: list[dict[str, Any]], grid: Grid, cuts: str, failures: list[str]) -> str:
    """Returns the Markdown table of all cells, and a list of what is not in it."""
    rate = figures.rate_name(rows)
    head = ["cell", "parameters", "state bytes", *(f"{rate} %, seed {seed}" for seed in grid.seeds)]
    lines = []
    for row in rows:
        difference = "–"
        if row["difference"] is not None:
            low, high = row["difference_interval"]
            difference = f"{100 * row['difference']:+.2f} [{100 * low:+.2f}, {100 * high:+.2f}]"
        each = [f"{100 * row['rates'][seed]:.2f}" if seed in row["rates"] else "–" for seed in grid.seeds]
        mean = f"{100 * row['mean']:.2f} [{100 * row['low']:.2f}, {100 * row['high']:.2f}]"
        sizes = [f"{row['parameters']:,}", f"{row['state_bytes']:,}"]
        lines.append([row["name"], *sizes, *each, mean, difference, row["verdict"]])
    others = len(rows) - 1
    note = (
        f"Intervals are of 95 %, over seeds and utterances. Of {others} comparisons, {0.05 * others:.1f} are expected "
        "to look like a difference by chance alone. State in float32, at the chunk and left context of decoding."
    )
    columns = [*head, "mean [95 %]", f"less {grid.baseline} [95 %]", "verdict"]
    text = markdown(Table(f"{cuts}: {rate} over the grid", note, columns, lines))
    missing = [f"- left out: {reason}" for reason in grid.left_out] + [f"- {failure}" for failure in failures]
    return text + ("\n" + "\n".join(missing) + "\n" if missing else "")


def draw(rows: list[dict[str, Any]]) -> Figure:
    """Draws the mean error rate over the last axis of each group, with intervals, and over the state of a stream."""
    figure = Figure(figsize=(11, 5), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    names = list(dict.fromkeys(row["series"] for row in rows))
    for k, name in enumerate(names):
        line = [row for row in rows if row["series"] == name]
        sharing = list(dict.fromkeys(row["series"] for row in rows if row["group"] == line[0]["group"]))
        colour = figures.COLOURS[line[0]["group"] % len(figures.COLOURS)]
        dash = figures.DASHES[sharing.index(name) % len(figures.DASHES)]
        means = [100 * row["mean"] for row in line]
        bars = [[100 * abs(row[side] - row["mean"]) for row in line] for side in ("low", "high")]
        marker = figures.MARKERS[k % len(figures.MARKERS)]
        style: dict[str, Any] = {"color": colour, "linestyle": dash, "marker": marker, "linewidth": 1.6}
        right.plot([row["state_bytes"] for row in line], means, label=name, **style)
        if line[0]["x"] is None:
            left.axhline(means[0], color=colour, linestyle=":", linewidth=1.6)
        else:
            shift = 2 ** (0.06 * (k - (len(names) - 1) / 2))
            left.errorbar([row["x"] * shift for row in line], means, bars, elinewidth=0.8, capsize=2, **style)
    values = sorted({row["x"] for row in rows if row["x"] is not None})
    if values and values[0] > 0:
        left.set_xscale("log", base=2)
    left.set_xticks(values, labels=[f"{value:g}" for value in values])
    left.xaxis.set_minor_locator(NullLocator())
    left.set_xlabel(" or ".join(dict.fromkeys(row["axis"] for row in rows if row["x"] is not None)))
    left.set_ylabel(f"{figures.rate_name(rows)} (%), mean of the seeds")
    right.xaxis.set_major_formatter(EngFormatter())
    right.set_xlabel("state of a stream (bytes)")
    figure.legend(*right.get_legend_handles_labels(), loc="outside lower center", ncols=8)
    return figure
