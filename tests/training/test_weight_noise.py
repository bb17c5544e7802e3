"""Variational noise on weights."""

import pytest
import torch

from ssm_asr.config import WeightNoiseConfig
from ssm_asr.encoder.conformer import Conformer, ConformerConfig
from ssm_asr.training.weight_noise import noisy_weights, variational_noise


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


def test_it_begins_after_so_many_batches():
    noise = WeightNoiseConfig(deviation=0.1, from_batch=3)
    assert [noise.deviation_at(batch) for batch in range(5)] == [0.0, 0.0, 0.0, 0.1, 0.1]
    assert WeightNoiseConfig().deviation_at(10**6) == 0.0, "off unless asked for"
    for settings in ({"deviation": -0.1}, {"from_batch": -1}):
        with pytest.raises(ValueError, match=r"train.weight_noise.\w+ is -[\d.]+; give a (whole )?number from 0 to"):
            WeightNoiseConfig(**settings)


def test_weights_are_chosen_by_part_without_biases_and_state_spaces():
    model = Conformer(ConformerConfig(layers=2, dim=16, heads=2, feedforward_dim=32, embed_dim=8, mixer="com"))
    chosen = {id(p) for p in noisy_weights(model, ("layers.1", "subsampling", "layers.1.attention"))}
    names = [name for name, p in model.named_parameters() if id(p) in chosen]
    assert len(names) == len(chosen) and "subsampling.weight" in names and "subsampling.bias" not in names
    assert all(name.startswith(("subsampling.", "layers.1.")) for name in names)
    assert "layers.1.conv_module.mixer.conv.weight_DL" in names
    assert not any(".ssm." in name or name.endswith("bias") or "norm" in name for name in names)
    with pytest.raises(ValueError, match="has 'layer', which names no weights; give some of subsampling, layers"):
        noisy_weights(model, ("layer",))
