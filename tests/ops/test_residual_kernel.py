"""Kernels between a layer's modules against the plain forms: on a GPU where there is one, else by the interpreter."""

import random
from contextlib import nullcontext

import pytest
import torch
from kernel_device import DEVICE

from ssm_asr.encoder.modules import BiasNorm, Bypass, Downsample, Linear
from ssm_asr.encoder.regularize import LimitParameter, sequence_masks
from ssm_asr.encoder.schedule import Draws, Schedule, Scheduled, set_batch_count
from ssm_asr.ops import dispatch
from ssm_asr.ops.residual import add_masked, fork
from ssm_asr.ops.sums_kernel import column_sums


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(1)


def strided(*shape):
    """Random numbers as a part of the channels of a larger tensor, as stacks of fewer channels get them."""
    return torch.randn(*shape[:-1], shape[-1] + 5)[..., 3:-2]


def compare(module, run, inputs, monkeypatch, draws=False, dtype=torch.float32, tolerance=1e-5):
    """Output and gradients of all inputs and parameters, by kernels and by the plain form in float64."""
    weight = None
    results = []
    for use, kind in ((False, torch.float64), (True, dtype)):
        monkeypatch.setattr(dispatch, "use_kernels", lambda x, use=use: use)
        module.to(DEVICE, kind if kind == torch.float64 else torch.float32)
        random.seed(1)
        given = [x.to(DEVICE, dtype).to(kind).requires_grad_() for x in inputs]
        given = [x if x.stride(-1) == 1 else x.contiguous() for x in given]
        with Draws(torch.device(DEVICE)).in_use() if use and draws else nullcontext():
            y = run(module, *given)
        assert y.dtype == kind
        weight = strided(*y.shape).to(DEVICE, dtype) if weight is None else weight
        results.append([y, *torch.autograd.grad(y, [*given, *module.parameters()], weight.to(kind))])
    for expected, actual in zip(*results, strict=True):
        assert actual.shape == expected.shape
        size = float(expected.detach().abs().max())
        torch.testing.assert_close(actual.double(), expected, atol=tolerance * size, rtol=tolerance)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.01)])
@pytest.mark.parametrize("shape", [(2, 3, 20), (1, 1, 16), (50, 70)])
def test_bias_norm(shape, dtype, tolerance, monkeypatch):
    norm = BiasNorm(shape[-1]).eval()
    torch.nn.init.normal_(norm.bias)
    compare(norm, lambda module, x: module(x), [strided(*shape)], monkeypatch, False, dtype, tolerance)


@pytest.mark.parametrize("log_scale", [-2.0, 0.5, 2.0])
def test_bias_norm_limits_its_scale(log_scale, monkeypatch):
    norm = BiasNorm(8)
    norm.limit = LimitParameter(-1.5, 1.5, prob=1.0)
    torch.nn.init.constant_(norm.log_scale, log_scale)
    compare(norm, lambda module, x: module(x), [torch.randn(2, 3, 8)], monkeypatch, True)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.01)])
@pytest.mark.parametrize("frames, factor, skips", [(5, 1, True), (35, 1, False), (8, 2, False), (9, 4, True)])
def test_bypass(frames, factor, skips, dtype, tolerance, monkeypatch):
    keep_B11 = torch.tensor([True, False, True], device=DEVICE)[:, None, None] if skips else None
    inputs = strided(3, frames, 70), strided(3, -(-frames // factor), 70)
    bypass = Bypass(70, factor).eval()
    torch.nn.init.uniform_(bypass.bypass_scale)
    compare(bypass, lambda module, *x: module(*x, keep_B11), inputs, monkeypatch, False, dtype, tolerance)


def test_bypass_limits_its_scale(monkeypatch):
    bypass = Bypass(40)
    bypass.limit = LimitParameter(Schedule((0, 0.9), (20000, 0.2)), 1.0, prob=1.0)
    set_batch_count(bypass, 10000.0)
    torch.nn.init.uniform_(bypass.bypass_scale, -1.0, 2.0)
    inputs = torch.randn(2, 4, 40), torch.randn(2, 4, 40)
    compare(bypass, lambda module, *x: module(*x), inputs, monkeypatch, True)


@pytest.mark.parametrize("acts", [False, True])
def test_limits_act_when_they_are_drawn_to(acts, monkeypatch):
    bypass = Bypass(3)
    bypass.limit = LimitParameter(0.9, 1.0, prob=float(acts))
    torch.nn.init.constant_(bypass.bypass_scale, 3.0)
    bypass.to(DEVICE)
    monkeypatch.setattr(dispatch, "use_kernels", lambda x: True)
    ones = torch.ones(1, 2, 3, device=DEVICE)
    with Draws(torch.device(DEVICE)).in_use():
        bypass(0 * ones, ones).backward(-ones)
    assert bypass.bypass_scale.grad.tolist() == [2.0 if acts else -2.0] * 3


@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("by_channel", [False, True])
def test_add_masked_is_equal_to_the_last_bit(adds, by_channel, monkeypatch):
    dtype = (
        torch.bfloat16 if DEVICE == "cuda" else torch.float32
    )  # the interpreter cuts digits off where it should round
    y, x, weight = (strided(3, 35, 70).to(DEVICE, dtype) for _ in range(3))
    mask = torch.rand(3, 1, 70 if by_channel else 1, device=DEVICE) > 0.5
    mask = mask.to(y.dtype).repeat(1, 1, 2)[..., 70:] if by_channel else mask
    results = []
    for use in (False, True):
        monkeypatch.setattr(dispatch, "use_kernels", lambda x, use=use: use)
        inputs = [z.clone().requires_grad_() for z in ([x, y] if adds else [y])]
        out = add_masked(inputs[0] if adds else None, inputs[-1], mask)
        results.append([out, *torch.autograd.grad(out, inputs, weight)])
    for expected, actual in zip(*results, strict=True):
        assert actual.dtype == expected.dtype and torch.equal(actual, expected)


@pytest.mark.parametrize("used", range(6))
def test_fork_adds_the_gradients_of_those_that_are_used(used, monkeypatch):
    monkeypatch.setattr(dispatch, "use_kernels", lambda x: True)
    x = torch.randn(3, 35, 70, device=DEVICE, requires_grad=True)
    weights = [strided(*x.shape).to(DEVICE) for _ in range(used)]
    branches = fork(x, 5)
    assert all(torch.equal(branch, x) for branch in branches)
    loss = sum((branch * weight).sum() for branch, weight in zip(branches, weights, strict=False)) + 0 * x.sum()
    loss.backward()
    expected = sum(weights, torch.zeros_like(x))
    torch.testing.assert_close(x.grad, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.01)])
