"""What decoding leaves behind, and the table made of it."""

import json
import sys
from pathlib import Path

import pytest

from ssm_asr.cli import report
from ssm_asr.evaluation.results import rate_text, write_results

Captured = pytest.CaptureFixture[str]


def test_results_survive_odd_texts(tmp_path: Path) -> None:
    refs = {"a": 'SAY "HI"\tNOW', "b": "ONE\nTWO", "c": ""}
    summary = write_results(tmp_path, refs, {"a": 'SAY "HI" NOW', "b": "ONE"}, "word", {"mode": "streaming"})
    assert (tmp_path / "hypotheses.tsv").read_text(encoding="utf-8").splitlines() == [
        "id\treference\thypothesis",
        'a\tSAY "HI" NOW\tSAY "HI" NOW',
        "b\tONE TWO\tONE",
        "c\t\t",
    ]
    assert report.pairs(tmp_path, 2).splitlines()[:3] == ["  a", '    ref SAY "HI" NOW', '    hyp SAY "HI" NOW']
    assert report.pairs(tmp_path, 0) == ""
    assert (summary["errors"], summary["reference_length"], summary["missing"]) == (1, 5, ["c"])
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    assert (tmp_path / "errors.txt").read_text() == "b: 1 errors\n  ONE [-TWO]\n"


def test_the_order_of_decoding_does_not_matter(tmp_path: Path) -> None:
    refs = {str(k): "ONE TWO THREE"[: 3 + 2 * k] for k in range(6)}
    hyps = {k: "ONE SIX" for k in refs}
    one = write_results(tmp_path, refs, hyps, "char", {})
    other = write_results(tmp_path, dict(reversed(refs.items())), hyps, "char", {})
    assert one == other and one["interval"][0] < one["interval"][1]


def test_a_single_utterance_has_no_interval(tmp_path: Path) -> None:
    summary = write_results(tmp_path, {"a": "ONE TWO"}, {"a": "ONE"}, "word", {})
    assert summary["interval"] is None and "NaN" not in (tmp_path / "summary.json").read_text()
    assert rate_text(summary).startswith("WER 50.00 % [no interval], 1 errors in 2 words")


def write_summary(exp_dir: Path, name: str, **facts: object) -> None:
    usual = {
        **{"mode": "streaming", "cuts": "test", "method": "greedy", "chunk_frames": 16, "left_context_frames": 64},
        **{"state_bytes": 1146372, "real_time_factor": 0.25, "device": "cpu", "checkpoint": f"{exp_dir}/averaged.pt"},
    }
    unit = str(facts.pop("unit", "word"))
    write_results(exp_dir / name, {"a": "ONE TWO", "b": "SIX"}, {"a": "ONE", "b": "SIX"}, unit, usual | facts)


def test_report(tmp_path: Path, capsys: Captured) -> None:
    write_summary(tmp_path, "one", mode="whole utterance", chunk_frames=-1, left_context_frames=-1, state_bytes=None)
    for chunk in (128, 16, 32):
        write_summary(tmp_path, f"chunk{chunk}", chunk_frames=chunk)
    write_summary(tmp_path, "all", chunk_frames=16, left_context_frames=-1)
    write_summary(tmp_path, "clean", cuts="dev-clean")
    write_summary(tmp_path, "superseded-1/old")  # another run's
    assert report.main(["--exp-dir", str(tmp_path), "--note", "Made speech.", "--pairs", "1"]) == 0
    out = capsys.readouterr().out
    lines = [line for line in out.splitlines() if line.startswith("| ")]
    assert "| WER % [95 % interval] |" in lines[0]
    shown = [tuple(cell.strip() for cell in line.split("|")[1:-1]) for line in lines[1:]]
    assert [(row[0], row[1], row[3], row[4]) for row in shown] == [
        ("dev-clean", "streaming", "320", "1280"),
        ("test", "streaming", "320", "1280"),
        ("test", "streaming", "320", "all"),
        ("test", "streaming", "640", "1280"),
        ("test", "streaming", "2560", "1280"),
        ("test", "whole utterance", "all", "all"),
    ]
    assert shown[0][5:] == ("33.33 [0.00, 50.00]", "1,146,372", "0.250 (cpu)") and shown[-1][6] == "–"
    assert "Made speech.\n\n| cuts" in out and (tmp_path / "report.md").read_text().startswith("Made speech.\n\n| cuts")
    assert out.endswith(
        f"checkpoint: {tmp_path}/averaged.pt\n"
        f"try: {sys.executable} -m ssm_asr transcribe --checkpoint {tmp_path}/averaged.pt FILE\n"
    )
    assert "\n  a\n    ref ONE TWO\n    hyp ONE\n" in out and "  b\n" not in out


def test_report_of_both_units_and_of_nothing(tmp_path: Path, capsys: Captured) -> None:
    assert report.main(["--exp-dir", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"{tmp_path}: no results here; run decode or stream first\n"
    write_summary(tmp_path, "words")
    write_summary(tmp_path, "chars", unit="char", chunk_frames=32)
    assert report.main(["--exp-dir", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "| WER or CER % [" in out and "| 33.33 WER [" in out and " CER [" in out


def test_fluent_rates(tmp_path: Path, capsys: Captured) -> None:
    """Beside the usual rate, where all references are marked; the bootstrap draws the same utterances for both."""
    refs, marked = {"b": "えー京都", "a": "犬"}, {"a": "犬", "b": "(えー)京都", "c": "x"}
    hyps = {"a": "犬", "b": "京と"}
    facts = {"mode": "streaming", "cuts": "eval1", "method": "greedy", "chunk_frames": 16, "left_context_frames": 0}
    facts |= {"state_bytes": 1, "real_time_factor": 0.5, "device": "cpu", "checkpoint": "averaged.pt"}
    summary = write_results(tmp_path / "one", refs, hyps, "char", facts, marked)
    assert (summary["errors"], summary["reference_length"]) == (3, 5)
    assert (summary["fluent_errors"], summary["fluent_reference_length"]) == (1, 3)
    assert summary["fluent_error_rate"] == 1 / 3 and summary["fluent_interval"] == [0.0, 0.5]
    assert rate_text(summary).endswith("2 utterances; fluent 33.33 % [0.00, 50.00]")
    for unit, some in (("word", marked), ("char", {"a": "犬"}), ("char", {}), ("char", {"a": "()", "b": "(あ)"})):
        assert "fluent_error_rate" not in write_results(tmp_path / "two" / unit, refs, hyps, unit, facts, some)
    write_results(tmp_path / "two", refs, hyps, "char", facts | {"cuts": "eval2"})
    assert report.main(["--exp-dir", str(tmp_path)]) == 0
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [row[5:7] for row in rows] == [
        ["CER % [95 % interval]", "fluent CER % [95 % interval]"],
        ["60.00 [0.00, 75.00]", "33.33 [0.00, 50.00]"],
        ["60.00 [0.00, 75.00]", "–"],
    ]


def test_report_fails_above_a_limit(tmp_path: Path, capsys: Captured) -> None:
    write_summary(tmp_path, "one")  # 33.33 %
    assert report.main(["--exp-dir", str(tmp_path), "--at-most", "34"]) == 0
    assert report.main(["--exp-dir", str(tmp_path), "--at-most", "33"]) == 1
    assert "error rate of 33.33 %, above the 33 % allowed" in capsys.readouterr().err
