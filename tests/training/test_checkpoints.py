"""Checkpoints are written beside training: as the state was when they were saved, and never silently not."""

from pathlib import Path

import pytest
import torch
import toy
from torch import nn

from ssm_asr import checkpoint
from ssm_asr.data.tokens import train_tokenizer
from ssm_asr.training.averaging import RunningAverage
from ssm_asr.training.distributed import Place
from ssm_asr.training.optim import ScaledAdam
from ssm_asr.training.resume import Checkpoints
from ssm_asr.training.state import TrainingState

TOKENIZER = train_tokenizer(["A B"], "word")


def _state() -> TrainingState:
    model = nn.Linear(3, 2)
    model.weight.grad, model.bias.grad = torch.ones(2, 3), torch.ones(2)
    optimizer = ScaledAdam(model.parameters())
    optimizer.step()
    return TrainingState(model, optimizer, torch.amp.GradScaler("cpu", enabled=False), RunningAverage(1))  # type: ignore[arg-type]


def _checkpoints(directory: Path) -> Checkpoints:
    place = Place(0, 1, torch.device("cpu"))
    return Checkpoints(directory, toy.experiment(train={"keep_checkpoints": 2}), TOKENIZER, "data", place)


def test_a_checkpoint_holds_the_state_of_its_moment(tmp_path: Path) -> None:
    state, checkpoints = _state(), _checkpoints(tmp_path)
    saved = []
    for batch in range(5):
        state.progress.batch = batch
        saved.append(state.model.weight.detach().clone())
        checkpoints.save_to_resume(state)
        with torch.no_grad():
            state.model.weight += 1.0
        state.optimizer.step()
    checkpoints.finish()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-3.pt", "checkpoint-4.pt"]
    for batch in (3, 4):
        loaded = checkpoint.load(tmp_path / f"checkpoint-{batch}.pt")
        assert torch.equal(loaded["model"]["weight"], saved[batch])
        assert loaded["progress"]["batch"] == batch and loaded["training"]["optimizer"]["step"] == batch + 1


def test_a_file_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    state, checkpoints = _state(), _checkpoints(tmp_path / "file" / "below")
    (tmp_path / "file").write_text("no directory")
    checkpoints.save(state, "epoch-1.pt")
    with pytest.raises((checkpoint.CheckpointError, OSError)):
        checkpoints.finish()
