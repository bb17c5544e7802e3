"""What a run finds in its directory: its own checkpoints, or another run."""

from pathlib import Path

import pytest
import toy

from ssm_asr import checkpoint
from ssm_asr.checkpoint import CheckpointError
from ssm_asr.config import Experiment, to_dict
from ssm_asr.training.experiment_dir import resumable
from ssm_asr.training.resume import make_ready


def leave(exp_dir: Path, name: str, experiment: Experiment, data: str = "data", epoch: int = 1) -> Path:
    """A file as a run leaves it, without weights."""
    tree = {
        "format": checkpoint.FORMAT,
        "config": to_dict(experiment),
        "training": {"data": data},
        "progress": {"epoch": epoch},
    }
    checkpoint.save(tree, exp_dir / name)
    return exp_dir / name


def test_what_a_killed_run_was_writing_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".checkpoint-3.pt.part").touch()
    make_ready(tmp_path, toy.experiment(), "data")
    assert list(tmp_path.iterdir()) == []


def test_the_same_run_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_ready(tmp_path / "new", toy.experiment(), "data")
    assert list((tmp_path / "new").iterdir()) == []
    files = {leave(tmp_path, name, toy.experiment()) for name in ("checkpoint-4.pt", "epoch-1.pt")}
    make_ready(tmp_path, toy.experiment(train={"num_epochs": 9}, data={"num_workers": 3}), "data")
    assert files < set(tmp_path.iterdir())
    assert capsys.readouterr().out == ""


def test_other_settings_may_change_on_the_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    leave(tmp_path, "checkpoint-4.pt", toy.experiment(train={"num_epochs": 9}), epoch=9)
    now = toy.experiment(train={"num_epochs": 9, "precision": "bf16"}, data={"spec_augment": {"num_time_masks": 1}})
    make_ready(tmp_path, now, "data")
    assert resumable(tmp_path)
    assert "training goes on with other settings: " in (out := capsys.readouterr().out)
    assert "train.precision float32 -> bf16" in out and "data.spec_augment.num_time_masks" in out


@pytest.mark.parametrize("settings, anew", [({"seed": 7}, True), ({"num_epochs": 8}, False), ({"log_every": 7}, False)])
def test_a_finished_run_of_other_settings_is_set_aside(
    tmp_path: Path, settings: dict[str, int], anew: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    leave(tmp_path, "checkpoint-4.pt", toy.experiment(train={"num_epochs": 9}), epoch=10)
    make_ready(tmp_path, toy.experiment(train={"num_epochs": 9, **settings}), "data")
    assert bool(resumable(tmp_path)) != anew
    assert (
        "held a finished run of other settings (train.seed 42 -> 7), which is now" in capsys.readouterr().out
    ) == anew


def test_nothing_is_begun_anew_if_all_checkpoints_are_damaged(tmp_path: Path) -> None:
    leave(tmp_path, "epoch-1.pt", toy.experiment())
    (tmp_path / "checkpoint-4.pt").write_text("damaged")
    with pytest.raises(CheckpointError, match=r"no checkpoint to resume from can be read \(.*checkpoint-4.pt: no "):
        make_ready(tmp_path, toy.experiment(), "data")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-4.pt", "epoch-1.pt"]


@pytest.mark.parametrize("other", ["model", "tokens", "data", "version", "no checkpoint to resume from"])
def test_another_run_is_set_aside(tmp_path: Path, other: str, capsys: pytest.CaptureFixture[str]) -> None:
    now, data = toy.experiment(), "data"
    name = "checkpoint-4.pt"
    if other == "model":
        now = toy.experiment(model={"ctc": False})
    elif other == "tokens":
        now = toy.experiment(tokens={"kind": "char"})
    elif other == "data":
        data = "other data"
    elif other == "no checkpoint to resume from":
        name = "epoch-1.pt"
    old = leave(tmp_path, name, toy.experiment())
    if other == "version":
        checkpoint.save({**checkpoint.load(old), "config": {"model": {"depth": 3}}}, old)
    for extra in (tmp_path / "decode-test" / "summary.json", tmp_path / ".stages" / "train"):
        extra.parent.mkdir()
        extra.write_text("{}")
    content = old.read_bytes()
    (tmp_path / "superseded-2").mkdir()  # the first was deleted

    make_ready(tmp_path, now, data)
    assert {path.name for path in tmp_path.iterdir()} == {".stages", "superseded-1", "superseded-2"}
    assert (tmp_path / "superseded-1" / name).read_bytes() == content
    assert (tmp_path / "superseded-1" / "decode-test" / "summary.json").exists()
    out = capsys.readouterr().out
    assert out.startswith(f"{tmp_path}: held a run ") and out.endswith("superseded-1; training starts anew\n")

    leave(tmp_path, "checkpoint-1.pt", toy.experiment(model={"predictor_dim": 64}))
    make_ready(tmp_path, now, data)
    assert (tmp_path / "superseded-3" / "checkpoint-1.pt").exists()
