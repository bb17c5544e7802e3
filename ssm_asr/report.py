"""Tabulate what decode and stream left in an experiment directory: python -m ssm_asr.report --exp-dir DIR

Prints a Markdown table, some references beside their hypotheses, and the checkpoint; writes DIR/report.md.
"""

import argparse
import json
import math
import shlex
import sys
from pathlib import Path
from typing import Any

from ssm_asr import units
from ssm_asr.program import run
from ssm_asr.results import SUMMARY, interval_text, read_texts

COLUMNS = ("cuts", "mode", "search", "chunk ms", "left context ms")
FLUENT = "fluent CER % [95 % interval]"  # with disfluencies counting for nothing


def find_summaries(exp_dir: Path) -> list[tuple[Path, dict[str, Any]]]:
    """(directory, summary) of every decoding under an experiment directory, by cuts, mode, chunk and left context."""
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
    """The Markdown table of summaries."""
    rates = {"word": "WER", "char": "CER"}
    units_used = {s["unit"] for s in summaries}
    names = " or ".join(rates[unit] for unit in rates if unit in units_used)
    fluent = any("fluent_error_rate" in s for s in summaries)
    columns = [*COLUMNS, f"{names} % [95 % interval]", *([FLUENT] if fluent else [])]
    columns += ["state bytes a stream", "real-time factor"]
    rows = [columns]
    for s in summaries:
        rate = f"{100 * s['error_rate']:.2f}" + (f" {rates[s['unit']]}" if len(units_used) > 1 else "")
        chunk, left = (
            str(units.chunk_ms(s[key])) if s[key] >= 0 else "all" for key in ("chunk_frames", "left_context_frames")
        )
        row = [s["cuts"], s["mode"], s["method"], chunk, left, f"{rate} {interval_text(s)}"]
        if fluent:
            has_one = "fluent_error_rate" in s
            row.append(f"{100 * s['fluent_error_rate']:.2f} {interval_text(s, 'fluent_interval')}" if has_one else "–")
        row.append(f"{s['state_bytes']:,}" if s["state_bytes"] else "–")
        rows.append([*row, f"{s['real_time_factor']:.3f} ({s['device']})"])
    head, *body = (f"| {' | '.join(row)} |" for row in rows)
    return "\n".join([head, "|---" * len(columns) + "|", *body])


def pairs(directory: Path, count: int) -> str:
    """References above hypotheses, spread evenly over a decoding's utterances."""
    refs, hyps = read_texts(directory)
    step = max(1, len(refs) // max(1, count))
    return "\n".join(f"  {i}\n    ref {refs[i]}\n    hyp {hyps[i]}" for i in list(refs)[::step][:count])


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--exp-dir", required=True, type=Path, help="directory with results of decode and stream")
    parser.add_argument("--pairs", type=int, default=4, help="references and hypotheses to show (default: 4)")
    parser.add_argument("--at-most", type=float, metavar="PERCENT", help="fail if an error rate is higher")
    parser.add_argument("--note", default="", help="a line to put above the table, such as what the speech is")
    options = parser.parse_args(arguments)
    found = find_summaries(options.exp_dir)
    if not found:
        print(f"{options.exp_dir}: no results here; run decode or stream first", file=sys.stderr)
        return 2
    text = table([summary for _, summary in found])
    if options.note:
        text = f"{options.note}\n\n{text}"
    (options.exp_dir / "report.md").write_text(text + "\n", encoding="utf-8")
    last_dir, last = found[-1]
    print(f"\n{text}\n\nfrom {last['cuts']}, {last['mode']}:\n{pairs(last_dir, options.pairs)}")
    model = shlex.quote(str(Path(last["checkpoint"]).resolve()))  # a recipe runs elsewhere than where it is called
    print(f"\ncheckpoint: {model}\ntry: {sys.executable} -m ssm_asr.stream --checkpoint {model} --wav FILE")
    worst = max(100 * summary["error_rate"] for _, summary in found)
    if options.at_most is not None and worst > options.at_most:
        print(f"error rate of {worst:.2f} %, above the {options.at_most:g} % allowed", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
