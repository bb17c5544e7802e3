"""When batches are skipped, and when a run gives up."""

import json
import math
from pathlib import Path

import pytest

from ssm_asr.training import TrainingError
from ssm_asr.training.guard import LEAST_LOSS_SCALE, MAX_BAD_BATCHES, Guard

INF, NAN = math.inf, math.nan


@pytest.fixture
def guard(tmp_path: Path) -> Guard:
    return Guard(tmp_path, world_size=2)


@pytest.mark.parametrize(
    ("losses", "unalignable", "bad"),
    [
        ([3.0, 2.0], 0, False),
        ([3.0, INF], 1, False),  # The other utterance is trained on.
        ([INF, INF], 2, True),
        ([3.0, NAN], 0, True),
        ([3.0, -INF], 0, True),
        ([NAN, INF], 1, True),
    ],
)
def test_batches_are_skipped(guard: Guard, tmp_path: Path, losses: list[float], unalignable: int, bad: bool) -> None:
    assert guard.check_losses(losses, ["a", "b"], batch=7) == (unalignable, bad)
    assert (tmp_path / "bad_batches.jsonl").exists() == bad


def test_records_are_plain_json(guard: Guard, tmp_path: Path) -> None:
    """Every line can be read by any program: JSON itself has no NaN and no infinity."""
    guard.check_losses([1.5, NAN, INF, -INF], ["a", "b", "c", "d"], batch=7)
    guard.check_losses([1.5], ["e"], batch=8)
    guard.check_losses([INF], ["f"], batch=9)

    def refuse(constant: str) -> None:
        raise ValueError(constant)

    lines = (tmp_path / "bad_batches.jsonl").read_text().splitlines()
    assert [json.loads(line, parse_constant=refuse) for line in lines] == [
        {"batch": 7, "losses": [1.5, "nan", "inf", "-inf"], "ids": ["a", "b", "c", "d"]},
        {"batch": 9, "losses": ["inf"], "ids": ["f"]},
    ]


def test_it_gives_up_after_many_bad_steps_in_a_row(guard: Guard, tmp_path: Path) -> None:
    for _ in range(3):
        for _ in range(MAX_BAD_BATCHES - 1):
            guard.check_step(bad_batches=2)
        guard.check_step(bad_batches=1)  # One of the two processes had a good batch, and the count begins anew.
    for _ in range(MAX_BAD_BATCHES - 1):
        guard.check_step(bad_batches=2)
    with pytest.raises(
        TrainingError, match=f"^{tmp_path}: 20 batches in a row had no finite loss .*; lower optim.base"
    ):
        guard.check_step(bad_batches=2)


def test_it_gives_up_when_no_gradient_is_finite(guard: Guard, tmp_path: Path) -> None:
    """It is asked every 8 batches here; 5 of the first 8 steps were left out, and from then on all."""
    guard.check_gradients(batch=8, nonfinite_steps=5)
    guard.check_gradients(batch=16, nonfinite_steps=13)
    guard.check_gradients(batch=24, nonfinite_steps=21)
    with pytest.raises(TrainingError, match=f"^{tmp_path}: none of the last 24 batches had a finite gradient; lower"):
        guard.check_gradients(batch=32, nonfinite_steps=29)


def test_a_single_step_is_enough(guard: Guard) -> None:
    guard.check_gradients(batch=8, nonfinite_steps=8)
    for batch in range(20, 1000, 20):  # One step in 20 is made.
        guard.check_gradients(batch, nonfinite_steps=batch - batch // 20)


def test_a_resumed_run_is_not_held_responsible_for_the_batches_before(guard: Guard) -> None:
    guard.check_gradients(batch=5000, nonfinite_steps=5000)
    guard.check_gradients(batch=5010, nonfinite_steps=5010)
    with pytest.raises(TrainingError, match="none of the last 20 batches"):
        guard.check_gradients(batch=5020, nonfinite_steps=5020)


def test_it_gives_up_when_gradients_overflow_fp16(guard: Guard, tmp_path: Path) -> None:
    guard.check_gradients(batch=8, nonfinite_steps=0, loss_scale=LEAST_LOSS_SCALE)
    with pytest.raises(TrainingError, match=f"^{tmp_path}: gradients overflow fp16, .* 1e-05, too; use train.precis"):
        guard.check_gradients(batch=16, nonfinite_steps=0, loss_scale=LEAST_LOSS_SCALE / 2)
