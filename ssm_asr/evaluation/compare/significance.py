"""Which differences between models are more than chance: paired bootstrap over utterances, Holm's correction."""

import itertools
import math
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ssm_asr.evaluation.compare.cells import Row
from ssm_asr.evaluation.results import read_score
from ssm_asr.evaluation.scoring import Score, paired_bootstrap

LEVEL = 0.05
RESAMPLES = 10_000  # and more where there are many comparisons, else their least p-value were above LEVEL after Holm


def compare_models(rows: list[Row], cells_dir: Path) -> list[dict[str, Any]]:
    """Every two models on the same utterances, at the same chunk width and left context.

    A model without left context is compared with every left context of the others.

    Args:
        rows: of `read_row`.

    Returns:
        A row a comparison. The difference is the error rate of b less that of a; p_holm is the p-value after Holm's
        correction (Scandinavian Journal of Statistics 6, 1979) for all the comparisons returned. Interval and p-values
        are None for a single utterance.
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
    """Holm's step-down correction: the k-th smallest of m is multiplied by m - k + 1, never to less than the last."""
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
