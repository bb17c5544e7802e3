"""The progress of a run, and its form in checkpoints."""

import io
import json
import math

import pytest
import torch

from ssm_asr.training.state import Progress

# Checkpoints of version 0.1 have this dictionary, with its entries in this order.
OF_VERSION_0_1 = {
    "batch": 14,
    "epoch": 3,
    "batch_in_epoch": 0,
    "audio_s": 39.09,
    "best_valid_loss": 0.3199,
    "skipped_utterances": 2,
    "bad_batches": 1,
    "valid_loss": 0.3302,
}


def test_a_dictionary_of_version_0_1_comes_back_as_it_was() -> None:
    again = Progress.from_dict(OF_VERSION_0_1).to_dict()
    assert json.dumps(again) == json.dumps(OF_VERSION_0_1)


def test_the_start_has_no_validation_loss() -> None:
    start = Progress().to_dict()
    assert list(start) == [name for name in OF_VERSION_0_1 if name != "valid_loss"]
    assert start["batch"] == 0 and start["epoch"] == 1 and start["best_valid_loss"] == math.inf
    assert Progress.from_dict(start) == Progress()


@pytest.mark.parametrize("loss", [0.0, 0.5, math.inf])
def test_any_validation_loss_is_kept(loss: float) -> None:
    assert Progress.from_dict(Progress(valid_loss=loss).to_dict()).valid_loss == loss


def test_unknown_entries_are_ignored() -> None:
    """Averaged checkpoints have one more entry, and later versions may have others."""
    assert Progress.from_dict({**OF_VERSION_0_1, "averaged_epochs": [1, 2]}) == Progress.from_dict(OF_VERSION_0_1)


def test_it_can_be_loaded_without_running_code() -> None:
    file = io.BytesIO()
    torch.save(Progress(valid_loss=0.5).to_dict(), file)
    file.seek(0)
    assert Progress.from_dict(torch.load(file, weights_only=True)) == Progress(valid_loss=0.5)
