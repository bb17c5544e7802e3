"""Variational noise on weights."""

import pytest
import torch

from ssm_asr.encoder.weight_noise import variational_noise


@pytest.fixture
def model():
    torch.manual_seed(5)
    return torch.nn.Sequential(torch.nn.Linear(40, 30), torch.nn.Tanh(), torch.nn.Linear(30, 20))


def gradients(model, x):
    model.zero_grad()
    model(x).square().sum().backward()
    return [p.grad.clone() for p in model.parameters()]


def test_gradients_are_those_at_the_noisy_weights(model):
    x, before = torch.randn(7, 40), [p.detach().clone() for p in model.parameters()]
    plain = gradients(model, x)
    with variational_noise(model.parameters(), 0.1):
        noisy_weights = [p.detach().clone() for p in model.parameters()]
        noisy = gradients(model, x)
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True)), "to the last bit"
    noise = torch.cat([(n - b).flatten() for n, b in zip(noisy_weights, before, strict=True)])
    assert abs(noise.std() - 0.1) < 0.01 and abs(noise.mean()) < 0.01
    with torch.no_grad():
        for p, value in zip(model.parameters(), noisy_weights, strict=True):
            p.copy_(value)
    assert all(torch.equal(a, b) for a, b in zip(noisy, gradients(model, x), strict=True))
    assert not any(torch.allclose(a, b) for a, b in zip(noisy, plain, strict=True))


def test_only_the_given_weights_are_moved(model):
    before = model[0].weight.detach().clone(), model[2].weight.detach().clone()
    with variational_noise([model[2].weight], 0.1):
        assert torch.equal(model[0].weight, before[0])
        assert not torch.equal(model[2].weight, before[1])


def test_weights_are_restored_after_an_error(model):
    before = model[0].weight.detach().clone()
    with pytest.raises(RuntimeError, match="no luck"), variational_noise(model.parameters(), 0.1):
        raise RuntimeError("no luck")
    assert torch.equal(model[0].weight, before)


def test_a_backward_pass_outside_is_refused(model):
    with variational_noise(model.parameters(), 0.1):
        loss = model(torch.randn(7, 40)).sum()
    with pytest.raises(RuntimeError, match="inplace operation"):
        loss.backward()


def test_no_noise_draws_nothing(model):
    state = torch.get_rng_state()
    with variational_noise(model.parameters(), 0.0):
        pass
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(ValueError, match="-1"), variational_noise(model.parameters(), -1.0):
        pass
