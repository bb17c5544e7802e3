"""Train a grid of configurations × seeds and compare them: python research/sweep.py --grid FILE … --out DIR

The grid is a YAML file:

    config: ../conformer_tiny.yaml     # what all cells share; its path is relative to the grid's
    seeds: [42, 1, 2]
    baseline: conv k=16                # the cell that all others are compared with
    groups:                            # each is every combination of its axes
      - name: conv k={conv_kernel}     # of its cells; an axis is filled in by the last part of its name
        series: conv                   # a line of the figure, over the last axis (default: the name)
        set: {model.encoder.mixer: conv}
        axes: {model.encoder.conv_kernel: [4, 16]}

Combinations that the configuration refuses are left out. Each cell and seed is an experiment directory of its own,
OUT/CELL-seedS, made by train, average and decode as if called one by one; log.txt in it has the commands, and what they
print. A cell that fails is reported, and the others go on. The same command goes on where it was stopped, and with
everything there only tabulates. Writes OUT/sweep-CUTS.md, .json, .png and .svg.

Intervals (95 %) come from drawing utterances and seeds, both with replacement (the pigeonhole bootstrap: Owen, Annals
of Applied Statistics 1, 2007). Differences are of the same drawn utterances, with seeds drawn for each cell by itself.
An interval of a difference that covers zero is a tie.

Shapes: S seeds, U utterances, R resamples.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import re
import shlex
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, NullLocator
from numpy.typing import NDArray
from tqdm import tqdm

from ssm_asr.cli import average, decode, program, train
from ssm_asr.config import ConfigError, Experiment, load_experiment
from ssm_asr.data.tokens import Tokenizer
from ssm_asr.evaluation.compare import figures
from ssm_asr.evaluation.compare.cells import current_commit
from ssm_asr.evaluation.compare.tables import Table, markdown
from ssm_asr.evaluation.describe import describe
from ssm_asr.evaluation.results import SUMMARY, read_score
from ssm_asr.evaluation.test_sets import cuts_name

RESAMPLES = 4000
PROGRAMS = {"train": train.main, "average": average.main, "decode": decode.main}
Rates = NDArray[np.float64]


@dataclass(frozen=True)
class Cell:
    """A configuration of the grid."""

    name: str
    group: int
    series: str
    axis: str  # the last one of its group, by the last part of its name; may be empty
    x: float | None  # its value there, if that is a number
    overrides: tuple[str, ...]
    experiment: Experiment


@dataclass(frozen=True)
class Grid:
    """What is to be trained."""

    config: Path
    seeds: tuple[int, ...]
    baseline: str
    cells: list[Cell]
    left_out: list[str]


@dataclass(frozen=True)
class Run:
    """One training: a cell with a seed."""

    cell: Cell
    seed: int
    directory: Path
    result: Path  # what decoding writes
    commands: tuple[tuple[str, list[str]], ...]  # programs with their arguments


def read_grid(path: Path, extra: Sequence[str]) -> Grid:
    """The grid of a file, `extra` overrides applied to all cells.

    Raises:
        ValueError: if the file is no grid, or one that leaves nothing to train or compare.
    """
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
        config, seeds, baseline = path.parent / tree["config"], tuple(tree["seeds"]), tree["baseline"]
        groups = [(g["name"], g.get("series", g["name"]), g.get("set", {}), g.get("axes", {})) for g in tree["groups"]]
    except (OSError, yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}: not a grid with config, seeds, baseline and named groups ({reason})") from None
    cells, left_out = [], []
    for number, (name, series, fixed, axes) in enumerate(groups):
        try:
            found, reasons = _cells_of(config, extra, number, name, series, fixed, axes)
        except KeyError as error:
            raise ValueError(
                f"{path}: {name!r} or its series has {{{error.args[0]}}}, which is none of its axes"
            ) from None
        if not found:
            raise ValueError(f"{path}: nothing is left of group {name!r}: {reasons[-1]}")
        cells += found
        left_out += reasons
    names = [cell.name for cell in cells]
    if len(set(names)) < len(names) or not seeds:
        raise ValueError(
            f"{path}: give seeds, and each group a name with its axes in it, so that no cells are named alike"
        )
    if baseline not in names:
        raise ValueError(f"{path}: no cell is named like the baseline {baseline!r}; give one of {', '.join(names)}")
    return Grid(config, seeds, baseline, cells, left_out)


def _cells_of(
    config: Path, extra: Sequence[str], number: int, name: str, series: str, fixed: dict[str, Any], axes: dict[str, Any]
) -> tuple[list[Cell], list[str]]:
    """The cells of one group, and why combinations are left out."""
    cells, left_out = [], []
    for values in itertools.product(*axes.values()):
        chosen = dict(zip(axes, values, strict=True))
        short = {key.rpartition(".")[2]: value for key, value in chosen.items()}
        overrides = (*(f"{key}={json.dumps(value)}" for key, value in (fixed | chosen).items()), *extra)
        try:
            experiment = load_experiment(config, overrides)
        except ConfigError as error:
            left_out.append(f"{name.format(**short)}: {error}")
            continue
        x = float(values[-1]) if values and isinstance(values[-1], (int, float)) else None
        axis = list(short)[-1] if short else ""
        cells.append(Cell(name.format(**short), number, series.format(**short), axis, x, overrides, experiment))
    return cells, left_out


def plan(grid: Grid, options: argparse.Namespace) -> list[Run]:
    """All runs, seed by seed, so that a sweep that is stopped has as many whole seeds as possible."""
    runs = []
    for seed, cell in itertools.product(grid.seeds, grid.cells):
        directory = options.out / f"{re.sub(r'[^A-Za-z0-9.]+', '-', cell.name)}-seed{seed}"
        result = directory / f"decode-{cuts_name(options.test_cuts)}"
        sets = [f"--set={override}" for override in (*cell.overrides, f"train.seed={seed}")]
        data = [
            f"--train-cuts={options.train_cuts}",
            f"--valid-cuts={options.valid_cuts}",
            f"--tokens={options.tokens}",
        ]
        noise = [f"--noise-cuts={options.noise_cuts}"] if options.noise_cuts else []
        device, model = f"--device={options.device}", f"--checkpoint={directory / 'averaged.pt'}"
        commands = (
            ("train", [f"--config={grid.config}", *sets, *data, *noise, f"--exp-dir={directory}", device]),
            ("average", [f"--exp-dir={directory}"]),
            ("decode", [model, f"--cuts={options.test_cuts}", f"--out={result}", device]),
        )
        runs.append(Run(cell, seed, directory, result, commands))
    return runs


def is_finished(run: Run) -> bool:
    """Whether the run has its result.

    Raises:
        ValueError: if the directory is of a run with other settings.
    """
    saved = run.directory / "config.yaml"
    if not saved.exists():
        return False
    wanted = run.cell.experiment
    if load_experiment(saved) != replace(wanted, train=replace(wanted.train, seed=run.seed)):
        raise ValueError(f"{run.directory}: holds a run with other settings; move it away, or give another --out")
    return (run.result / SUMMARY).exists()


def work(run: Run) -> None:
    """Everything of one run; for a process of its own."""
    run.directory.mkdir(parents=True, exist_ok=True)
    with open(run.directory / "log.txt", "ab") as log:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(log.fileno(), stream.fileno())
    for verb, arguments in run.commands:
        print(f"$ python -m ssm_asr.{verb} {shlex.join(arguments)}", flush=True)
        code = PROGRAMS[verb](arguments)
        if code:
            sys.exit(code)


def run_all(runs: list[Run], jobs: int) -> list[str]:
    """Works on so many at a time; why runs failed, a line each."""
    # Each in a process of its own, so that none can harm another; forked from one that has everything imported.
    context = multiprocessing.get_context("forkserver")

    def start(run: Run) -> int | None:
        process = context.Process(target=work, args=(run,))
        process.start()
        process.join()
        return process.exitcode

    failures = []
    with ThreadPoolExecutor(jobs) as pool, tqdm(total=len(runs), desc="sweep", unit="run") as bar:
        futures = {pool.submit(start, run): run for run in runs}
        try:
            for future in as_completed(futures):
                run, code = futures[future], future.result()
                if code:
                    failures.append(f"{run.directory}: failed ({code}): {_last_line(run.directory / 'log.txt')}")
                    bar.write(failures[-1])
                bar.update()
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return failures


def _last_line(log: Path) -> str:
    """What was printed last, progress bars aside; they end in a carriage return."""
    lines = re.split(r"[\r\n]+", log.read_text(encoding="utf-8", errors="replace").strip()) if log.exists() else []
    return lines[-1] if lines else "it printed nothing"


def resampled_rates(errors_SU: Rates, totals_U: Rates, utterances_RU: Rates, seed: int) -> Rates:
    """Error rates (R,) of resampled seeds and utterances, the utterances drawn as often as `utterances_RU` says."""
    seeds, resamples = len(errors_SU), len(utterances_RU)
    seeds_RS = np.random.default_rng(seed).multinomial(seeds, [1 / seeds] * seeds, size=resamples)
    errors_R = ((utterances_RU @ errors_SU.T) * seeds_RS).sum(axis=1) / seeds
    return errors_R / (utterances_RU @ totals_U)


def make_rows(grid: Grid, finished: list[Run], vocab_size: int) -> tuple[list[dict[str, Any]], dict[str, Rates]]:
    """A row a cell with at least one result, and the resampled rates (R,) of each.

    Rates are fractions, differences those from the baseline.
    """
    scores: dict[str, dict[int, Any]] = {}
    for run in finished:
        unit = json.loads((run.result / SUMMARY).read_text(encoding="utf-8"))["unit"]
        scores.setdefault(run.cell.name, {})[run.seed] = read_score(run.result, unit)
    if not scores:
        return [], {}
    first = next(score for seeds in scores.values() for score in seeds.values())
    totals_U = first.totals_U.astype(np.float64)
    utterances = len(totals_U)
    draws_RU = np.random.default_rng(0).multinomial(utterances, [1 / utterances] * utterances, size=RESAMPLES)
    resampled: dict[str, Rates] = {}
    rows = []
    for number, cell in enumerate(grid.cells):
        if cell.name not in scores:
            continue
        by_seed = scores[cell.name]
        errors_SU = np.stack([score.errors_U for score in by_seed.values()]).astype(np.float64)
        resampled[cell.name] = resampled_rates(errors_SU, totals_U, draws_RU.astype(np.float64), number + 1)
        settings = cell.experiment.decode
        sizes = describe(cell.experiment, vocab_size, settings.chunk_frames, settings.left_context_frames)
        low, high = np.quantile(resampled[cell.name], [0.025, 0.975]).tolist()
        rows.append(
            {
                **{"name": cell.name, "group": cell.group, "series": cell.series, "axis": cell.axis, "x": cell.x},
                **{"unit": first.unit, "parameters": sizes["parameters"], "state_bytes": sizes["state_bytes"]},
                "rates": {seed: score.rate for seed, score in by_seed.items()},
                **{"mean": float(errors_SU.sum(axis=1).mean() / totals_U.sum()), "low": low, "high": high},
            }
        )
    for row in rows:
        row |= _difference(row, rows, resampled, grid.baseline)
    return rows, resampled


def compare_series(rows: list[dict[str, Any]], resampled: dict[str, Rates]) -> list[dict[str, Any]]:
    """How the series compare, two at a time, in the mean over the values of the axis that both have."""
    series: dict[str, dict[float, dict[str, Any]]] = {}
    for row in rows:
        if row["x"] is not None:
            series.setdefault(row["series"], {})[row["x"]] = row
    pairs = []
    for (name_a, a), (name_b, b) in itertools.combinations(series.items(), 2):
        shared = sorted(a.keys() & b.keys())
        if not shared:
            continue
        means = [float(np.mean([line[x]["mean"] for x in shared])) for line in (a, b)]
        drawn = np.mean([resampled[b[x]["name"]] - resampled[a[x]["name"]] for x in shared], axis=0)
        low, high = np.quantile(drawn, [0.025, 0.975]).tolist()
        verdict = f"{name_b} better" if high < 0 else f"{name_a} better" if low > 0 else "tie"
        pair: dict[str, Any] = {"a": name_a, "b": name_b, "x": shared, "mean_a": means[0], "mean_b": means[1]}
        pairs.append(pair | {"difference_interval": [low, high], "verdict": verdict})
    return pairs


def series_table(pairs: list[dict[str, Any]], rate: str) -> str:
    """The comparisons of series in Markdown."""
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


def _difference(
    row: dict[str, Any], rows: list[dict[str, Any]], resampled: dict[str, Rates], baseline: str
) -> dict[str, Any]:
    """How a cell compares with the baseline, if that has a result."""
    base = next((other for other in rows if other["name"] == baseline), None)
    if base is None or row is base:
        return {"difference": None, "verdict": "baseline" if base else "baseline missing"}
    low, high = np.quantile(resampled[row["name"]] - resampled[baseline], [0.025, 0.975]).tolist()
    verdict = "better" if high < 0 else "worse" if low > 0 else "tie"
    return {"difference": row["mean"] - base["mean"], "difference_interval": [low, high], "verdict": verdict}


def table(rows: list[dict[str, Any]], grid: Grid, cuts: str, failures: list[str]) -> str:
    """The table in Markdown, and what is not in it."""
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
    """Mean error rate over the last axis of each group, with intervals, and over the state of a stream."""
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


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grid", required=True, type=Path, help="YAML file, as above")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=VALUE", help="change a field of all cells")
    parser.add_argument("--seeds", help="instead of those of the grid: 1,2,3")
    parser.add_argument("--train-cuts", required=True, type=Path, help="lhotse cuts to train on")
    parser.add_argument("--valid-cuts", required=True, type=Path, help="lhotse cuts to validate on")
    parser.add_argument("--test-cuts", required=True, type=Path, help="lhotse cuts to measure on")
    parser.add_argument("--noise-cuts", type=Path, help="lhotse cuts of noise to mix in (default: none)")
    parser.add_argument("--tokens", required=True, type=Path, help="directory that 'prepare tokens' wrote")
    parser.add_argument("--out", required=True, type=Path, help="directory for the experiment directories and tables")
    parser.add_argument("--jobs", type=program.positive, default=1, help="runs at a time, one thread each (default: 1)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda, which runs share (default: auto)")
    parser.add_argument("--table-only", action="store_true", help="train nothing, tabulate what is there")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    options = parse_arguments(arguments)
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that are started
    try:
        grid = read_grid(options.grid, options.set)
        if options.seeds:
            grid = replace(grid, seeds=tuple(map(int, options.seeds.split(","))))
        vocab_size = Tokenizer.load(options.tokens).vocab_size
        runs = plan(grid, options)
        todo = [run for run in runs if not is_finished(run)]
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    print(
        f"{len(grid.cells)} cells × {len(grid.seeds)} seeds: {len(runs)} runs, {len(runs) - len(todo)} finished before"
    )
    try:
        failures = [] if options.table_only else run_all(todo, options.jobs)
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    cuts = cuts_name(options.test_cuts)
    rows, resampled = make_rows(grid, [run for run in runs if is_finished(run)], vocab_size)
    if not rows:
        print(f"{options.out}: no run has a result\n{chr(10).join(failures)}", file=sys.stderr)
        return 1
    text = table(rows, grid, cuts, failures)
    pairs = compare_series(rows, resampled)
    if pairs:
        text += "\n" + series_table(pairs, figures.rate_name(rows))
    stem = options.out / f"sweep-{cuts}"
    stem.with_suffix(".md").write_text(text, encoding="utf-8")
    tree = {"commit": current_commit(), "cuts": cuts, "overrides": options.set}
    tree |= {"cells": rows, "series": pairs, "failures": failures}
    stem.with_suffix(".json").write_text(json.dumps(tree, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    figures.save(draw, rows, stem)
    print(text)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(program.run(main))
