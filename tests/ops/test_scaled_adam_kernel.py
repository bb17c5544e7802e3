"""ScaledAdam's Triton kernels against the plain form: on a GPU, or by Triton's interpreter."""

import pytest
import torch
from kernel_device import DEVICE

from ssm_asr.ops import dispatch
from ssm_asr.training import optim
from ssm_asr.training.optim import ScaledAdam

SHAPES = [(5, 30), (64,), (1,), (3, 7), (2,)]


@pytest.mark.parametrize("clipping_scale", [2.0, None])
def test_steps(clipping_scale, monkeypatch):
    """Steps with and without a change of sizes, one of them with a gradient that is not finite."""
    monkeypatch.setattr(optim, "ROW_ELEMENTS", 64)
    runs = []
    for use in (False, True):
        monkeypatch.setattr(dispatch, "use_kernels", lambda x, use=use: use)
        torch.manual_seed(1)
        params = [torch.nn.Parameter((torch.randn(shape) * 0.3).to(DEVICE)) for shape in SHAPES]
        optimizer = ScaledAdam(params, clipping_scale=clipping_scale)
        history = []
        for step in range(14):
            for param in params:
                param.grad = torch.randn(param.shape).to(DEVICE) * (100.0 if step == 12 else 1.0)
            if step == 6:
                params[1].grad[3] = torch.inf
            before = [x.detach().clone() for x in params]
            optimizer.step()
            moved = [not torch.equal(x, old) for x, old in zip(params, before, strict=True)]
            assert any(moved) == all(moved) == (step != 6)
            history += [x.detach().cpu().clone() for x in params]
        runs.append((history, optimizer))
    for expected, actual in zip(runs[0][0], runs[1][0], strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-7)
    expected, actual = (run[1].state_dict() for run in runs)
    for index, state in expected["state"].items():
        for name, tensor in state.items():
            torch.testing.assert_close(actual["state"][index][name], tensor, rtol=1e-5, atol=1e-7, msg=name)
    assert float(runs[1][1].statistics()["nonfinite_steps"]) == 1
