"""The files of a run are found, checked and set aside."""

from pathlib import Path

import pytest

from ssm_asr import checkpoint
from ssm_asr.training.experiment_dir import epochs, load_newest, resumable, set_aside


def test_files_are_found_by_number(tmp_path: Path) -> None:
    for name in ("checkpoint-9.pt", "checkpoint-10.pt", "checkpoint-best.pt", "checkpoint-10.pt.damaged", "epoch-2.pt"):
        (tmp_path / name).touch()
    assert [(n, path.name) for n, path in resumable(tmp_path).items()] == [
        (9, "checkpoint-9.pt"),
        (10, "checkpoint-10.pt"),
    ]
    assert list(epochs(tmp_path)) == [2]


def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = tmp_path / "checkpoint-4.pt"
    checkpoint.save({"format": checkpoint.FORMAT, "progress": {"batch": 4}, "filler": "x" * 2000}, whole)
    for number in (8, 12):
        (tmp_path / f"checkpoint-{number}.pt").write_bytes(whole.read_bytes()[:1000])
    assert load_newest(tmp_path)["progress"] == {"batch": 4}
    assert resumable(tmp_path) == {4: whole}
    assert (tmp_path / "checkpoint-12.pt.damaged").stat().st_size == 1000
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        f"{tmp_path}/checkpoint-{number}.pt: no checkpoint of this program, or a damaged one; was it copied whole?; "
        f"it is now checkpoint-{number}.pt.damaged, and training goes on from checkpoint-4.pt"
        for number in (12, 8)
    ]


def test_a_directory_without_checkpoints_has_no_newest(tmp_path: Path) -> None:
    assert load_newest(tmp_path) is None and load_newest(tmp_path / "missing") is None


def test_a_run_is_set_aside_whole(tmp_path: Path) -> None:
    for path in ("epoch-1.pt", "tensorboard/events", ".stages/train", "superseded-1/epoch-1.pt"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(path)
    assert set_aside(tmp_path) == tmp_path / "superseded-2"
    files = {str(path.relative_to(tmp_path)): path.read_text() for path in tmp_path.rglob("*") if path.is_file()}
    assert files == {
        "superseded-2/epoch-1.pt": "epoch-1.pt",
        "superseded-2/tensorboard/events": "tensorboard/events",
        ".stages/train": ".stages/train",
        "superseded-1/epoch-1.pt": "superseded-1/epoch-1.pt",
    }
