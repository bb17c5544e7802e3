"""Whitening by Triton kernels against the plain form: on a GPU where there is one, else by Triton's interpreter."""

import pytest
import torch
from kernel_device import DEVICE

from ssm_asr.encoder.regularize import Whiten, whitening_flags
from ssm_asr.encoder.schedule import Draws
from ssm_asr.ops import dispatch
from ssm_asr.ops.whiten import whitening_metric
from ssm_asr.ops.whiten_kernel import whiten

GRAD_SCALE = 0.5


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(1)


def correlated(*shape):
    """Frames whose channels are correlated and whose means are not 0; gradients."""
    channels = shape[-1]
    mixed = torch.randn(shape) @ torch.randn(channels, channels) / channels**0.5 + torch.randn(channels)
    return mixed.to(DEVICE), torch.randn(shape).to(DEVICE)


def settings(due=1.0, anyway=1.0, limit=1.0):
    return torch.tensor([due, anyway, limit], device=DEVICE)


def plain(x, grad, groups):
    """The plain form's gradient in float64."""
    x64 = x.detach().double().cpu().requires_grad_()
    Whiten(1.0, groups, GRAD_SCALE, prob=1.0)(x64).backward(grad.double().cpu())
    return x64.grad


def by_kernels(x, grad, groups=1, flag=True, **numbers):
    """The gradient, and the flag afterwards."""
    over_limit = torch.tensor(flag, device=DEVICE)
    return whiten(x, grad, settings(**numbers), over_limit, groups, GRAD_SCALE), bool(over_limit)


@pytest.mark.parametrize(
    "frames, channels, groups", [(300, 8, 1), (70, 64, 2), (129, 200, 1), (50, 96, 3), (1100, 24, 1), (40, 130, 1)]
)
def test_gradient(frames, channels, groups):
    """Fewer and more frames than a slab has, one and several blocks of channels, whole and not."""
    x, grad = correlated(frames, channels)
    actual, flag = by_kernels(x, grad, groups)
    expected = plain(x, grad, groups)
    assert flag
    torch.testing.assert_close(actual.double().cpu(), expected, atol=1e-5, rtol=0)
    added = (expected - grad.double().cpu()).norm() / grad.norm().cpu()
    torch.testing.assert_close(float(added), GRAD_SCALE, atol=1e-5, rtol=0)


of_gpus = pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter multiplies the bits of bfloat16 as integers")


@pytest.mark.parametrize("dtype, error", [pytest.param(torch.bfloat16, 4e-3, marks=of_gpus), (torch.float16, 5e-4)])
def test_half_precision(dtype, error):
    x, grad = (y.to(dtype) for y in correlated(200, 80))
    actual, _ = by_kernels(x, grad, 2)
    assert actual.dtype == dtype
    expected = plain(x, grad, 2)
    assert float((actual.double().cpu() - expected).norm() / expected.norm()) < error


def test_small_gradients_in_half_precision():
    """What is added is not lost where gradients are near the least number that float16 has."""
    x, grad = correlated(200, 32)
    x, grad = x.half() * 8, (grad * 1e-4).half()
    actual, _ = by_kernels(x, grad)
    expected = plain(x, grad, 1)
    assert float((actual.double().cpu() - expected).norm() / expected.norm()) < 1e-3


def test_any_order_in_memory():
    """Slices of a projection, channels last behind a transposition, dimensions that do not flatten."""
    x, grad = correlated(3, 5, 7, 24)
    wide_x, wide_grad = torch.zeros(3, 5, 7, 60, device=DEVICE), torch.zeros(3, 5, 7, 50, device=DEVICE)
    wide_x[..., 10:34], wide_grad[..., 5:29] = x, grad
    expected, _ = by_kernels(x, grad)
    pairs = [
        (wide_x[..., 10:34], wide_grad[..., 5:29]),
        (wide_x[..., 10:34], grad),
        (x.transpose(0, 2).contiguous().transpose(0, 2), grad),
        (x.transpose(1, 2).contiguous().transpose(1, 2), grad.transpose(1, 2).contiguous().transpose(1, 2)),
        (x.movedim(-1, 1).contiguous().movedim(1, -1), grad),
        (x, grad.movedim(-1, 1).contiguous().movedim(1, -1)),
    ]
    for x_view, grad_view in pairs:
        before = grad_view.clone()
        actual, _ = by_kernels(x_view, grad_view)
        assert actual.shape == grad.shape and torch.equal(grad_view, before)
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)
        assert torch.equal(by_kernels(x_view, grad_view, due=0.0)[0], grad)
    alike, _ = by_kernels(*pairs[3])
    assert alike.stride() == pairs[3][0].stride()


def test_an_expanded_gradient():
    x, _ = correlated(60, 16)
    grad = torch.ones((), device=DEVICE).expand(60, 16)
    torch.testing.assert_close(by_kernels(x, grad)[0].double().cpu(), plain(x, grad, 1), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "due, anyway, flag, acts", [(0, 0, True, False), (0, 1, True, False), (1, 0, False, False), (1, 0, True, True),
                                (1, 1, False, True)]
)  # fmt: skip
def test_when_it_acts(due, anyway, flag, acts):
    """What it finds is noted only when it acts, and else the gradient is the same to the last bit."""
    x, grad = correlated(60, 16)
    metric = float(whitening_metric(x, 1)[0])
    for limit in (0.99 * metric, 1.01 * metric):
        actual, after = by_kernels(x, grad, 1, flag, due=due, anyway=anyway, limit=limit)
        over = limit < metric
        assert after == (over if acts else flag)
        assert torch.equal(actual, grad) != (acts and over)


def test_no_gradient_of_the_metric():
    """Constant frames, and channels that are one and the same: nothing grows beyond bounds."""
    x, grad = torch.ones(60, 16, device=DEVICE), torch.randn(60, 16, device=DEVICE)
    assert torch.equal(by_kernels(x, grad)[0], grad)
    x = torch.randn(60, 1, device=DEVICE).expand(60, 16).contiguous()
    actual, _ = by_kernels(x, grad)
    assert float((actual - grad).norm() / grad.norm()) < 2 * GRAD_SCALE


def test_the_module(monkeypatch):
    """With decisions on the device, the module acts and takes note as its plain form does."""
    monkeypatch.setattr(dispatch, "use_kernels", lambda x: x.dtype == torch.float32)
    x, grad = correlated(2, 40, 32)
    module = Whiten(1.0, 2, GRAD_SCALE, prob=1.0).to(DEVICE)
    leaf = x.clone().requires_grad_()
    with Draws(torch.device(DEVICE)).in_use():
        y = module(leaf)
    y.backward(grad)
    assert torch.equal(y, x) and whitening_flags(module) == [True]
    torch.testing.assert_close(leaf.grad.double().cpu(), plain(x, grad, 2), atol=1e-5, rtol=0)
    assert module.eval()(leaf) is leaf
