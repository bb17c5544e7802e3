"""ScaledAdam against golden trajectories, and the properties that a training run relies on."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ssm_asr.training import optim
from ssm_asr.training.optim import ScaledAdam

GOLDEN = np.load(Path(__file__).parent.parent / "golden" / "optim.npz")
NAMES = ("a.weight", "b.weight", "a.bias", "scale", "log_scale")


def golden_params(run: int = 0) -> dict[str, Tensor]:
    return {n: torch.nn.Parameter(torch.tensor(GOLDEN[f"run{run}/init/{n}"])) for n in NAMES}


def train(optimizer: ScaledAdam, params: dict[str, Tensor], run: int = 0, first: int = 1, last: int = 120) -> None:
    """Steps first..last of a golden run, from its gradients."""
    for step in range(first, last + 1):
        for name, p in params.items():
            p.grad = torch.tensor(GOLDEN[f"run{run}/noise/{name}"][step - 1]) + 0.5 * p.detach()
        optimizer.step()


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("row_elements", [optim.ROW_ELEMENTS, 8])  # 8: the tensors span up to 16 rows
@pytest.mark.parametrize(("run", "clipping_scale"), [(0, 2.0), (1, None)])
def test_golden(run: int, clipping_scale: float | None, row_elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optim, "ROW_ELEMENTS", row_elements)
    params = golden_params(run)
    optimizer = ScaledAdam(params.values(), lr=0.03, clipping_scale=clipping_scale)
    done = 0
    for step in (1, 2, 4, 8, 30, 61, 120):
        train(optimizer, params, run, first=done + 1, last=step)
        done = step
        for name, p in params.items():
            want = torch.tensor(GOLDEN[f"run{run}/step{step}/{name}"])
            torch.testing.assert_close(p.detach(), want, rtol=0, atol=6e-8)
    statistics = optimizer.statistics()
    assert statistics["clipped_fraction"] == (0.02 if run == 0 else 0.0)  # the two outliers of the run
    assert statistics["nonfinite_steps"] == 0


@pytest.mark.parametrize("stop", [1, 30, 60])  # 30: amid a size update's period
def test_resume_is_exact(stop: int) -> None:
    straight = golden_params()
    train(ScaledAdam(straight.values()), straight)

    params = golden_params()
    optimizer = ScaledAdam(params.values())
    train(optimizer, params, last=stop)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    resumed = ScaledAdam(params.values(), lr=1.0)  # the loaded rate counts
    resumed.load_state_dict(torch.load(file, weights_only=True))
    train(resumed, params, first=stop + 1)
    assert_same(params, straight)


def test_loaded_state_is_a_copy() -> None:
    params = golden_params()
    optimizer = ScaledAdam(params.values())
    train(optimizer, params, last=20)
    saved = {n: p.detach().clone() for n, p in params.items()}
    other = golden_params()
    resumed = ScaledAdam(other.values())
    resumed.load_state_dict(optimizer.state_dict())
    train(optimizer, params, first=21)
    with torch.no_grad():
        for name, p in other.items():
            p.copy_(saved[name])
    train(resumed, other, first=21)
    assert_same(other, params)


def test_load_refuses_another_models_state() -> None:
    params = golden_params()
    optimizer = ScaledAdam(params.values())
    train(optimizer, params, last=1)
    other = ScaledAdam([torch.nn.Parameter(torch.ones(3)) for _ in params])
    with pytest.raises(ValueError, match=r"parameter 0: delta has shape \(8, 16\)"):
        other.load_state_dict(optimizer.state_dict())


def test_parameter_without_gradient() -> None:
    """None counts as zero: a parameter without gradients stays put, one that lacks them at times moves on."""
    runs = []
    for missing in (lambda p: None, torch.zeros_like):
        params = {
            **golden_params(),
            "unused": torch.nn.Parameter(torch.randn(7, generator=torch.manual_seed(0))),
        }
        optimizer = ScaledAdam(params.values())
        for step in range(40):
            for name, p in params.items():
                absent = name == "unused" or (name == "b.weight" and step % 3)
                p.grad = missing(p) if absent else torch.tensor(GOLDEN[f"run0/noise/{name}"][step])
            optimizer.step()
        runs.append(params)
    assert_same(runs[0], runs[1])
    assert torch.equal(runs[0]["unused"], torch.randn(7, generator=torch.manual_seed(0)))
    assert not torch.equal(runs[0]["b.weight"], golden_params()["b.weight"])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("clipping_scale", [2.0, None])
def test_nonfinite_gradient_skips_the_step(bad: float, clipping_scale: float | None) -> None:
    params = golden_params()
    optimizer = ScaledAdam(params.values(), clipping_scale=clipping_scale)
    for step in range(1, 45):
        before = {n: p.detach().clone() for n, p in params.items()}
        for name, p in params.items():
            p.grad = torch.tensor(GOLDEN[f"run0/noise/{name}"][step])
        if step in (1, 12, 40):
            params["a.weight"].grad[3, 5] = bad
        optimizer.step()
        if step in (1, 12, 40):
            assert_same(params, before)
        else:
            assert not torch.equal(params["a.weight"], before["a.weight"])
    assert optimizer.statistics()["nonfinite_steps"] == 3
    assert all(p.isfinite().all() for p in params.values())


def test_lr_scale_of_a_group() -> None:
    scaled, plain = golden_params(1), golden_params(1)
    groups: list[dict[str, Any]] = [
        {"params": [scaled["a.weight"]], "lr_scale": 0.25},
        {"params": [p for n, p in scaled.items() if n != "a.weight"]},
    ]
    train(ScaledAdam(groups, lr=0.04, clipping_scale=None), scaled, 1, last=50)
    for name, lr in (
        ("a.weight", 0.01),
        ("b.weight", 0.04),
        ("scale", 0.04),
    ):  # without clipping each is alone
        alone = {name: plain[name]}
        train(ScaledAdam(alone.values(), lr=lr, clipping_scale=None), alone, 1, last=50)
        assert torch.equal(scaled[name], plain[name]), name


def test_memory_format_does_not_matter() -> None:
    runs = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        values = torch.randn(13, 8, 4, 3, 3, dtype=torch.float64)
        p = torch.nn.Parameter(values[0].to(memory_format=memory_format))
        optimizer = ScaledAdam([p], clipping_scale=None)
        for p.grad in values[1:]:
            optimizer.step()
        runs.append(p.detach())
    torch.testing.assert_close(runs[0], runs[1], rtol=0, atol=1e-14)  # the order of the sums differs


def test_size_step_limits() -> None:
    """Four equal gradients give a step of 4 lr, up to 0.1; the rms ends at 3 at most; tiny, scalar: 0."""
    sizes = (1.0, 2.9, 4.0, 1e-6)
    flat = optim._FlatGroup([torch.full((50,), x) for x in sizes] + [torch.ones(1)], 4, 0.1)
    for lr, wanted in ((0.01, (0.04, 0.1 / 2.9, -0.25, 0.0, 0.0)), (1.0, (0.1, 0.1 / 2.9, -0.25, 0.0, 0.0))):
        flat.size_exp_avg_sq_T.zero_()
        flat.size_grads_PT.fill_(-1.0)
        torch.testing.assert_close(flat.size_step(1, lr, 0.98, 1e-8), torch.tensor(wanted))


def test_scalars_stay_within_ten() -> None:
    params = [torch.nn.Parameter(torch.ones(1)), torch.nn.Parameter(torch.tensor(-1.0))]
    optimizer = ScaledAdam(params, lr=0.5)
    for _ in range(300):
        params[0].grad, params[1].grad = -torch.ones(1), torch.tensor(1.0)
        optimizer.step()
    assert [p.item() for p in params] == [10.0, -10.0]


def test_zero_tensor_starts_moving() -> None:
    p = torch.nn.Parameter(torch.zeros(4))
    optimizer = ScaledAdam([p], lr=0.5)
    for _ in range(300):
        p.grad = -torch.ones(4)
        optimizer.step()
    assert p.isfinite().all() and p.min() > 1e-3


def test_ops_do_not_grow_with_tensors() -> None:
    class Count(TorchDispatchMode):
        ops = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.ops += 1
            return func(*args, **(kwargs or {}))

    counts = []
    for tensors in (3, 300):
        params = [torch.nn.Parameter(torch.randn(1 + i % 9, 5)) for i in range(tensors)]
        optimizer = ScaledAdam(params)
        for p in params:
            p.grad = torch.ones_like(p)
        for _ in range(3):
            optimizer.step()
        with Count() as count:
            optimizer.step()  # the fourth: with the update of the sizes
        counts.append(count.ops)
    assert counts[0] == counts[1] < 100


def test_mixed_group_is_refused() -> None:
    params = [torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2, dtype=torch.float64))]
    for p in params:
        p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match=r"mixes torch\.float32 on cpu, torch\.float64 on cpu"):
        ScaledAdam(params).step()
