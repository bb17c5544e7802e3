"""The parts of a comparison's report, made of given results: significance, figures, alignments."""

from pathlib import Path

import pytest

from ssm_asr.evaluation.compare import cells, figures, page, significance, tables
from ssm_asr.evaluation.results import write_results


def test_alignment() -> None:
    assert page.aligned("ONE TWO SIX", "ONE SIX SIX TEN", "word") == [
        ("same", "ONE", "ONE"),
        ("sub", "TWO", "SIX"),
        ("same", "SIX", "SIX"),
        ("ins", "", "TEN"),
    ]
    assert page.aligned("これ は", "これ", "char")[2:] == [("del", "は", "")]


def given_rows(directory: Path, errors: dict[str, list[int]]) -> list[cells.Row]:
    """A row a model, with so many errors in each utterance of ten characters."""
    rows = []
    for name, counts in errors.items():
        refs = {f"u{k:02d}": "あいうえおかきくけこ" for k in range(len(counts))}
        hyps = {i: text[n:] for (i, text), n in zip(refs.items(), counts, strict=True)}
        summary = write_results(directory / name, refs, hyps, "char", {})
        low, high = summary["interval"] or (None, None)
        rows.append(
            {
                **{"model": name, "cuts": "eval1", "chunk_ms": 320, "left_frames": 0, "asked_left_frames": [0]},
                **{"unit": "char", "error_rate": summary["error_rate"], "interval_low": low, "interval_high": high},
                **{"state_bytes": 48000, "directory": name, "utterances": len(counts), "length": 10 * len(counts)},
            }
        )
    return rows


def test_significance(tmp_path: Path) -> None:
    rows = given_rows(tmp_path, {"bad": [3] * 18 + [2, 4], "good": [1] * 20, "alike": [1, 1, 2, 0] * 5})
    found = {(c["model_a"], c["model_b"]): c for c in significance.compare_models(rows, tmp_path)}
    assert list(found) == [("bad", "good"), ("bad", "alike"), ("good", "alike")]
    assert found["bad", "good"]["difference"] == pytest.approx(-0.2)
    assert found["bad", "good"]["interval_high"] < 0 and found["bad", "good"]["p"] < 0.001
    assert found["bad", "good"]["p_holm"] == pytest.approx(3 * found["bad", "good"]["p"])
    assert found["good", "alike"]["difference"] == 0 and found["good", "alike"]["p_holm"] > 0.5
    table = tables.markdown(tables.significance_table(list(found.values()), "CER"))
    assert "3 comparisons were made" in table and "marked *: 2." in table and "-20.00 [" in table
    rows[0]["asked_left_frames"] = [64]  # of one model alone: compared with all that have none
    assert len(significance.compare_models(rows, tmp_path)) == 3
    rows[1]["asked_left_frames"] = [128]
    assert len(significance.compare_models(rows, tmp_path)) == 2
    rows[1]["chunk_ms"] = 640
    assert len(significance.compare_models(rows, tmp_path)) == 1


def test_many_comparisons_can_still_be_significant(tmp_path: Path) -> None:
    """A p-value is at least 2 / (resamples + 1), times the number of comparisons: 10,000 are too few for 251."""
    errors = {f"bad{n}": [4] * 20 for n in range(18)} | {f"good{n}": [1] * 20 for n in range(18)}
    found = significance.compare_models(given_rows(tmp_path, errors), tmp_path)
    assert len(found) == 36 * 35 // 2
    clear = [c["p_holm"] for c in found if c["difference"]]
    assert len(clear) == 18 * 18 and max(clear) < significance.LEVEL


def test_holm() -> None:
    assert significance.holm([0.01, None, 0.04, 0.03]) == pytest.approx([0.03, None, 0.06, 0.06])
    assert significance.holm([0.9, 0.8]) == [1.0, 1.0]


def test_a_single_utterance(tmp_path: Path) -> None:
    rows = given_rows(tmp_path, {"one": [1], "other": [2]})
    (comparison,) = significance.compare_models(rows, tmp_path)
    assert (comparison["difference"], comparison["p"], comparison["p_holm"]) == (0.1, None, None)
    assert "[no interval] | – | – |" in tables.markdown(tables.significance_table([comparison], "CER"))
    figures.save(figures.chunk_width_figure, rows, tmp_path / "figure")


def test_worst_utterances(tmp_path: Path) -> None:
    rows = given_rows(tmp_path, {"one": [0, 2, 0, 1], "other": [0, 3, 4, 0]})
    worst = list(page.worst_utterances(rows, tmp_path))
    assert [(u.id, [errors for _, errors, _ in u.heard]) for u in worst] == [
        ("u01", [2, 3]),
        ("u02", [0, 4]),
        ("u03", [1, 0]),
    ]
    assert worst[0].heard[0][2][:3] == [("del", "あ", ""), ("del", "い", ""), ("same", "う", "う")]


def test_panels_and_lines() -> None:
    usual = {"unit": "word", "interval_low": 0.01, "interval_high": 0.04, "error_rate": 0.02, "state_bytes": 10_000}
    rows = [
        usual | {"cuts": cuts, "model": model, "chunk_ms": chunk, "left_frames": left, "asked_left_frames": [left]}
        for cuts in ("a", "b", "c", "d")
        for model, left in (("m", 64), ("m", 128), ("n", 0))
        for chunk in (160, 320)
    ]
    figure = figures.chunk_width_figure(rows)
    assert [axes.get_title() for axes in figure.axes] == ["a", "b", "c", "d"]
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["m, left context 1280 ms", "m, left context 2560 ms", "n, no left context"]
    line = figure.axes[3].containers[2].lines[0]
    assert list(line.get_ydata()) == [2.0, 2.0] and line.get_xdata() == pytest.approx([160, 320], rel=0.1)
