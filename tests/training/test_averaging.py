"""The running average against plain means of snapshots."""

import io

import pytest
import torch
from torch import Tensor, nn

from ssm_asr.training.averaging import RunningAverage, average_between


class Model(nn.Module):
    """Weights and buffers of several types; set() gives it the n-th of a series of values."""

    steps: Tensor
    mask: Tensor
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.register_buffer("steps", torch.tensor(0))
        self.register_buffer("mask", torch.tensor([True, False]))
        self.register_buffer("scale", torch.ones(2))

    def set(self, n: int) -> None:
        generator = torch.Generator().manual_seed(n)
        with torch.no_grad():
            for p in [*self.parameters(), self.scale]:
                p.copy_(100 + torch.randn(p.shape, generator=generator))
        self.steps.fill_(n)


def snapshot_mean(batches: list[int]) -> dict[str, Tensor]:
    sums: dict[str, Tensor] = {}
    for batch in batches:
        model = Model()
        model.set(batch)
        for name, value in model.state_dict().items():
            sums[name] = sums.get(name, 0) + value.double() / len(batches)
    return sums


def run(batches: range, average: RunningAverage) -> None:
    model = Model()
    for batch in batches:
        model.set(batch)
        average.update(model, batch)


def assert_mean(result: dict[str, Tensor], batches: list[int]) -> None:
    for name, want in snapshot_mean(batches).items():
        if name in ("steps", "mask"):
            continue
        assert result[name].dtype == torch.float32
        torch.testing.assert_close(result[name], want.float(), rtol=2e-7, atol=0)  # an ulp of float32
    assert result["steps"].equal(torch.tensor(batches[-1]))
    assert result["mask"].equal(torch.tensor([True, False]))


def test_mean_of_all() -> None:
    average = RunningAverage(period=3)
    run(range(1, 32), average)
    assert average.state_dict()["count"] == 10
    assert_mean(average_between(None, average.state_dict()), list(range(3, 31, 3)))


def test_mean_between() -> None:
    average = RunningAverage(period=2)
    run(range(1, 21), average)
    start = average.state_dict()
    run(range(21, 31), average)
    assert_mean(average_between(start, average.state_dict()), [22, 24, 26, 28, 30])
    assert_mean(average_between(RunningAverage().state_dict(), start), list(range(2, 21, 2)))


def test_result_fits_the_model() -> None:
    average = RunningAverage(period=1)
    run(range(1, 4), average)
    model = Model()
    model.load_state_dict(average_between(None, average.state_dict()))
    assert model.steps == 3


def test_resume_is_exact() -> None:
    straight = RunningAverage(period=1)
    run(range(1, 21), straight)
    first = RunningAverage(period=1)
    run(range(1, 11), first)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    resumed = RunningAverage(period=1)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    run(range(11, 21), resumed)
    run(range(11, 14), first)  # leaves what it saved, and so the resumed one, alone
    for name, want in straight.state_dict()["mean"].items():
        assert resumed.state_dict()["mean"][name].equal(want), name


def test_errors() -> None:
    average = RunningAverage(period=1)
    run(range(1, 3), average)
    state = average.state_dict()
    with pytest.raises(ValueError, match="no average between 2 and 2 updates"):
        average_between(state, state)
    other = {"count": 1, "mean": {"weight": torch.ones(1)}}
    with pytest.raises(ValueError, match=r"different models: linear\.bias"):
        average_between(other, state)
    with pytest.raises(ValueError, match="period of 0 batches"):
        RunningAverage(0)
