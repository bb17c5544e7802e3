"""Compares the outputs and streaming states of the Zipformer transducer with golden arrays."""

import math

import pytest
import torch
from golden_model import golden_model, load
from torch.nn.functional import pad

from ssm_asr.encoder.attention import RelativePositions
from ssm_asr.encoder.convolution import ChunkCausalConv
from ssm_asr.encoder.state import leaves

TOLERANCE = {"atol": 1e-4, "rtol": 0}
SCALING = load("scaling.npz")


@pytest.fixture(scope="module")
def causal():
    return golden_model("causal")


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def stream(model, features_BTF, chunk, left_context):
    """Encodes features chunk by chunk; returns the whole output and the last state."""
    state, outputs = model.init_state(features_BTF.shape[0], left_context), []
    hop = 2 * chunk
    for start in range(0, features_BTF.shape[1] - hop - 12, hop):
        out, state = model.stream(features_BTF[:, start : start + hop + 13], state)
        outputs.append(out)
    return torch.cat(outputs, dim=1), state


@pytest.mark.parametrize("name", ["causal", "full"])
def test_front_end(name):
    model, golden = golden_model(name)
    embed, lens = model.encoder_embed(golden["feats"], golden["feat_lens"])
    torch.testing.assert_close(embed, golden["embed_out"], **TOLERANCE)
    assert torch.equal(lens, golden["embed_lens"])


@pytest.mark.parametrize("chunk, left", [(-1, -1), (16, 64), (32, 32)])
def test_chunk_masked_encoder(causal, chunk, left):
    model, golden = causal
    out, lens = model.encode(golden["feats"], golden["feat_lens"], chunk, left)
    torch.testing.assert_close(out, golden[f"encoder_out/chunk{chunk}_left{left}"], **TOLERANCE)
    assert torch.equal(lens, golden["encoder_out_lens"])


def test_non_causal_encoder():
    model, golden = golden_model("full")
    out, lens = model.encode(golden["feats"], golden["feat_lens"])
    torch.testing.assert_close(out, golden["encoder_out/full"], **TOLERANCE)
    assert torch.equal(lens, golden["encoder_out_lens"])


@pytest.mark.parametrize("name, out", [("causal", "chunk32_left32"), ("full", "full")])
def test_predictor_and_joiner(name, out):
    model, golden = golden_model(name)
    encoder_out = golden[f"encoder_out/{out}"]
    decoder_out = model.decoder(golden["tokens"])
    torch.testing.assert_close(decoder_out, golden["decoder_out"], **TOLERANCE)
    torch.testing.assert_close(
        model.decoder(golden["tokens"][:, :2], pad=False), golden["decoder_out_nopad"], **TOLERANCE
    )
    logits = model.joiner(encoder_out[:, :4, None], decoder_out[:, None])
    torch.testing.assert_close(logits, golden["joiner_out"], **TOLERANCE)
    torch.testing.assert_close(model.simple_am_proj(encoder_out), golden["simple_am"], **TOLERANCE)
    torch.testing.assert_close(model.simple_lm_proj(decoder_out), golden["simple_lm"], **TOLERANCE)


def test_streaming_output_and_final_state(causal):
    model, golden = causal
    out, state = stream(model, golden["feats"][:1], 16, 64)
    torch.testing.assert_close(out, golden["stream_out"], **TOLERANCE)
    for index, (name, tensor) in enumerate(leaves(state.encoder)):
        expected = golden[f"stream_final_state/{index:03d}"]
        if name.endswith("nonlin_BLN"):
            expected = expected[0]
        elif not name.endswith("BDM"):
            expected = expected.transpose(0, 1)  # the golden file has time first
        torch.testing.assert_close(tensor, expected, **TOLERANCE, msg=lambda text, n=name: f"{n}: {text}")
    torch.testing.assert_close(state.embed_BCTW, golden["stream_final_state/024"], **TOLERANCE)
    assert torch.equal(state.processed[0], golden["stream_final_state/025"])


def test_streaming_with_a_padded_last_chunk(causal):
    model, golden = causal
    features = golden["feats"][:1]
    features = pad(features, (0, 0, 0, 3 * 64 + 13 - features.shape[1]), value=math.log(1e-10))
    out, _ = stream(model, features, 32, 64)
    torch.testing.assert_close(out, golden["stream32_left64_padded_out"], **TOLERANCE)


@pytest.mark.parametrize("frames, left, name", [(9, 0, "T9"), (4, 6, "T4_left6")])
def test_relative_positions(frames, left, name):
    table = RelativePositions(16).eval()(torch.zeros(1, frames, 1), left)
    torch.testing.assert_close(table, SCALING[f"RelPos/{name}"][0], atol=1e-5, rtol=0)


@pytest.fixture
def conv():
    module = ChunkCausalConv(5, 7)
    prefix = "ChunkCausalConv/param/"
    module.load_state_dict({k.removeprefix(prefix): v for k, v in SCALING.items() if k.startswith(prefix)})
    return module


@pytest.mark.parametrize("chunk", [-1, 2, 4, 8])
def test_chunk_causal_convolution(conv, chunk):
    out = conv(SCALING["ChunkCausalConv/x"], chunk)
    torch.testing.assert_close(out, SCALING[f"ChunkCausalConv/chunk{chunk}"], atol=1e-5, rtol=1e-5)


def test_chunk_causal_convolution_streamed(conv):
    x, cache, outputs = SCALING["ChunkCausalConv/x"], torch.zeros(2, 5, 3), []
    for part in x.split(4, dim=2):
        out, cache = conv.stream(part, cache)
        outputs.append(out)
    torch.testing.assert_close(torch.cat(outputs, dim=2), SCALING["ChunkCausalConv/stream4"], atol=1e-5, rtol=1e-5)
