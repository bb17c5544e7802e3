"""The table of what decode and stream left in an experiment directory."""

import json
import math
from pathlib import Path
from typing import Any

from ssm_asr import units
from ssm_asr.evaluation.results import SUMMARY, interval_text, read_texts

COLUMNS = ("cuts", "mode", "search", "chunk ms", "left context ms")
FLUENT = "fluent CER % [95 % interval]"  # disfluencies do not count


def find_summaries(exp_dir: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Returns the directory and summary of every decoding, sorted by cuts, mode, search, chunk and left context."""
    found = [(path.parent, json.loads(path.read_text(encoding="utf-8"))) for path in exp_dir.glob(f"*/{SUMMARY}")]

    def order(item: tuple[Path, dict[str, Any]]) -> list[str | float]:
        summary = item[1]
        frames = [summary[key] for key in ("chunk_frames", "left_context_frames")]
        return [
            *(summary[key] for key in ("cuts", "mode", "method")),
            *(n if n >= 0 else math.inf for n in frames),  # -1 is all there is
        ]

    return sorted(found, key=order)


def table(summaries: list[dict[str, Any]]) -> str:
    """Makes the Markdown table of summaries. It has a column of checkpoints if there are several."""
    rates = {"word": "WER", "char": "CER"}
    units_used = {s["unit"] for s in summaries}
    names = " or ".join(rates[unit] for unit in rates if unit in units_used)
    fluent = any("fluent_error_rate" in s for s in summaries)
    several = len({s["checkpoint"] for s in summaries}) > 1
    columns = [
        *(["checkpoint"] if several else []),
        *COLUMNS,
        f"{names} % [95 % interval]",
        *([FLUENT] if fluent else []),
    ]
    columns += ["state bytes a stream", "real-time factor"]
    rows = [columns]
    for s in summaries:
        rate = f"{100 * s['error_rate']:.2f}" + (f" {rates[s['unit']]}" if len(units_used) > 1 else "")
        chunk, left = (
            str(units.chunk_ms(s[key])) if s[key] >= 0 else "all" for key in ("chunk_frames", "left_context_frames")
        )
        row = [Path(s["checkpoint"]).name] if several else []
        row += [s["cuts"], s["mode"], s["method"], chunk, left, f"{rate} {interval_text(s)}"]
        if fluent:
            has_one = "fluent_error_rate" in s
            row.append(f"{100 * s['fluent_error_rate']:.2f} {interval_text(s, 'fluent_interval')}" if has_one else "–")
        row.append(f"{s['state_bytes']:,}" if s["state_bytes"] else "–")
        rows.append([*row, f"{s['real_time_factor']:.3f} ({s['device']})"])
    head, *body = (f"| {' | '.join(row)} |" for row in rows)
    return "\n".join([head, "|---" * len(columns) + "|", *body])


def pairs(directory: Path, count: int) -> str:
    """Shows `count` references above their hypotheses, spread evenly over the utterances of a decoding."""
    refs, hyps = read_texts(directory)
    step = max(1, len(refs) // max(1, count))
    return "\n".join(f"  {i}\n    ref {refs[i]}\n    hyp {hyps[i]}" for i in list(refs)[::step][:count])
