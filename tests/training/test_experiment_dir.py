"""The files of a run are found, checked and set aside."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from ssm_asr import checkpoint
from ssm_asr.training.experiment_dir import claim, epochs, load_newest, resumable, set_aside


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


CLAIM = """
import sys, time
from pathlib import Path
from ssm_asr.training.experiment_dir import claim
claimed = claim(Path(sys.argv[1]))
print("claimed", flush=True)
time.sleep(60)
"""


def test_one_run_at_a_time(tmp_path: Path) -> None:
    """A claim ends with its process, even with one that is killed."""
    exp_dir = tmp_path / "exp"
    first = subprocess.Popen([sys.executable, "-c", CLAIM, str(exp_dir)], stdout=subprocess.PIPE, text=True)
    assert first.stdout is not None and first.stdout.readline() == "claimed\n"
    with pytest.raises(
        ValueError, match=rf"^{exp_dir}: process {first.pid} on {socket.gethostname()}, since 20.*, trains"
    ):
        claim(exp_dir)
    first.kill()
    first.wait()
    with claim(exp_dir) as file:
        file.seek(0)
        assert json.load(file)["process"] == os.getpid()
        (exp_dir / "config.yaml").touch()
        assert set_aside(exp_dir).name == "superseded-1"  # and the claim stays where it is
        with pytest.raises(ValueError, match=f"process {os.getpid()} on .* trains here now; stop it, or give another"):
            claim(exp_dir)
    claim(exp_dir).close()


def test_a_claim_that_cannot_be_read_is_one(tmp_path: Path) -> None:
    with claim(tmp_path):
        (tmp_path / ".run").write_text("{")
        with pytest.raises(ValueError, match="another process trains here now"):
            claim(tmp_path)
