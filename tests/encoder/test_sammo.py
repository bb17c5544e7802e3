"""Tests of Sammo, the Zipformer with Mamba-2 in place of nonlin attention: sizes, streaming, long audio."""

import pytest
import torch
from test_golden import stream

from ssm_asr.encoder.schedule import set_batch_count
from ssm_asr.encoder.state import select_states, stack_states, state_sizes
from ssm_asr.encoder.zipformer import ZipformerConfig
from ssm_asr.search.encoding import encode_as_streamed, pad_to_chunks
from ssm_asr.transducer.model import ModelConfig, Transducer

TINY = {
    "layers": (1, 1, 2),
    "downsampling": (1, 2, 4),
    "dim": (32, 48, 64),
    "unmasked_dim": (24, 32, 24),
    "feedforward_dim": (48, 64, 64),
    "heads": (4, 4, 4),
    "conv_kernel": (15, 7, 7),
    "query_head_dim": 8,
    "value_head_dim": 6,
    "pos_dim": 16,
    "embed_channels": (4, 8, 16),
    "mamba_heads": 6,
    "mamba_groups": 2,
    "mamba_states": 8,
    "left_context_frames": (0,),
}
TOLERANCE = {"atol": 1e-4, "rtol": 0}
LONG_RANGE = ("mamba2", "none", "nonlin_attention")


def tiny(long_range: str = "mamba2") -> Transducer:
    """Makes a small model; its biases and scales are random too, so that every module has an effect."""
    torch.manual_seed(2)
    model = Transducer(ModelConfig(ZipformerConfig(**TINY, long_range=long_range), 24, 28), 29)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith((".weight", ".bias")) and parameter.ndim:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture(params=LONG_RANGE)
def model(request):
    return tiny(request.param)


def preset(groups: int, states: int, vocab_size: int = 3266, long_range: str = "mamba2") -> Transducer:
    """Makes a model of size M without memory for its weights."""
    with torch.device("meta"):
        encoder = ZipformerConfig(long_range=long_range, mamba_groups=groups, mamba_states=states)
        return Transducer(ModelConfig(encoder), vocab_size)


@pytest.mark.parametrize(
    "groups, states, floats", [(8, 16, 204_832), (4, 32, 273_952), (2, 64, 412_192), (1, 128, 688_672)]
)
def test_sizes_of_the_presets(groups, states, floats):
    model = preset(groups, states)
    assert sum(p.numel() for p in model.parameters()) == 71_677_277
    sizes = state_sizes(model.init_state(1, 0))
    assert sum(sizes.values()) == floats
    assert sizes["key"] == sizes["value1"] == sizes["value2"] == 0
    assert "processed" not in sizes


def test_without_long_range_module_only_its_parameters_are_missing():
    whole, without = preset(8, 16, long_range="nonlin_attention"), preset(8, 16, long_range="none")
    missing = set(whole.state_dict()) - set(without.state_dict())
    assert missing and all(".nonlin_attention." in key for key in missing)
    assert set(without.state_dict()) < set(whole.state_dict())


def test_long_range_is_checked():
    with pytest.raises(ValueError, match=r"encoder\.long_range is 'lstm'; give one of nonlin_attention, mamba2, none"):
        ZipformerConfig(long_range="lstm")
    with pytest.raises(ValueError, match="give numbers ¾ of which divides by mamba_heads"):
        ZipformerConfig(long_range="mamba2", mamba_heads=7)


@pytest.mark.parametrize("chunk, left", [(4, 0), (8, 0), (16, 0), (32, 0), (64, 0), (128, 0), (16, 32)])
@pytest.mark.parametrize("frames", [20, 333, 700])
def test_streaming_equals_offline(model, chunk, left, frames):
    torch.manual_seed(0)
    features = torch.randn(1, frames, 80)
    with torch.no_grad():
        streamed, _ = stream(model, pad_to_chunks(features[0], chunk)[None], chunk, left)
        whole, (valid,) = encode_as_streamed(model, features, torch.tensor([frames]), chunk, left)
    torch.testing.assert_close(streamed[:, :valid], whole[:, :valid], **TOLERANCE)


@pytest.mark.parametrize("chunk", [16, 64])
def test_streaming_equals_offline_over_ten_times_the_training_length(chunk):
    model, frames = tiny(), 4000
    torch.manual_seed(0)
    features = torch.randn(1, frames, 80)
    with torch.no_grad():
        streamed, _ = stream(model, pad_to_chunks(features[0], chunk)[None], chunk, 0)
        whole, (valid,) = encode_as_streamed(model, features, torch.tensor([frames]), chunk, 0)
    torch.testing.assert_close(streamed[:, :valid], whole[:, :valid], **TOLERANCE)


def test_streams_of_different_ages_in_one_batch(model):
    torch.manual_seed(0)
    features = torch.randn(2, 12 * 32 + 13, 80)
    with torch.no_grad():
        alone = [stream(model, features[b : b + 1], 16, 0)[0] for b in range(2)]
        old, new = model.init_state(1, 0), model.init_state(1, 0)
        for i in range(5):
            _, old = model.stream(features[:1, 32 * i : 32 * i + 45], old)
        state = stack_states([old, new])
        for i in range(7):
            begin_0, begin_1 = 32 * (i + 5), 32 * i
            chunk = torch.cat([features[:1, begin_0 : begin_0 + 45], features[1:, begin_1 : begin_1 + 45]])
            out, state = model.stream(chunk, state)
            torch.testing.assert_close(out[0], alone[0][0, 8 * (i + 5) : 8 * (i + 6)], **TOLERANCE)
            torch.testing.assert_close(out[1], alone[1][0, 8 * i : 8 * (i + 1)], **TOLERANCE)
            state = select_states(state, [0, 1])


def test_only_mamba_remembers_beyond_the_convolutions():
    """Without left context only the state-space module can remember what was heard 10 s ago."""
    torch.manual_seed(0)
    features = torch.randn(1, 1200, 80)
    changed = features.clone()
    changed[:, :100] += 3.0
    lens = torch.tensor([1200])
    for long_range, remembers in (("mamba2", True), ("none", False)):
        model = tiny(long_range)
        with torch.no_grad():
            one, two = (model.encode(x, lens, 16, 0)[0][:, -8:] for x in (features, changed))
        assert torch.equal(one, two) != remembers


def test_padding_cannot_touch_an_utterance():
    model = tiny()
    torch.manual_seed(0)
    features = torch.randn(2, 400, 80)
    with torch.no_grad():
        together, (_, count) = encode_as_streamed(model, features, torch.tensor([400, 211]), 16, 0)
        alone, _ = encode_as_streamed(model, features[1:, :211], torch.tensor([211]), 16, 0)
    torch.testing.assert_close(together[1, :count], alone[0, :count], **TOLERANCE)


def test_trains_with_finite_gradients_everywhere():
    model = tiny().train()
    set_batch_count(model, 1e6)
    out, _ = model.encode(torch.randn(3, 150, 80), torch.tensor([150, 120, 90]), 16, 0)
    out.square().mean().backward()
    for name, parameter in model.encoder.named_parameters():
        if ".mamba2." in name:
            assert parameter.grad is not None and bool(parameter.grad.isfinite().all()), name
            assert float(parameter.grad.abs().max()) > 0, name
