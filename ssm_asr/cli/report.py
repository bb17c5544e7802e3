"""Tabulate what decode and stream left in an experiment directory: ssm-asr report --exp-dir DIR

Prints a Markdown table, some references beside their hypotheses, and the checkpoint; writes DIR/report.md.
"""

import argparse
import shlex
import sys
from pathlib import Path

from ssm_asr.evaluation.report import find_summaries, pairs, table


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line."""
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
    print(f"\ncheckpoint: {model}\ntry: {sys.executable} -m ssm_asr transcribe --checkpoint {model} FILE")
    worst = max(100 * summary["error_rate"] for _, summary in found)
    if options.at_most is not None and worst > options.at_most:
        print(f"error rate of {worst:.2f} %, above the {options.at_most:g} % allowed", file=sys.stderr)
        return 1
    return 0
