"""Compares the error rates of a sweep's cells with its baseline's, and series with one another.

Intervals (95 %) come from drawing utterances and seeds, both with replacement (the pigeonhole bootstrap: Owen, Annals
of Applied Statistics 1, 2007). The rates of two cells are compared on the utterances that were drawn for both, with
seeds drawn for each cell by itself. If the interval of a difference covers zero, the comparison is a tie.

Shapes: S seeds, U utterances, R resamples.
"""

import itertools
import json
from typing import Any

import numpy as np
from numpy.typing import NDArray

from research.sweep_plan import Grid, Run
from ssm_asr.evaluation.describe import describe
from ssm_asr.evaluation.results import SUMMARY, read_score

RESAMPLES = 4000
Rates = NDArray[np.float64]


def resampled_rates(errors_SU: Rates, totals_U: Rates, utterances_RU: Rates, seed: int) -> Rates:
    """Returns error rates (R,) of resampled seeds and utterances; `utterances_RU` says how often each one is drawn."""
    seeds, resamples = len(errors_SU), len(utterances_RU)
    seeds_RS = np.random.default_rng(seed).multinomial(seeds, [1 / seeds] * seeds, size=resamples)
    errors_R = ((utterances_RU @ errors_SU.T) * seeds_RS).sum(axis=1) / seeds
    return errors_R / (utterances_RU @ totals_U)


def make_rows(grid: Grid, finished: list[Run], vocab_size: int) -> tuple[list[dict[str, Any]], dict[str, Rates]]:
    """Returns a row for each cell with at least one result, and the resampled rates (R,) by the cell's name.

    Rates are fractions; differences are from the baseline.
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
    """Compares the series, two at a time, in the mean over the values of the axis that both have."""
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


def _difference(
    row: dict[str, Any], rows: list[dict[str, Any]], resampled: dict[str, Rates], baseline: str
) -> dict[str, Any]:
    """Compares a cell with the baseline, if the baseline has a result."""
    base = next((other for other in rows if other["name"] == baseline), None)
    if base is None or row is base:
        return {"difference": None, "verdict": "baseline" if base else "baseline missing"}
    low, high = np.quantile(resampled[row["name"]] - resampled[baseline], [0.025, 0.975]).tolist()
    verdict = "better" if high < 0 else "worse" if low > 0 else "tie"
    return {"difference": row["mean"] - base["mean"], "difference_interval": [low, high], "verdict": verdict}
