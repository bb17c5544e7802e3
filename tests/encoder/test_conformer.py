"""Tests of the Conformer: sizes, states, streaming, padding, and its attention and batch norm by their definitions."""

import random

import pytest
import torch

from ssm_asr.encoder.batch_norm import MaskedBatchNorm
from ssm_asr.encoder.conformer import Conformer, ConformerConfig, RelativeAttention
from ssm_asr.encoder.mixer import ConvMixer, DropInMixer, ReparameterizedMixer, StackedMixer
from ssm_asr.encoder.state import leaves, select_states, stack_states, state_sizes
from ssm_asr.ops.attention import Context
from ssm_asr.ssm.s4d import DIRECT_TAPS

TOLERANCE = {"atol": 1e-4, "rtol": 0}
SMALL = {"layers": 2, "dim": 24, "heads": 2, "feedforward_dim": 48, "embed_dim": 20}
MIXERS = {
    "none": {"mixer": "none"},
    "conv": {"mixer": "conv", "conv_kernel": 32},
    "dir real": {"mixer": "dir"},
    "dir lin": {"mixer": "dir", "ssm_param": "lin", "ssm_states": 8},
    "com real": {"mixer": "com", "conv_kernel": 4},
    "com lin": {"mixer": "com", "conv_kernel": 2, "ssm_param": "lin"},
    "rep real": {"mixer": "rep", "ssm_states": 1},
    "rep lin": {"mixer": "rep", "ssm_param": "lin", "rep_length": 7},
}
EVERY_MIXER = pytest.mark.parametrize("mixer", MIXERS)

L = {}
M = {"layers": 16, "dim": 256, "heads": 4, "feedforward_dim": 1024, "embed_dim": 256}
S = {"layers": 16, "dim": 144, "heads": 4, "feedforward_dim": 576, "embed_dim": 144}
SSM = {"mixer": "com", "conv_kernel": 4, "ssm_states": 4, "ssm_param": "real"}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(4)
    random.seed(4)


