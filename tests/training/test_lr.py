"""Eden against golden learning rates."""

from pathlib import Path

import numpy as np
import pytest
import torch

from ssm_asr.training.lr import Eden
from ssm_asr.training.optim import ScaledAdam

GOLDEN = np.load(Path(__file__).parent.parent / "golden" / "optim.npz")


def parameters() -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.ones(3))]


def test_golden() -> None:
    optimizer = ScaledAdam(parameters(), lr=0.045)
    scheduler = Eden(optimizer, lr_batches=7500, lr_epochs=3.5, warmup_batches=500, warmup_start=0.5)
    for epoch, batch, lr in GOLDEN["eden"]:
        assert scheduler.step(int(batch), epoch) == pytest.approx(lr, rel=1e-12)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(lr, rel=1e-12)


def test_training_starts_at_a_tenth() -> None:
    optimizer = ScaledAdam(parameters(), lr=0.045)
    assert Eden(optimizer, 7500, 3.5).step(0, 0) == pytest.approx(0.0045)


def test_base_rate_survives_resume() -> None:
    first = ScaledAdam(parameters(), lr=0.045)
    Eden(first, 7500, 3.5).step(4000, 3)
    second = ScaledAdam(parameters(), lr=0.045)
    second.load_state_dict(first.state_dict())
    assert Eden(second, 7500, 3.5).step(4000, 3) == first.param_groups[0]["lr"]
