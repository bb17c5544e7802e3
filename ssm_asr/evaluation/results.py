"""What decoding leaves behind: hypotheses, alignments and a summary, in a directory for each run."""

import csv
import json
import math
import sys
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from ssm_asr.data.errors import CutError
from ssm_asr.evaluation.scoring import Counts, Score, align_text, bootstrap_interval, fluent_errors, score
from ssm_asr.search.recognizer import Recognizer

SUMMARY = "summary.json"
HYPOTHESES = "hypotheses.tsv"


class Decoded(NamedTuple):
    """What the decoding of a test set gave: texts by utterance id, and how they came about."""

    refs: dict[str, str]
    hyps: dict[str, str]
    facts: dict[str, Any]


class Faults:
    """What is wrong with cuts that could not be read, which is said as it is found.

    Attributes:
        found: one line for each cut.
    """

    def __init__(self) -> None:
        self.found: list[str] = []

    def add(self, fault: str) -> None:
        """Takes note of a fault, and prints it above progress bars."""
        self.found.append(fault)
        tqdm.write(fault, file=sys.stderr)

    def require_some(self, hyps: dict[str, str]) -> None:
        """Checks that not all cuts had faults.

        Raises:
            CutError: if there is no hypothesis.
        """
        if self.found and not hyps:
            raise CutError(f"none of {len(self.found)} cuts can be read; the first: {self.found[0]}")


def settings_facts(recognizer: Recognizer) -> dict[str, Any]:
    """Returns the settings of a recogniser that go into a summary."""
    return {
        "chunk_frames": recognizer.chunk,
        "left_context_frames": recognizer.left_context,
        "method": recognizer.method,
        "beam": recognizer.beam if recognizer.method == "beam" else None,
        "device": str(recognizer.device),
    }


def write_results(
    out: Path,
    refs: dict[str, str],
    hyps: dict[str, str],
    unit: str,
    facts: dict[str, Any],
    marked_refs: dict[str, str] | None = None,
) -> dict[str, Any]:
    """Scores hypotheses and writes hypotheses.tsv, errors.txt and summary.json.

    Args:
        out: the directory, which is made if it is missing.
        refs, hyps: references and recognised texts by utterance id.
        unit: word or char.
        facts: how the hypotheses came about; they become a part of the summary.
        marked_refs: the references with disfluencies in parentheses. If all references have one and the unit is char,
            the summary also holds the fluent error rate, in which disfluencies do not count.

    Returns:
        The summary: `facts`, the error rate with its 95 % bootstrap interval (null for a single utterance), and the
        counts.

    Raises:
        ValueError: if a hypothesis has no reference, or the references are empty.
    """
    refs = dict(sorted(refs.items()))  # so that what the bootstrap draws does not depend on the order of decoding
    result = score(refs, hyps, unit)
    summary = facts | {
        "unit": unit,
        "error_rate": result.rate,
        "interval": _interval(result.errors_U, result.totals_U),
        "errors": result.errors,
        "insertions": result.insertions,
        "deletions": result.deletions,
        "substitutions": result.substitutions,
        "reference_length": result.total,
        "utterances": len(result.ids),
        "missing": list(result.missing),
    }
    if unit == "char" and marked_refs and marked_refs.keys() >= refs.keys():
        summary |= _fluent_summary({i: marked_refs[i] for i in refs}, hyps)
    out.mkdir(parents=True, exist_ok=True)
    # Tabs and line ends in a text would break the columns.
    rows = [f"{i}\t{' '.join(refs[i].split())}\t{' '.join(hyps.get(i, '').split())}\n" for i in refs]
    (out / HYPOTHESES).write_text("id\treference\thypothesis\n" + "".join(rows), encoding="utf-8")
    (out / "errors.txt").write_text(_errors_text(result, refs, hyps, unit), encoding="utf-8")
    (out / SUMMARY).write_text(json.dumps(summary, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return summary


def _fluent_summary(marked_refs: dict[str, str], hyps: dict[str, str]) -> dict[str, Any]:
    """The fluent error rate with its interval and counts; empty if no reference has a fluent character."""
    errors_U, totals_U = fluent_errors(marked_refs, hyps)
    errors, total = int(errors_U.sum()), int(totals_U.sum())
    if not total:
        return {}
    return {
        "fluent_error_rate": errors / total,
        "fluent_interval": _interval(errors_U, totals_U),
        "fluent_errors": errors,
        "fluent_reference_length": total,
    }


def _interval(errors_U: Counts, totals_U: Counts) -> list[float] | None:
    low, high = bootstrap_interval(errors_U, totals_U)
    return None if math.isnan(low) else [low, high]


def read_texts(directory: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Reads the references and hypotheses that `write_results` wrote, by utterance id in alphabetical order."""
    with open(directory / HYPOTHESES, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    return {row["id"]: row["reference"] for row in rows}, {row["id"]: row["hypothesis"] for row in rows}


def read_score(directory: Path, unit: str) -> Score:
    """Scores the texts that `write_results` wrote."""
    return score(*read_texts(directory), unit)


def rate_text(summary: dict[str, Any]) -> str:
    """Says in one line the error rate of a summary in per cent, with its interval and counts."""
    name = "WER" if summary["unit"] == "word" else "CER"
    fluent = ""
    if "fluent_error_rate" in summary:
        fluent = f"; fluent {100 * summary['fluent_error_rate']:.2f} % {interval_text(summary, 'fluent_interval')}"
    return (
        f"{name} {100 * summary['error_rate']:.2f} % {interval_text(summary)}, "
        f"{summary['errors']} errors in {summary['reference_length']} {summary['unit']}s "
        f"({summary['substitutions']} sub, {summary['deletions']} del, {summary['insertions']} ins), "
        f"{summary['utterances']} utterances{fluent}"
    )


def interval_text(summary: dict[str, Any], key: str = "interval") -> str:
    """Says the 95 % interval of a summary in per cent."""
    if summary[key] is None:
        return "[no interval]"
    low, high = summary[key]
    return f"[{100 * low:.2f}, {100 * high:.2f}]"


def _errors_text(result: Score, refs: dict[str, str], hyps: dict[str, str], unit: str) -> str:
    """Every utterance with errors, the worst first."""
    order = sorted(zip(result.errors_U.tolist(), result.ids, strict=True), key=lambda row: (-row[0], row[1]))
    lines = [f"{i}: {n} errors\n  {align_text(refs[i], hyps.get(i, ''), unit)}\n" for n, i in order if n]
    return "".join(lines) or "no errors\n"