def conformer(mixer, **settings):
    """Makes a small Conformer; all its parameters and batch statistics differ from their initial values."""
    model = Conformer(ConformerConfig(**SMALL | MIXERS[mixer] | settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
        for module in model.modules():
            if isinstance(module, MaskedBatchNorm):
                module.running_mean.normal_()
                module.running_var.uniform_(0.1, 2.0)
    return model


def stream(model, x_BTE, chunk, left_context):
    """Encodes sequences chunk by chunk; returns the whole output and the last state."""
    state, outputs = model.init_state(len(x_BTE), left_context), []
    for start in range(0, x_BTE.shape[1], chunk):
        processed = torch.full((len(x_BTE),), start) if left_context else None
        out, state = model.stream(x_BTE[:, start : start + chunk], state, processed)
        outputs.append(out)
    return torch.cat(outputs, dim=1), state


@EVERY_MIXER
@pytest.mark.parametrize("chunk, left", [(4, 0), (4, 64), (16, 0), (16, 64), (32, 128), (64, 0), (64, 128)])
def test_streaming_equals_offline(mixer, chunk, left):
    model = conformer(mixer)
    with torch.no_grad():
        for chunks in (1, 2, -(-300 // chunk)):
            x = torch.randn(2, chunks * chunk, 20)
            whole, _ = model(x, torch.full((2,), x.shape[1]), chunk, left)
            torch.testing.assert_close(stream(model, x, chunk, left)[0], whole, **TOLERANCE)
    assert x.shape[1] // 2 > DIRECT_TAPS, "the longest should take the FFT"


@EVERY_MIXER
def test_streams_of_different_ages_in_one_batch(mixer):
    model, x = conformer(mixer), torch.randn(2, 12 * 16, 20)
    with torch.no_grad():
        alone = [stream(model, x[b : b + 1], 16, 64)[0] for b in range(2)]
        _, first = stream(model, x[:1, : 5 * 16], 16, 64)  # five chunks old when the second begins
        state, ages = stack_states([first, model.init_state(1, 64)]), torch.tensor([5 * 16, 0])
        for i in range(7):
            chunk = torch.stack([x[0, ages[0] : ages[0] + 16], x[1, ages[1] : ages[1] + 16]])
            out, state = model.stream(chunk, state, ages)
            torch.testing.assert_close(out[0], alone[0][0, 8 * (i + 5) : 8 * (i + 6)], **TOLERANCE)
            torch.testing.assert_close(out[1], alone[1][0, 8 * i : 8 * (i + 1)], **TOLERANCE)
            ages = ages + 16
    assert all(tensor.shape[0] == 1 for _, tensor in leaves(select_states(state, [1])))


@EVERY_MIXER
def test_streaming_leaves_the_old_state_as_it_was(mixer):
    model = conformer(mixer)
    _, state = stream(model, torch.randn(1, 16, 20), 16, 16)
    before = [tensor.clone() for _, tensor in leaves(state)]
    model.stream(torch.randn(1, 16, 20), state, torch.tensor([16]))
    assert all(torch.equal(a, b) for a, (_, b) in zip(before, leaves(state), strict=True))


@EVERY_MIXER
def test_a_batch_of_ragged_utterances_equals_each_alone(mixer):
    model, lens = conformer(mixer), torch.tensor([200, 111, 1])
    x = torch.randn(3, 200, 20)
    with torch.no_grad():
        for chunk, left in ((-1, -1), (16, 64), (16, -1)):
            together, valid = model(x, lens, chunk, left)
            for b, length in enumerate(lens.tolist()):
                alone, (count,) = model(x[b : b + 1, :length], lens[b : b + 1], chunk, left)
                assert valid[b] == count == alone.shape[1] == (length + 1) // 2
                torch.testing.assert_close(together[b, :count], alone[0], **TOLERANCE)


@EVERY_MIXER
def test_padding_has_no_influence_in_training(mixer):
    model, lens = conformer(mixer, dropout=0.0).train(), torch.tensor([180, 97, 30])
    x = torch.randn(3, 180, 20)
    padding = torch.arange(180) >= lens[:, None]
    state_dict = {name: value.clone() for name, value in model.state_dict().items()}
    outputs, grads, statistics = [], [], []
    for filling in (0.0, 1e4):
        model.load_state_dict(state_dict)
        model.zero_grad()
        torch.manual_seed(0)
        out, out_lens = model(x.masked_fill(padding[..., None], filling), lens, 16, 64)
        valid = torch.arange(out.shape[1]) < out_lens[:, None]
        out[valid].square().sum().backward()
        outputs.append(out[valid])
        grads.append([p.grad for p in model.parameters()])
        statistics.append([value.clone() for name, value in model.named_buffers()])
    assert torch.equal(*outputs)
    for values in (grads, statistics):
        assert all(torch.equal(a, b) for a, b in zip(*values, strict=True))
    assert all(grad.abs().sum() > 0 for grad in grads[0])


def test_the_future_beyond_the_chunk_is_not_seen():
    model, x = conformer("com real"), torch.randn(1, 96, 20)
    changed = x.clone()
    changed[:, 48:] += 1.0
    one, two = (model(x, torch.tensor([96]), 16, 64)[0] for x in (x, changed))
    torch.testing.assert_close(one[:, :24], two[:, :24], atol=1e-6, rtol=0)
    assert not torch.allclose(one[:, 24:], two[:, 24:], atol=1e-2)


@pytest.mark.parametrize("left, reach", [(0, 16), (16, 32), (64, 80), (-1, 160)])
def test_attention_reaches_so_far_back(left, reach):
    model = conformer("none", layers=1)
    x = torch.randn(1, 160, 20, requires_grad=True)
    model(x, torch.tensor([160]), 16, left)[0][:, -1].sum().backward()
    assert x.grad is not None
    assert (x.grad.abs().sum(2)[0] > 0).int().sum() == reach


@pytest.mark.parametrize(
    "mixer, floats",
    [
        ("none", {}),
        ("conv", {"conv": 31}),
        ("dir real", {"ssm": 4}),
        ("dir lin", {"ssm": 8}),
        ("com real", {"conv": 3, "ssm": 4}),
        ("com lin", {"conv": 1, "ssm": 4}),
        ("rep real", {"conv": 15}),
        ("rep lin", {"conv": 6}),
    ],
)
@pytest.mark.parametrize("left", [0, 64])
def test_states(mixer, floats, left):
    """A layer keeps so many floats per channel for its mixer, and keys and values of the left context at 25 Hz."""
    state = conformer(mixer).init_state(3, left)
    cache = {"key": left // 2, "value": left // 2}
    assert state_sizes(state) == {kind: 2 * 24 * count for kind, count in (cache | floats).items()}
    assert all(tensor.shape[0] == 3 and not tensor.any() for _, tensor in leaves(state))


@pytest.mark.parametrize(
    "size, count",
    [
        (L, 108_027_904),
        (L | SSM, 107_871_232),
        (M, 25_555_200),
        (M | SSM, 25_481_472),
        (S, 8_149_392),
        (S | SSM, 8_107_920),
    ],
)
def test_parameter_counts(size, count):
    with torch.device("meta"):
        model = Conformer(ConformerConfig(**size))
    assert sum(p.numel() for p in model.parameters()) == count


def test_taps_of_a_mixer_are_its_impulse_response():
    impulse = torch.zeros(1, 5, 12)
    impulse[..., 0] = 1
    rep = ReparameterizedMixer(5, 8, 4, "real")
    torch.testing.assert_close(rep(impulse)[0, :, :8], rep.ssm(impulse)[0, :, :8])
    assert not rep(impulse)[..., 8:].any()
    com = StackedMixer(5, 3, 4, "lin")
    torch.testing.assert_close(com(impulse), com.ssm(com.conv(impulse)))
    conv = ConvMixer(5, 3)
    torch.testing.assert_close(conv(impulse)[0, :, :3], conv.taps())
    direct = DropInMixer(5, 4, "real")
    torch.testing.assert_close(direct(impulse)[0], direct.ssm.impulse_response(12))


def test_attention_by_its_definition():
    attention, x = RelativeAttention(8, 2, 0.0), torch.randn(1, 5, 8)
    positions = torch.randn(9, 8)  # -4 … 4
    hidden = torch.ones(5, 5, dtype=torch.bool).triu(2)
    out, key, value = attention(x, positions, Context(hidden, None))
    query, keys, values = (part[0].reshape(5, 2, 4) for part in attention.in_proj(x).chunk(3, dim=-1))
    position = attention.linear_pos(positions).reshape(9, 2, 4)
    mixed = torch.zeros(5, 2, 4)
    for head in range(2):
        for i in range(5):
            seen = range(min(i + 2, 5))
            by_content, by_position = query[i, head] + attention.content_bias_HQ[head], query[i, head]
            by_position = by_position + attention.position_bias_HQ[head]
            scores = [by_content @ keys[j, head] + by_position @ position[j - i + 4, head] for j in seen]
            weights = (torch.stack(scores) / 2).softmax(0)
            mixed[i, head] = sum(weight * values[j, head] for j, weight in zip(seen, weights, strict=True))
    torch.testing.assert_close(out[0], attention.out_proj(mixed.reshape(5, 8)))
    torch.testing.assert_close(key[0].reshape(5, 2, 4), keys)
    torch.testing.assert_close(value[0].reshape(5, 2, 4), values)


def test_batch_norm_is_that_of_the_frames_that_are_not_padding():
    ours, reference = MaskedBatchNorm(6), torch.nn.BatchNorm1d(6)
    for norm in (ours, reference):
        with torch.no_grad():
            norm.weight.copy_(torch.arange(6) + 1.0)
            norm.bias.copy_(torch.arange(6) - 2.0)
    lens = torch.tensor([20, 13, 5])
    padding = torch.arange(20) >= lens[:, None]
    for step in range(3):
        x = torch.randn(3, 6, 20) * 2 + step
        one, other = x.clone().requires_grad_(), x.clone().requires_grad_()
        ours_out = ours(one, padding).transpose(1, 2)[~padding]
        reference_out = reference(other.transpose(1, 2)[~padding])
        torch.testing.assert_close(ours_out, reference_out)
        weights = torch.randn_like(ours_out)
        (ours_out * weights).sum().backward()
        (reference_out * weights).sum().backward()
        torch.testing.assert_close(one.grad, other.grad)
        torch.testing.assert_close(ours.weight.grad, reference.weight.grad)
    x = torch.randn(3, 6, 20)
    torch.testing.assert_close(ours(x), reference(x))
    # A checkpoint of either class loads into the other.
    torch.testing.assert_close(ours.state_dict(), dict(reference.state_dict()))
    torch.testing.assert_close(ours.eval()(x, padding), reference.eval()(x))


@EVERY_MIXER
def test_half_precision_stays_close(mixer):
    model, x, lens = conformer(mixer).train(), torch.randn(2, 300, 20), torch.tensor([300, 201])
    exact = model.eval()(x, lens, 16, 64)[0]
    with torch.autocast("cpu", torch.bfloat16):
        half = model(x, lens, 16, 64)[0]
        model.train()(x, lens, 16, 64)[0].float().sum().backward()
    assert (half.float() - exact)[0].square().mean().sqrt() < 0.03 * exact[0].square().mean().sqrt()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"dim": 100}, "encoder.dim is 100; give a multiple of 16"),
        ({"mixer": "lstm"}, "encoder.mixer is 'lstm'; give one of none, conv, dir, com, rep"),
        ({"conv_kernel": 1}, "encoder.conv_kernel is 1; give a whole number from 2 to 4096"),
        ({"ssm_param": "lin", "ssm_states": 1}, "encoder.ssm_states is 1; give an even number for ssm_param lin"),
        ({"ssm_param": "diag"}, "encoder.ssm_param is 'diag'; give one of real, lin"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ConformerConfig(**settings)


def test_contexts_of_training_are_drawn_from_the_configuration():
    config = ConformerConfig(chunk_frames=(16, -1), left_context_frames=(64, 0))
    assert {config.draw_context() for _ in range(100)} == {(16, 64), (16, 0), (-1, 64), (-1, 0)}
