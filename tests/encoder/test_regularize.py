"""Compares the gradients of the regularisers with golden arrays, and tests what they do in training."""

import json
import random

import pytest
import torch
from golden_model import load

from ssm_asr.encoder.modules import BiasNorm, Bypass, SwooshL, SwooshR
from ssm_asr.encoder.regularize import (
    Balancer,
    Dropout,
    LimitParameter,
    Schedule,
    Whiten,
    load_whitening_flags,
    whitening_flags,
)
from ssm_asr.encoder.schedule import set_batch_count
from ssm_asr.ops.penalty import penalize_large
from ssm_asr.ops.whiten import whitening_metric

GOLDEN = load("scaling.npz")


def gradient(module, x, grad_y):
    """Returns the output of a module and the gradient of its input, for a gradient of its output."""
    x = x.clone().requires_grad_()
    y = module(x)
    y.backward(grad_y)
    return y.detach(), x.grad


@pytest.mark.parametrize("name, module", [("SwooshL", SwooshL()), ("SwooshR", SwooshR())])
def test_swoosh(name, module):
    x = GOLDEN[f"{name}/x"]
    y, dy = gradient(module, x, torch.ones_like(x))
    torch.testing.assert_close(y, GOLDEN[f"{name}/y"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(dy, GOLDEN[f"{name}/dy"])


def test_bias_norm():
    norm = BiasNorm(12).eval()
    with torch.no_grad():
        norm.bias.copy_(GOLDEN["BiasNorm/bias"])
        norm.log_scale.copy_(GOLDEN["BiasNorm/log_scale"])
    y, dx = gradient(norm, GOLDEN["BiasNorm/x"], GOLDEN["BiasNorm/grad_y"])
    torch.testing.assert_close(y, GOLDEN["BiasNorm/y"])
    torch.testing.assert_close(dx, GOLDEN["BiasNorm/grad_x"])
    torch.testing.assert_close(norm.bias.grad, GOLDEN["BiasNorm/grad_bias"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(norm.log_scale.grad, GOLDEN["BiasNorm/grad_log_scale"])


@pytest.mark.parametrize("case", range(4))
def test_balancer_gradient(case):
    limits = json.loads(GOLDEN[f"Balancer{case}/kwargs"])
    positive = (limits.get("min_positive", 0.05), limits.get("max_positive", 0.95))
    size = (limits.get("min_abs", 0.2), limits.get("max_abs", 100.0))
    balancer = Balancer(positive, size, prob=1.0)
    y, dx = gradient(balancer, GOLDEN[f"Balancer{case}/x"], GOLDEN[f"Balancer{case}/grad_y"])
    assert torch.equal(y, GOLDEN[f"Balancer{case}/x"])
    torch.testing.assert_close(dx, GOLDEN[f"Balancer{case}/grad_x"], atol=1e-5, rtol=1e-4)
    assert not torch.equal(dx, GOLDEN[f"Balancer{case}/grad_y"])


def test_balancer_gradient_of_a_channel_of_zeros_is_finite():
    x, grad_y = torch.randn(40, 4, 6), torch.randn(40, 4, 6)
    x[..., 2] = 0.0
    _, dx = gradient(Balancer(prob=1.0), x, grad_y)
    assert bool(dx.isfinite().all())
    # In a vector of 160 numbers with rms 1, no number is larger than the square root of 160.
    assert bool(((dx - grad_y).abs() <= 0.04 * grad_y.abs() * 160**0.5).all())


@pytest.mark.parametrize("case", range(3))
def test_whiten_gradient(case):
    settings = json.loads(GOLDEN[f"Whiten{case}/kwargs"])
    x, groups = GOLDEN[f"Whiten{case}/x"], settings["num_groups"]
    whiten = Whiten(settings["whitening_limit"], groups, settings["grad_scale"], settings["prob"])
    metric, _ = whitening_metric(x.reshape(-1, x.shape[-1]), groups)
    torch.testing.assert_close(metric, GOLDEN[f"Whiten{case}/metric"])
    _, dx = gradient(whiten, x, GOLDEN[f"Whiten{case}/grad_y"])
    torch.testing.assert_close(dx, GOLDEN[f"Whiten{case}/grad_x"], atol=1e-5, rtol=1e-4)


def test_whitening_metric_gradient_is_that_of_autograd():
    x = torch.randn(30, 8, dtype=torch.float64, requires_grad=True)
    metric, grad = whitening_metric(x, 2)
    torch.testing.assert_close(torch.autograd.grad(metric, x)[0], grad.detach())


def test_whiten_runs_seldom_while_it_finds_nothing():
    white = Whiten(limit=1e9, prob=1.0)
    gradient(white, torch.randn(20, 4), torch.randn(20, 4))
    assert whitening_flags(white) == [False]
    load_whitening_flags(white, [True])
    assert white.over_limit


def test_schedule_is_linear_and_held_at_the_ends():
    schedule = Schedule((0, 0.2), (4000, 0.05), (16000, 0.0))
    assert schedule(-5) == 0.2
    assert schedule(2000) == pytest.approx(0.125)
    assert schedule(10000) == pytest.approx(0.025)
    assert schedule(1e9) == 0.0


def test_set_batch_count_reaches_every_schedule():
    bypass = Bypass(4)
    set_batch_count(bypass, 20000)
    assert bypass.limit.settings()[1] == pytest.approx(0.2)


def test_limit_parameter_flips_only_gradients_that_lead_out():
    limit = LimitParameter(-1.0, 1.0, prob=1.0)
    parameter = torch.tensor([2.0, 2.0, -2.0, -2.0, 0.5], requires_grad=True)
    limit(parameter).backward(torch.tensor([-1.0, 1.0, 1.0, -1.0, 1.0]))
    assert parameter.grad.tolist() == [1.0, 1.0, -1.0, -1.0, 1.0]


def test_penalty_on_large_scores_only():
    x = torch.tensor([30.0, -30.0, 10.0], requires_grad=True)
    penalize_large(x, 25.0, 0.5).sum().backward()
    assert x.grad.tolist() == [1.5, 0.5, 1.0]


def test_nothing_happens_in_evaluation():
    x = torch.randn(3, 5, 8, requires_grad=True)
    for module in (
        Balancer(prob=1.0),
        Whiten(1.0, prob=1.0),
        Dropout(0.9, shared_dim=1),
        LimitParameter(0, 0, 1),
    ):
        assert module.eval()(x) is x


def test_dropout_shares_its_mask_along_time():
    torch.manual_seed(0)
    dropped = Dropout(0.5, shared_dim=1)(torch.ones(2, 6, 100))
    assert torch.equal(dropped[:, 0], dropped[:, 5])
    assert set(dropped.unique().tolist()) == {0.0, 2.0}


def test_chance_draws_from_the_host():
    balancer, x = Balancer(prob=0.3), torch.ones(1, requires_grad=True)
    random.seed(0)
    share = sum(balancer.settings(x).numbers[0] for _ in range(4000)) / 4000
    assert share == pytest.approx(0.3, abs=0.03)
