"""A sweep reads grids, trains and compares their cells, and calls a difference one only where it is."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import toy
import yaml

from research import sweep
from research.sweep_plan import Run, read_grid
from research.sweep_rates import compare_series, make_rows, resampled_rates
from research.sweep_report import series_table, table
from ssm_asr.config import load_experiment, to_yaml
from ssm_asr.evaluation.results import write_results
from ssm_asr.evaluation.scoring import bootstrap_interval

ROOT = Path(__file__).parent.parent.parent


def write_grid(directory: Path, **changes: Any) -> Path:
    (directory / "base.yaml").write_text(to_yaml(toy.experiment(train={"num_epochs": 1})), encoding="utf-8")
    tree = {
        "config": "base.yaml",
        "seeds": [1, 2],
        "baseline": "mild rnnt=regular",
        "groups": [
            {"name": "mild rnnt={rnnt_type}", "axes": {"model.rnnt_type": ["regular", "odd"]}},
            {"name": "other tokens", "set": {"tokens.kind": "char"}},
        ],
    }
    path = directory / "grid.yaml"
    path.write_text(yaml.safe_dump(tree | changes), encoding="utf-8")
    return path


def arguments_for(grid: Path, corpus: toy.Corpus, out: Path) -> list[str]:
    data = [f"--train-cuts={corpus.train_cuts}", f"--valid-cuts={corpus.valid_cuts}", f"--tokens={corpus.tokens}"]
    return [
        f"--grid={grid}",
        *data,
        f"--test-cuts={corpus.valid_cuts}",
        f"--out={out}",
        "--device=cpu",
        "--jobs=2",
        "--seeds=2",
    ]


def run_by_path(arguments: list[str], cwd: Path) -> subprocess.CompletedProcess:
    """Runs the program by its path from another directory, where nothing says where the repository is."""
    command = [sys.executable, str(ROOT / "research" / "sweep.py"), *arguments]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


def test_a_sweep_from_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus, out = toy.Corpus(tmp_path, num_train=8, num_valid=2), tmp_path / "out"
    arguments = arguments_for(write_grid(tmp_path), corpus, out)
    done = run_by_path(arguments, tmp_path)
    # The configuration refuses one combination; one cell cannot be trained on these tokens, and the other goes on.
    assert done.returncode == 1, done.stderr
    assert "2 cells × 1 seeds: 2 runs, 0 finished before" in done.stdout
    text = (out / "sweep-valid.md").read_text()
    assert text in done.stdout
    assert "left out: mild rnnt=odd: " in text and "model.rnnt_type is 'odd'" in text
    assert f"other-tokens-seed2: failed (2): {corpus.tokens}: word tokens, but tokens.kind is char" in text
    assert load_experiment(out / "mild-rnnt-regular-seed2" / "config.yaml").train.seed == 2
    (row,) = json.loads((out / "sweep-valid.json").read_text())["cells"]
    assert row["name"] == "mild rnnt=regular" and set(row["rates"]) == {"2"} and row["verdict"] == "baseline"
    summary = json.loads((out / "mild-rnnt-regular-seed2" / "decode-valid" / "summary.json").read_text())
    assert row["rates"]["2"] == summary["error_rate"]
    assert (out / "sweep-valid.png").stat().st_size > 5000 and "<svg" in (out / "sweep-valid.svg").read_text()
    log = (out / "mild-rnnt-regular-seed2" / "log.txt").read_text()
    assert [line.split()[3] for line in log.splitlines() if line.startswith("$ python -m ")] == [
        "ssm_asr.train",
        "ssm_asr.average",
        "ssm_asr.decode",
    ]
    # A finished run is not done again; one that failed is tried again unless only the table is wanted.
    weights = out / "mild-rnnt-regular-seed2" / "averaged.pt"
    before = weights.stat().st_mtime_ns
    assert sweep.main([*arguments, "--table-only"]) == 0
    assert "2 runs, 1 finished before" in capsys.readouterr().out
    assert weights.stat().st_mtime_ns == before
    assert sweep.main([*arguments, "--set=optim.base_lr=0.01"]) == 2
    assert "holds a run with other settings" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": 3}, "not a grid with config, seeds, baseline and named groups"),
        ({"groups": [{"set": {}}]}, "not a grid with .* \\('name'\\)"),
        ({"seeds": []}, "give seeds"),
        ({"groups": [{"name": "x", "axes": {"train.seed": [1, 2]}}]}, "no cells are named alike"),
        (
            {"baseline": "none"},
            "no cell is named like the baseline 'none'; give one of mild rnnt=regular, other tokens",
        ),
        ({"groups": [{"name": "x {seed}", "axes": {"train.sed": [1]}}]}, "has {seed}, which is none of its axes"),
        ({"groups": [{"name": "x", "set": {"train.sed": 1}}]}, "nothing is left of group 'x': x: .*did you mean seed"),
    ],
)
def test_what_is_no_grid_is_refused(tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_grid(write_grid(tmp_path, **changes), [])


def test_the_grid_of_the_recipe() -> None:
    """Its cells are state sizes N × mixers × parameterisations, convolutions and no mixer; lin has no N = 1."""
    grid = read_grid(ROOT / "egs/librispeech/conf/grids/ssmformer_tiny.yaml", ["train.num_epochs=2"])
    assert len(grid.cells) == 1 + 5 + 3 * (5 + 4) == 33 and len(grid.seeds) == 3
    assert [reason.partition(":")[0] for reason in grid.left_out] == [f"{way} lin N=1" for way in ("dir", "com", "rep")]
    encoders = {cell.name: cell.experiment.model.encoder for cell in grid.cells}
    assert (encoders["com lin N=8"].mixer, encoders["com lin N=8"].ssm_param) == ("com", "lin")
    assert {e.conv_kernel for e in encoders.values() if e.mixer == "com"} == {4}
    assert {e.rep_length for e in encoders.values() if e.mixer == "rep"} == {16}
    assert sorted({cell.x for cell in grid.cells if cell.series == "conv"}) == [2, 4, 8, 16, 32]
    assert all(cell.experiment.train.num_epochs == 2 for cell in grid.cells)


def test_resampling() -> None:
    rng = np.random.default_rng(5)
    errors_SU, totals_U = rng.poisson(1.0, (3, 60)).astype(float), rng.integers(1, 9, 60).astype(float)
    draws_RU = rng.multinomial(60, [1 / 60] * 60, size=4000).astype(float)
    one = resampled_rates(errors_SU[:1], totals_U, draws_RU, 1)
    expected = bootstrap_interval(errors_SU[0].astype(int), totals_U.astype(int))
    np.testing.assert_allclose(np.quantile(one, [0.025, 0.975]), expected, rtol=0.03)
    # If seeds differ and utterances do not, the rates spread as the mean of 3 drawn seeds does.
    level_S1 = np.array([[0.0], [1.0], [5.0]])
    seeds = resampled_rates(level_S1 * totals_U, totals_U, draws_RU, 1)
    assert abs(seeds.mean() - 2.0) < 0.1 and abs(seeds.var() - level_S1.var() / 3) < 0.1
    assert not np.array_equal(seeds, resampled_rates(level_S1 * totals_U, totals_U, draws_RU, 2))


def test_verdicts(tmp_path: Path) -> None:
    """`kinds` has the share of wrong words of each cell; the baseline has as many as `same`, in other utterances."""
    rng = np.random.default_rng(0)
    kinds = {"base": 0.2, "same": 0.2, "good": 0.02, "bad": 0.6}
    grid = read_grid(
        write_grid(tmp_path, baseline="base", groups=[{"name": name} for name in kinds], seeds=[1, 2, 3]), []
    )
    refs = {f"u{k:03d}": "A B C D E" for k in range(100)}
    runs = []
    for cell in grid.cells:
        for seed in grid.seeds:
            wrong_UW = rng.random((len(refs), 5)) < kinds[cell.name]
            hyps = {
                i: " ".join("X" if wrong else w for wrong, w in zip(row, refs[i].split(), strict=True))
                for i, row in zip(refs, wrong_UW, strict=True)
            }
            write_results(tmp_path / f"{cell.name}{seed}", refs, hyps, "word", {})
            runs.append(Run(cell, seed, tmp_path, tmp_path / f"{cell.name}{seed}", ()))
    rows, resampled = make_rows(grid, runs, 10)
    assert [row["verdict"] for row in rows] == ["baseline", "tie", "better", "worse"]
    good = rows[2]
    assert good["mean"] == pytest.approx(np.mean(list(good["rates"].values())))
    assert good["low"] < good["mean"] < good["high"] < rows[0]["low"]
    low, high = good["difference_interval"]
    assert low < good["difference"] < high and good["difference"] == pytest.approx(good["mean"] - rows[0]["mean"])
    text = table(rows, grid, "test", ["exp/x: failed"])
    assert text.count("\n| ") == 5 and "- exp/x: failed" in text and "Of 3 comparisons" in text
    # Series are compared in the mean over the values of the axis that both have.
    for row, series, x in zip(rows, ["a", "b", "a", "b"], [1.0, 1.0, 2.0, 4.0], strict=True):
        row |= {"series": series, "x": x}
    (pair,) = compare_series(rows, resampled)
    assert pair["x"] == [1.0] and pair["verdict"] == "tie"
    rows[3]["x"] = 2.0  # now b is worse, by half of the difference between "bad" and "good"
    (pair,) = compare_series(rows, resampled)
    assert pair["x"] == [1.0, 2.0] and pair["verdict"] == "a better"
    assert pair["mean_b"] - pair["mean_a"] == pytest.approx((0.6 - 0.02) / 2, abs=0.03)
    low, high = pair["difference_interval"]
    assert low < pair["mean_b"] - pair["mean_a"] < high and "a better" in series_table([pair], "WER")
    # Without the baseline's results there are rates, but no verdicts.
    alone, _ = make_rows(grid, [run for run in runs if run.cell.name == "good"], 10)
    assert [row["verdict"] for row in alone] == ["baseline missing"]
