"""Which differences between models are significant, by a paired bootstrap over utterances and Holm's correction."""

import itertools
import math
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ssm_asr.evaluation.compare.cells import Row
from ssm_asr.evaluation.results import read_score
from ssm_asr.evaluation.scoring import Score, paired_bootstrap

LEVEL = 0.05
# Many comparisons take more: else their smallest possible p-value would be above LEVEL after Holm's correction.
RESAMPLES = 10_000


def compare_models(rows: list[Row], cells_dir: Path) -> list[dict[str, Any]]:
    """Compares every two models, utterance by utterance, at one chunk width and left context.

    A model without left context is compared with every left context of the others.

    Args:
        rows: the cells, as `read_row` reads them.
        cells_dir: the directory that holds the cells.

    Returns:
        A row for each comparison. The difference is the error rate of b minus the error rate of a; p_holm is the
        p-value after Holm's correction (Scandinavian Journal of Statistics 6, 1979) for all the comparisons returned.
        Interval and p-values are None for a single utterance.
    """
    pairs = [(a, b) for a, b in itertools.combinations(rows, 2) if _comparable(a, b)]
    scores: dict[str, Score] = {}
    results = []
    for a, b in tqdm(pairs, desc="significance", unit="pair", leave=False):
        for row in (a, b):
            if row["directory"] not in scores:
                scores[row["directory"]] = read_score(cells_dir / row["directory"], row["unit"])
        score_a, score_b = scores[a["directory"]], scores[b["directory"]]
        difference, interval, p = paired_bootstrap(
            score_a.errors_U, score_b.errors_U, score_a.totals_U, max(RESAMPLES, 100 * len(pairs))
        )
        low, high, p_value = (None if math.isnan(value) else value for value in (*interval, p))
        results.append(
            {
                "cuts": a["cuts"],
                "chunk_ms": a["chunk_ms"],
                "model_a": a["model"],
                "left_frames_a": a["left_frames"],
                "model_b": b["model"],
                "left_frames_b": b["left_frames"],
                "difference": difference,
                "interval_low": low,
                "interval_high": high,
                "p": p_value,
            }
        )
    corrected = holm([result["p"] for result in results])
    return [result | {"p_holm": p} for result, p in zip(results, corrected, strict=True)]


def holm(p_values: list[float | None]) -> list[float | None]:
    """Corrects p-values for their number m by Holm's step-down procedure.

    The k-th smallest is multiplied by m - k + 1, and is at least as large as the one before it. None stays None and
    does not count.
    """
    order = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    corrected: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, i) in enumerate(order):
        largest = corrected[i] = max(largest, min(1.0, (len(order) - rank) * p))
    return corrected


def _comparable(a: Row, b: Row) -> bool:
    if a["model"] == b["model"] or (a["cuts"], a["chunk_ms"]) != (b["cuts"], b["chunk_ms"]):
        return False
    lefts = [set(row["asked_left_frames"]) for row in (a, b)]
    return {0} in lefts or bool(lefts[0] & lefts[1])