@pytest.mark.parametrize("frames, factor", [(8, 2), (75, 2), (9, 4), (3, 8), (2, 4)])
def test_downsample(frames, factor, dtype, tolerance, monkeypatch):
    downsample = Downsample(factor)
    torch.nn.init.normal_(downsample.bias)
    compare(downsample, lambda module, x: module(x), [strided(2, frames, 70)], monkeypatch, False, dtype, tolerance)


@pytest.mark.parametrize("shape", [(5,), (1, 1), (3, 70), (2, 150, 70), (3, 5, 2, 64)])
@pytest.mark.parametrize("layout", ["whole", "part", "transposed"])
def test_column_sums(shape, layout):
    x = (strided(*shape) if layout == "part" else torch.randn(*shape)).to(DEVICE)
    x = x.transpose(0, -1).contiguous().transpose(0, -1) if layout == "transposed" else x
    sums = column_sums(x, torch.float32)
    torch.testing.assert_close(sums.double(), x.double().reshape(-1, shape[-1]).sum(dim=0), atol=1e-5, rtol=1e-5)
    assert torch.equal(sums, column_sums(x, torch.float32))


def test_column_sums_of_an_expanded_gradient():
    assert column_sums(torch.ones(1, 1, 1, device=DEVICE).expand(2, 3, 4), torch.bfloat16).tolist() == [6.0] * 4


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.01)])
def test_linear(dtype, tolerance, monkeypatch):
    """Under autocast the weights, and so their gradients, stay in float32."""

    def run(module, x):
        with torch.autocast(DEVICE, torch.bfloat16, enabled=dtype == torch.bfloat16 and x.dtype == dtype):
            return module(x)

    compare(Linear(12, 20), run, [strided(3, 30, 12)], monkeypatch, False, dtype, tolerance)


def test_linear_without_a_bias_to_train(monkeypatch):
    monkeypatch.setattr(dispatch, "use_kernels", lambda x: True)
    x, plain = torch.randn(2, 3, device=DEVICE), Linear(3, 4, bias=False).to(DEVICE)
    assert torch.equal(plain(x), torch.nn.functional.linear(x, plain.weight))
    frozen = Linear(3, 4).to(DEVICE).requires_grad_(False)
    assert not frozen(x).requires_grad


class Skipping(Scheduled):
    """A module with three rates, one of them 0."""

    rates = (0.5, Schedule((0, 0.2)), 0.0)


@pytest.mark.parametrize("drawn", [False, True])
def test_sequence_masks_have_their_own_rates(drawn):
    module = Skipping()
    with Draws(torch.device("cpu")).in_use() if drawn else nullcontext():
        masks = sequence_masks(module, torch.zeros(20000, 2, 3), *module.rates)
    assert drawn or masks[2] is None
    kept = [1.0 if mask is None else float(mask.float().mean()) for mask in masks]
    assert kept == pytest.approx([0.5, 0.8, 1.0], abs=0.01)
    assert masks[0].shape == (20000, 1, 1)
    assert float((masks[0] & masks[1]).float().mean()) == pytest.approx(0.4, abs=0.01)
    assert sequence_masks(module.eval(), torch.zeros(2, 2, 3), *module.rates) == [None] * 3
