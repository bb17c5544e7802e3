"""The tables of a comparison, whose cells are texts, for Markdown and for the page."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from ssm_asr import units
from ssm_asr.evaluation.compare.cells import Row
from ssm_asr.evaluation.compare.figures import left_text, rate_name
from ssm_asr.evaluation.compare.significance import LEVEL


class Table(NamedTuple):
    """A table whose cells are texts, with its title and a note."""

    title: str
    note: str
    header: list[str]
    rows: list[list[str]]


def rate_tables(rows: list[Row]) -> Iterator[Table]:
    """Yields a table for every test set: the error rate of each model and left context at each chunk width."""
    for name in dict.fromkeys(row["cuts"] for row in rows):
        own = [row for row in rows if row["cuts"] == name]
        chunks_ms = sorted({row["chunk_ms"] for row in own})
        lines: dict[tuple[str, int], dict[int, str]] = {}
        for row in own:
            for left in row["asked_left_frames"]:
                lines.setdefault((row["model"], left), {})[row["chunk_ms"]] = _rate(row)
        what = "words" if own[0]["unit"] == "word" else "characters"
        yield Table(
            f"{name}: {rate_name(rows)} % at each chunk width",
            f"In brackets the 95 % bootstrap interval; {own[0]['utterances']:,} utterances, {own[0]['length']:,} "
            f"{what}. Chunks see whole chunks of left context, at least one.",
            ["model", "left context ms", *(f"chunk {chunk} ms" for chunk in chunks_ms)],
            [
                [model, str(units.chunk_ms(left)), *(cells[chunk] for chunk in chunks_ms)]
                for (model, left), cells in sorted(lines.items(), key=lambda item: _order(own, item[0]))
            ],
        )


def models_table(rows: list[Row]) -> Table:
    """Makes the table of the models: parameters, search and checkpoint."""
    models = {row["model"]: row for row in rows}
    return Table(
        "Models",
        "Their configurations are at the end of report.html, and in results.json.",
        ["model", "parameters", "search", "checkpoint"],
        [[name, f"{row['parameters']:,}", row["method"], row["checkpoint"]] for name, row in models.items()],
    )


def cost_table(rows: list[Row]) -> Table:
    """Makes the table of all cells, with their errors and what a stream costs."""
    rate = rate_name(rows)
    most = max(row["streams"] for row in rows)
    together = f" {most} streams are decoded at once, and a chunk's time is that of all." if most > 1 else ""
    head = ["cuts", "model", "chunk ms", "left context ms", f"{rate} %", "errors / length", "state bytes a stream"]
    return Table(
        "Every cell, and its cost",
        "The left context is the one that chunks really see. Lag: from the first sound of a chunk to its text, where "
        "95 % of the chunks are computed faster; real-time factor and lag depend on the machine, one thread each."
        + together,
        [*head, "real-time factor", "lag ms"],
        [
            [
                row["cuts"],
                row["model"],
                str(row["chunk_ms"]),
                str(units.chunk_ms(row["left_frames"])),
                _rate(row),
                f"{row['errors']:,} / {row['length']:,}",
                f"{row['state_bytes']:,}",
                f"{row['real_time_factor']:.3f}",
                f"{row['lag_ms']:.0f}",
            ]
            for row in rows
        ],
    )


def significance_table(comparisons: list[dict[str, Any]], rate: str) -> Table:
    """Makes the table of the comparisons of `compare_models`."""

    def p_text(p: float | None) -> str:
        return "–" if p is None else f"{p:.4f}"

    found = sum(c["p_holm"] is not None and c["p_holm"] < LEVEL for c in comparisons)
    return Table(
        "Differences between models",
        f"Paired bootstrap over utterances, {rate} of B minus {rate} of A: below zero, B is better. {len(comparisons)} "
        f"comparisons were made. Differences with p < {LEVEL:g} after Holm's correction for that number, "
        f"marked *: {found}. One training run a model: another seed may shift either.",
        ["cuts", "chunk ms", "A", "B", "B − A, % [95 %]", "p", "p, Holm"],
        [
            [
                c["cuts"],
                str(c["chunk_ms"]),
                *(f"{c[f'model_{side}']}, {left_text(c[f'left_frames_{side}'])}" for side in "ab"),
                f"{100 * c['difference']:+.2f} " + _interval(c),
                p_text(c["p"]),
                p_text(c["p_holm"]) + ("*" if c["p_holm"] is not None and c["p_holm"] < LEVEL else ""),
            ]
            for c in comparisons
        ],
    )


def markdown(table: Table) -> str:
    """Writes a table in Markdown, under its title."""

    def line(cells: list[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    head = [f"## {table.title}", "", table.note, "", line(table.header), "|" + "---|" * len(table.header)]
    return "\n".join([*head, *map(line, table.rows)]) + "\n"


def _rate(row: Row) -> str:
    return f"{100 * row['error_rate']:.2f} {_interval(row)}"


def _interval(row: Row) -> str:
    if row["interval_low"] is None:
        return "[no interval]"
    return f"[{100 * row['interval_low']:.2f}, {100 * row['interval_high']:.2f}]"


def _order(rows: list[Row], line: tuple[str, int]) -> tuple[int, int]:
    models = [row["model"] for row in rows]
    return models.index(line[0]), line[1]
