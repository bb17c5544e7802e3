"""What decoding leaves behind: hypotheses, alignments and a summary, in one directory a run."""

import json
import math
from pathlib import Path
from typing import Any

from ssm_asr.scoring import Score, align_text, bootstrap_interval, score

SUMMARY = "summary.json"


def write_results(out: Path, refs: dict[str, str], hyps: dict[str, str], unit: str, facts: dict[str, Any]) -> dict:
    """Scores hypotheses and writes hypotheses.tsv, errors.txt and summary.json.

    Args:
        unit: word or char.
        facts: how the hypotheses came about; becomes part of the summary.

    Returns:
        The summary: `facts`, the error rate with its 95 % bootstrap interval (null for a single utterance), and the
        counts.
    """
    refs = dict(sorted(refs.items()))  # so that the bootstrap draws the same utterances whatever the order of decoding
    result = score(refs, hyps, unit)
    low, high = bootstrap_interval(result.errors_U, result.totals_U)
    summary = facts | {
        "unit": unit,
        "error_rate": result.rate,
        "interval": None if math.isnan(low) else [low, high],
        "errors": result.errors,
        "insertions": result.insertions,
        "deletions": result.deletions,
        "substitutions": result.substitutions,
        "reference_length": result.total,
        "utterances": len(result.ids),
        "missing": list(result.missing),
    }
    out.mkdir(parents=True, exist_ok=True)
    # Tabs and line ends in a text would break the columns.
    rows = [f"{i}\t{' '.join(refs[i].split())}\t{' '.join(hyps.get(i, '').split())}\n" for i in refs]
    (out / "hypotheses.tsv").write_text("id\treference\thypothesis\n" + "".join(rows), encoding="utf-8")
    (out / "errors.txt").write_text(_errors_text(result, refs, hyps, unit), encoding="utf-8")
    (out / SUMMARY).write_text(json.dumps(summary, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return summary


def rate_text(summary: dict[str, Any]) -> str:
    """The error rate of a summary in per cent, with its interval and counts."""
    name = "WER" if summary["unit"] == "word" else "CER"
    return (
        f"{name} {100 * summary['error_rate']:.2f} % {interval_text(summary)}, "
        f"{summary['errors']} errors in {summary['reference_length']} {summary['unit']}s "
        f"({summary['substitutions']} sub, {summary['deletions']} del, {summary['insertions']} ins), "
        f"{summary['utterances']} utterances"
    )


def interval_text(summary: dict[str, Any]) -> str:
    """The 95 % interval of a summary in per cent."""
    if summary["interval"] is None:
        return "[no interval]"
    low, high = summary["interval"]
    return f"[{100 * low:.2f}, {100 * high:.2f}]"


def _errors_text(result: Score, refs: dict[str, str], hyps: dict[str, str], unit: str) -> str:
    """Every utterance with errors, the worst first."""
    order = sorted(zip(result.errors_U.tolist(), result.ids, strict=True), key=lambda row: (-row[0], row[1]))
    lines = [f"{i}: {n} errors\n  {align_text(refs[i], hyps.get(i, ''), unit)}\n" for n, i in order if n]
    return "".join(lines) or "no errors\n"
