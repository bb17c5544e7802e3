"""Train a grid of configurations × seeds and compare them: python research/sweep.py --grid FILE … --out DIR

The grid is a YAML file:

    config: ../conformer_tiny.yaml     # all cells share this; the path is relative to the grid's
    seeds: [42, 1, 2]
    baseline: conv k=16                # all other cells are compared with this one
    groups:                            # a group has a cell for every combination of its axes
      - name: conv k={conv_kernel}     # cells are named so; the last part of an axis' name stands for its value
        series: conv                   # they make this line of the figure, over the last axis (default: the name)
        set: {model.encoder.mixer: conv}
        axes: {model.encoder.conv_kernel: [4, 16]}

Combinations that the configuration refuses are left out. Each cell and seed has an experiment directory of its own,
OUT/CELL-seedS, which train, average and decode make; log.txt in it has their commands, and what they print. A run that
fails is reported, and the others go on. If the sweep is stopped, the command that started it goes on from there; if
all runs are finished, it only tabulates. It writes OUT/sweep-CUTS.md, .json, .png and .svg.

Intervals (95 %) come from drawing utterances and seeds, both with replacement (the pigeonhole bootstrap: Owen, Annals
of Applied Statistics 1, 2007). If the interval of a difference covers zero, the comparison is a tie.
"""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that `research` is found when this file is run by its path

from research.sweep_plan import is_finished, plan_runs, read_grid
from research.sweep_rates import compare_series, make_rows
from research.sweep_report import draw, series_table, table
from research.sweep_runs import work_on_all
from ssm_asr.cli import program
from ssm_asr.data.tokens import Tokenizer
from ssm_asr.evaluation.compare import figures
from ssm_asr.evaluation.compare.cells import current_commit
from ssm_asr.evaluation.test_sets import cuts_name


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Returns the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grid", required=True, type=Path, help="YAML file of the grid, as above")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=VALUE", help="change a field of all cells")
    parser.add_argument("--seeds", help="seeds in place of the grid's, such as 1,2,3")
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
    """Runs the program."""
    options = parse_arguments(arguments)
    try:
        grid = read_grid(options.grid, options.set)
        if options.seeds:
            grid = replace(grid, seeds=tuple(map(int, options.seeds.split(","))))
        vocab_size = Tokenizer.load(options.tokens).vocab_size
        runs = plan_runs(grid, options)
        todo = [run for run in runs if not is_finished(run)]
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    print(
        f"{len(grid.cells)} cells × {len(grid.seeds)} seeds: {len(runs)} runs, {len(runs) - len(todo)} finished before"
    )
    try:
        failures = [] if options.table_only else work_on_all(todo, options.jobs)
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
