"""Tests of the Zipformer: the sizes of published models, and its behaviour in training."""

import random

import pytest
import torch
from golden_model import golden_model

from ssm_asr.encoder.attention import AttentionWeights
from ssm_asr.encoder.long_range import NonlinAttention
from ssm_asr.encoder.schedule import set_batch_count
from ssm_asr.encoder.state import state_sizes
from ssm_asr.encoder.zipformer import ZipformerConfig
from ssm_asr.transducer.model import ModelConfig, Transducer

M = {}
S = {
    "layers": (2,) * 6,
    "dim": (192, 256, 256, 256, 256, 256),
    "unmasked_dim": (192,) * 6,
    "feedforward_dim": (512, 768, 768, 768, 768, 768),
}
L = {
    "layers": (2, 2, 4, 5, 4, 2),
    "dim": (192, 256, 512, 768, 512, 256),
    "unmasked_dim": (192, 192, 256, 320, 256, 192),
    "feedforward_dim": (512, 768, 1536, 2048, 1536, 768),
}


def meta_model(vocab_size, **encoder):
    """Makes a model without memory for its weights."""
    with torch.device("meta"):
        return Transducer(ModelConfig(ZipformerConfig(**encoder)), vocab_size)


@pytest.mark.parametrize(
    "size, causal, vocab_size, count",
    [
        (M, True, 500, 66_110_931),
        (M, False, 500, 65_549_011),
        (M, True, 3266, 71_783_997),
        (S, False, 500, 23_285_615),
        (L, False, 500, 148_439_574),
    ],
)
def test_parameter_counts(size, causal, vocab_size, count):
    model = meta_model(vocab_size, causal=causal, **size)
    assert sum(p.numel() for p in model.parameters()) == count


@pytest.mark.parametrize("left, floats", [(64, 286_593), (128, 462_721), (256, 814_977)])
def test_streaming_state_of_size_m(left, floats):
    assert sum(state_sizes(meta_model(500).init_state(1, left)).values()) == floats == 2752 * left + 110_465


def test_config_refuses_lists_of_different_lengths():
    with pytest.raises(ValueError, match=r"encoder\.dim is \[192, 256\]; give 6 entries"):
        ZipformerConfig(dim=(192, 256))


@pytest.fixture
def model():
    model = golden_model("causal")[0].train()
    torch.manual_seed(0)
    random.seed(0)
    return model


def encode(model, seed=0):
    """Encodes a fixed batch; the seed decides about the random numbers of training."""
    torch.manual_seed(3)
    features, lens = torch.randn(4, 150, 80), torch.tensor([150, 150, 120, 90])
    torch.manual_seed(seed)
    random.seed(seed)
    return model.encode(features, lens, 16, 64)[0]


def test_training_is_random_and_repeatable(model):
    assert torch.equal(encode(model, 1), encode(model, 1))
    assert not torch.equal(encode(model, 1), encode(model, 2))


def test_evaluation_is_not_random(model):
    model.eval()
    assert torch.equal(encode(model, 1), encode(model, 2))


def test_all_used_parameters_get_finite_gradients(model):
    set_batch_count(model, 1e6)  # so late in training little is skipped
    encode(model).square().mean().backward()
    for name, parameter in model.named_parameters():
        unused = name.endswith(".bypass_scale") and name.split(".")[-2].isdigit()
        if unused or not name.startswith(("encoder", "encoder_embed")):
            assert parameter.grad is None
        else:
            assert parameter.grad is not None and bool(parameter.grad.isfinite().all()), name


def test_layers_are_skipped_less_and_less(model):
    layers = [layer for stack in model.encoder._stacks() for layer in getattr(stack, "encoder", stack).layers]
    set_batch_count(model, 0)
    assert [layer.now(layer.bypass_skip_rate) for layer in layers] == [0.5] * 4
    # From batch 1000 to 4000 each of the three stacks has 1000 batches; in the last one each of two layers has 500.
    set_batch_count(model, 3500)
    rates = [layer.now(layer.bypass_skip_rate) for layer in layers]
    assert rates == pytest.approx([0.035, 0.035 * 2**0.5, 0.07, 0.5])


def test_channel_masks_take_the_upper_half_more_often(model):
    torch.manual_seed(0)
    mask = model.encoder._channel_masks(torch.zeros(20000, 1, 1))[1]  # of 48 channels 32 are never masked
    assert mask.shape == (20000, 1, 48)
    dropped = 1 - mask.mean(dim=(0, 1))
    assert dropped[:32].max() == 0
    assert dropped[32:40].tolist() == pytest.approx([0.125] * 8, abs=0.01)
    assert dropped[40:].tolist() == pytest.approx([1 - 0.875**2] * 8, abs=0.01)


def test_position_scores_and_attention_are_skipped_at_the_given_rates(model):
    weights = next(m for m in model.modules() if isinstance(m, AttentionWeights))
    nonlin = next(m for m in model.modules() if isinstance(m, NonlinAttention))
    for batch_count, expected in ((0, (0.5, 0.25)), (2000, (0.25, 0.1375)), (4000, (0.0, 0.025))):
        set_batch_count(model, batch_count)
        rates = (weights.now(weights.pos_skip_rate), nonlin.now(nonlin.constant_rate))
        assert rates == pytest.approx(expected)


def test_gradient_of_the_first_convolution_is_scaled():
    """The gradient is 0.2 times the gradient without the scaling."""
    torch.manual_seed(0)
    embed = golden_model("causal")[0].encoder_embed.eval()
    features, lens = torch.randn(1, 60, 80), torch.tensor([60])
    gradients = []
    for scale in (0.2, 1.0):
        embed.conv[1].scale = scale
        embed.zero_grad()
        embed(features, lens)[0].square().sum().backward()
        gradients.append(embed.conv[0].weight.grad.clone())
    torch.testing.assert_close(gradients[0], 0.2 * gradients[1])


def test_padding_does_not_change_an_utterance():
    model = golden_model("causal")[0]
    torch.manual_seed(0)
    features = torch.randn(2, 200, 80)
    with torch.no_grad():
        together, lens = model.encode(features, torch.tensor([200, 96]), 16, 64)
        features[1, 96 + 6 :] = 100.0  # the last valid frame of the front end does not see so far
        again, _ = model.encode(features, torch.tensor([200, 96]), 16, 64)
    torch.testing.assert_close(together[1, : lens[1] - 2], again[1, : lens[1] - 2])
