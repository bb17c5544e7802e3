"""The sweep: what is in a grid, what its runs leave behind, and when a difference is called one."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import toy
import yaml

from ssm_asr.config import load_experiment, to_yaml
from ssm_asr.evaluation.results import write_results
from ssm_asr.evaluation.scoring import bootstrap_interval

ROOT = Path(__file__).parent.parent.parent
TOOL = ROOT / "research" / "sweep.py"


@pytest.fixture(scope="module")
def sweep() -> ModuleType:
    spec = importlib.util.spec_from_file_location("sweep", TOOL)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["sweep"] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def write_grid(directory: Path, **changes: Any) -> Path:
    (directory / "base.yaml").write_text(to_yaml(toy.experiment(train={"num_epochs": 1})), encoding="utf-8")
    tree = {
        "config": "base.yaml",
        "seeds": [1, 2],
        "baseline": "mild rnnt=regular",
        "groups": [
            {"name": "mild rnnt={rnnt_type}", "axes": {"model.rnnt_type": ["regular", "odd"]}},
            {"name": "no chunk", "set": {"decode.chunk_frames": 3}},
        ],
    }
    path = directory / "grid.yaml"
    path.write_text(yaml.safe_dump(tree | changes), encoding="utf-8")
    return path


def run_tool(grid: Path, corpus: toy.Corpus, out: Path, *more: str) -> subprocess.CompletedProcess:
    data = [f"--train-cuts={corpus.train_cuts}", f"--valid-cuts={corpus.valid_cuts}", f"--tokens={corpus.tokens}"]
    command = [sys.executable, str(TOOL), f"--grid={grid}", *data, f"--test-cuts={corpus.valid_cuts}", f"--out={out}"]
    return subprocess.run([*command, "--device=cpu", "--jobs=1", *more], capture_output=True, text=True, timeout=300)


def test_a_sweep_from_end_to_end(tmp_path: Path) -> None:
    corpus, grid, out = toy.Corpus(tmp_path, num_train=8, num_valid=2), write_grid(tmp_path), tmp_path / "out"
    done = run_tool(grid, corpus, out)
    # One combination is refused by the configuration; one cell fails in decoding, and the others go on.
    assert done.returncode == 1, done.stderr
    assert "2 cells × 2 seeds: 4 runs, 0 finished before" in done.stdout
    text = (out / "sweep-valid.md").read_text()
    assert text in done.stdout
    assert "left out: mild rnnt=odd: " in text and "model.rnnt_type is 'odd'" in text
    for seed in (1, 2):
        assert f"no-chunk-seed{seed}: failed (2): chunk of 3 frames" in text
        assert load_experiment(out / f"mild-rnnt-regular-seed{seed}" / "config.yaml").train.seed == seed
    (row,) = json.loads((out / "sweep-valid.json").read_text())["cells"]
    assert row["name"] == "mild rnnt=regular" and set(row["rates"]) == {"1", "2"} and row["verdict"] == "baseline"
    summary = json.loads((out / "mild-rnnt-regular-seed2" / "decode-valid" / "summary.json").read_text())
    assert row["rates"]["2"] == summary["error_rate"]
    assert (out / "sweep-valid.png").stat().st_size > 5000 and "<svg" in (out / "sweep-valid.svg").read_text()
    # What is finished is not done again; what is not, is tried again unless only the table is wanted.
    weights = out / "mild-rnnt-regular-seed1" / "averaged.pt"
    before = weights.stat().st_mtime_ns
    again = run_tool(grid, corpus, out, "--table-only")
    assert again.returncode == 0 and "4 runs, 2 finished before" in again.stdout
    assert weights.stat().st_mtime_ns == before
    other = run_tool(grid, corpus, out, "--set=optim.base_lr=0.01")
    assert other.returncode == 2 and "holds a run with other settings" in other.stderr


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": 3}, "not a grid with config, seeds, baseline and named groups"),
        ({"groups": [{"set": {}}]}, "not a grid with .* \\('name'\\)"),
        ({"seeds": []}, "give seeds"),
        ({"groups": [{"name": "x", "axes": {"train.seed": [1, 2]}}]}, "no cells are named alike"),
        ({"baseline": "none"}, "no cell is named like the baseline 'none'; give one of mild rnnt=regular, no chunk"),
        ({"groups": [{"name": "x {seed}", "axes": {"train.sed": [1]}}]}, "has {seed}, which is none of its axes"),
        ({"groups": [{"name": "x", "set": {"train.sed": 1}}]}, "nothing is left of group 'x': x: .*did you mean seed"),
    ],
)
def test_what_is_no_grid_is_refused(sweep: ModuleType, tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sweep.read_grid(write_grid(tmp_path, **changes), [])


def test_the_grid_of_the_recipe(sweep: ModuleType) -> None:
    """State sizes N × ways × parameterisations, against convolutions and no mixer; lin has no N = 1."""
    grid = sweep.read_grid(ROOT / "egs/librispeech/conf/grids/ssmformer_tiny.yaml", ["train.num_epochs=2"])
    assert len(grid.cells) == 1 + 5 + 3 * (5 + 4) == 33 and len(grid.seeds) == 3
    assert [reason.partition(":")[0] for reason in grid.left_out] == [f"{way} lin N=1" for way in ("dir", "com", "rep")]
    encoders = {cell.name: cell.experiment.model.encoder for cell in grid.cells}
    assert (encoders["com lin N=8"].mixer, encoders["com lin N=8"].ssm_param) == ("com", "lin")
    assert {e.conv_kernel for e in encoders.values() if e.mixer == "com"} == {4}
    assert {e.rep_length for e in encoders.values() if e.mixer == "rep"} == {16}
    assert sorted({cell.x for cell in grid.cells if cell.series == "conv"}) == [2, 4, 8, 16, 32]
    assert all(cell.experiment.train.num_epochs == 2 for cell in grid.cells)


def test_resampling(sweep: ModuleType) -> None:
    rng = np.random.default_rng(5)
    errors_SU, totals_U = rng.poisson(1.0, (3, 60)).astype(float), rng.integers(1, 9, 60).astype(float)
    draws_RU = rng.multinomial(60, [1 / 60] * 60, size=4000).astype(float)
    one = sweep.resampled_rates(errors_SU[:1], totals_U, draws_RU, 1)
    expected = bootstrap_interval(errors_SU[0].astype(int), totals_U.astype(int))
    np.testing.assert_allclose(np.quantile(one, [0.025, 0.975]), expected, rtol=0.03)
    # Seeds that differ, on utterances that do not, spread as the mean of 3 drawn seeds does.
    level_S1 = np.array([[0.0], [1.0], [5.0]])
    seeds = sweep.resampled_rates(level_S1 * totals_U, totals_U, draws_RU, 1)
    assert abs(seeds.mean() - 2.0) < 0.1 and abs(seeds.var() - level_S1.var() / 3) < 0.1
    assert not np.array_equal(seeds, sweep.resampled_rates(level_S1 * totals_U, totals_U, draws_RU, 2))


def test_verdicts(sweep: ModuleType, tmp_path: Path) -> None:
    """Wrong words per utterance of each cell; the baseline has as many as `same`, on other utterances."""
    rng = np.random.default_rng(0)
    kinds = {"base": 0.2, "same": 0.2, "good": 0.02, "bad": 0.6}
    grid = sweep.read_grid(
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
            runs.append(sweep.Run(cell, seed, tmp_path, tmp_path / f"{cell.name}{seed}", ()))
    rows, resampled = sweep.make_rows(grid, runs, 10)
    assert [row["verdict"] for row in rows] == ["baseline", "tie", "better", "worse"]
    good = rows[2]
    assert good["mean"] == pytest.approx(np.mean(list(good["rates"].values())))
    assert good["low"] < good["mean"] < good["high"] < rows[0]["low"]
    low, high = good["difference_interval"]
    assert low < good["difference"] < high and good["difference"] == pytest.approx(good["mean"] - rows[0]["mean"])
    text = sweep.table(rows, grid, "test", ["exp/x: failed"])
    assert text.count("\n| ") == 5 and "- exp/x: failed" in text and "Of 3 comparisons" in text
    # Series are compared in the mean over what both have of the axis.
    for row, series, x in zip(rows, ["a", "b", "a", "b"], [1.0, 1.0, 2.0, 4.0], strict=True):
        row |= {"series": series, "x": x}
    (pair,) = sweep.compare_series(rows, resampled)
    assert pair["x"] == [1.0] and pair["verdict"] == "tie"
    rows[3]["x"] = 2.0  # now worse, too, by half of what "bad" is worse than "good"
    (pair,) = sweep.compare_series(rows, resampled)
    assert pair["x"] == [1.0, 2.0] and pair["verdict"] == "a better"
    assert pair["mean_b"] - pair["mean_a"] == pytest.approx((0.6 - 0.02) / 2, abs=0.03)
    low, high = pair["difference_interval"]
    assert low < pair["mean_b"] - pair["mean_a"] < high and "a better" in sweep.series_table([pair], "WER")
    # Without the baseline's results there are rates, but no verdicts.
    alone, _ = sweep.make_rows(grid, [run for run in runs if run.cell.name == "good"], 10)
    assert [row["verdict"] for row in alone] == ["baseline missing"]
