"""Reads the grid of a sweep and plans its runs."""

import argparse
import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from ssm_asr.config import ConfigError, Experiment, load_experiment
from ssm_asr.evaluation.results import SUMMARY
from ssm_asr.evaluation.test_sets import cuts_name


@dataclass(frozen=True)
class Cell:
    """A cell is one configuration of the grid.

    Attributes:
        name: what tables call it.
        group: the number of its group.
        series: the line of the figure that it belongs to.
        axis: the last part of the name of its group's last axis; may be empty.
        x: its value on that axis, if the value is a number.
        overrides: what it changes in the configuration.
        experiment: the configuration with these changes.
    """

    name: str
    group: int
    series: str
    axis: str
    x: float | None
    overrides: tuple[str, ...]
    experiment: Experiment


@dataclass(frozen=True)
class Grid:
    """A grid says what is to be trained, and which combinations the configuration refuses."""

    config: Path
    seeds: tuple[int, ...]
    baseline: str
    cells: list[Cell]
    left_out: list[str]


@dataclass(frozen=True)
class Run:
    """A run trains a cell with one seed.

    Attributes:
        directory: its experiment directory.
        result: the directory that decoding writes.
        commands: the programs to call, each with its arguments.
    """

    cell: Cell
    seed: int
    directory: Path
    result: Path
    commands: tuple[tuple[str, list[str]], ...]


def read_grid(path: Path, extra: Sequence[str]) -> Grid:
    """Reads the grid of a file, and applies the `extra` overrides to all cells.

    Raises:
        ValueError: if the file is no grid, or leaves nothing to train or compare.
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
    """Returns the cells of one group, and a line for each combination that is left out."""
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


def plan_runs(grid: Grid, options: argparse.Namespace) -> list[Run]:
    """Returns all runs, seed by seed, so that a sweep that is stopped has as many whole seeds as possible."""
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
    """Tells whether a run has its result.

    Raises:
        ValueError: if its directory belongs to a run with another configuration.
    """
    saved = run.directory / "config.yaml"
    if not saved.exists():
        return False
    wanted = run.cell.experiment
    if load_experiment(saved) != replace(wanted, train=replace(wanted.train, seed=run.seed)):
        raise ValueError(f"{run.directory}: holds a run with other settings; move it away, or give another --out")
    return (run.result / SUMMARY).exists()
