"""The Zipformer's streaming output equals the chunk-masked pass over the whole utterance, in batches of streams too."""

import pytest
import torch
from golden_model import golden_model
from test_golden import stream

from ssm_asr.encoder.state import Row, join_rows, leaves, select_states, stack_states, state_sizes
from ssm_asr.ops.attention import chunk_mask, shift_relative
from ssm_asr.search.encoding import encode_as_streamed, pad_to_chunks
from ssm_asr.units import embed_frames, output_frames

TOLERANCE = {"atol": 1e-4, "rtol": 0}


@pytest.fixture(scope="module")
def model():
    return golden_model("causal")[0]


@pytest.fixture(autouse=True)
def no_grad():
    torch.manual_seed(1)
    with torch.no_grad():
        yield


@pytest.mark.parametrize("chunk, left", [(4, 0), (4, 4), (8, 64), (16, 0), (16, 64), (32, 128), (64, 64), (128, 128)])
@pytest.mark.parametrize("frames", [20, 173, 700])
def test_streaming_equals_offline(model, chunk, left, frames):
    features = torch.randn(1, frames, 80)
    streamed, _ = stream(model, pad_to_chunks(features[0], chunk)[None], chunk, left)
    whole, (valid,) = encode_as_streamed(model, features, torch.tensor([frames]), chunk, left)
    assert valid == output_frames(frames)
    torch.testing.assert_close(streamed[:, :valid], whole[:, :valid], **TOLERANCE)


def test_a_batch_of_ragged_utterances_equals_each_alone(model):
    features, lens = torch.randn(3, 400, 80), torch.tensor([400, 211, 30])
    together, valid = encode_as_streamed(model, features, lens, 16, 64)
    for b, length in enumerate(lens.tolist()):
        alone, (count,) = encode_as_streamed(model, features[b : b + 1, :length], lens[b : b + 1], 16, 64)
        assert valid[b] == count
        torch.testing.assert_close(together[b, :count], alone[0, :count], **TOLERANCE)


def test_streams_of_different_ages_in_one_batch(model):
    features = torch.randn(2, 12 * 32 + 13, 80)
    alone = [stream(model, features[b : b + 1], 16, 64)[0] for b in range(2)]
    first, second = model.init_state(1, 64), model.init_state(1, 64)
    for i in range(5):  # the first stream is five chunks old when the second begins
        _, first = model.stream(features[:1, 32 * i : 32 * i + 45], first)
    state = stack_states([first, second])
    for i in range(7):
        chunk = torch.cat([features[:1, 32 * (i + 5) : 32 * (i + 5) + 45], features[1:, 32 * i : 32 * i + 45]])
        out, state = model.stream(chunk, state)
        torch.testing.assert_close(out[0], alone[0][0, 8 * (i + 5) : 8 * (i + 6)], **TOLERANCE)
        torch.testing.assert_close(out[1], alone[1][0, 8 * i : 8 * (i + 1)], **TOLERANCE)
    assert state.processed[0].tolist() == [12 * 16, 7 * 16]
    assert select_states(state, [1]).processed[0].tolist() == [7 * 16]


def test_rows_of_batches_are_joined(model):
    """Rows of one batch in its order are the batch itself; others are copied in the order that was asked for."""
    new, old = model.init_state(1, 64), model.init_state(3, 64)
    _, old = model.stream(torch.randn(3, 45, 80), old)
    assert join_rows([Row(old, 0), Row(old, 1), Row(old, 2)]) is old
    joined = join_rows([Row(old, 2), Row(old, 0), Row(new, 0), Row(new, 0), Row(old, 1)])
    expected = stack_states([select_states(old, [2, 0]), new, new, select_states(old, [1])])
    for (_, actual), (_, wanted) in zip(leaves(joined), leaves(expected), strict=True):
        assert torch.equal(actual, wanted)
    assert joined.processed[0].tolist() == [16, 16, 0, 0, 16]


def test_streaming_leaves_the_old_state_as_it_was(model):
    state = model.init_state(1, 64)
    before = [tensor.clone() for _, tensor in leaves(state)]
    model.stream(torch.randn(1, 45, 80), state)
    assert all(torch.equal(a, b) for a, (_, b) in zip(before, leaves(state), strict=True))


def test_the_future_beyond_the_chunk_is_not_seen(model):
    features = torch.randn(1, 2 * 16 * 6 + 13, 80)
    changed = features.clone()
    changed[:, 3 * 32 + 13 :] += 1.0  # the third chunk's look-ahead ends here
    lens = torch.tensor([features.shape[1]])
    one, two = (model.encode(x, lens, 16, 64)[0] for x in (features, changed))
    assert torch.equal(one[:, :24], two[:, :24])
    assert not torch.allclose(one[:, 24:], two[:, 24:])


def test_chunks_that_do_not_fit_are_refused(model):
    with pytest.raises(ValueError, match="multiple of 4"):
        model.stream(torch.randn(1, 2 * 6 + 13, 80), model.init_state(1, 64))


def test_chunk_mask_shows_whole_chunks_of_left_context():
    visible = ~chunk_mask(8, 2, 3, torch.device("cpu"))  # a left context of 3 frames is one chunk of 2
    assert visible.int().tolist()[5] == [0, 0, 1, 1, 1, 1, 0, 0]
    assert (~chunk_mask(8, 2, 0, torch.device("cpu"))).int().tolist()[5] == [0, 0, 0, 0, 1, 1, 0, 0]
    assert (~chunk_mask(8, 2, 1, torch.device("cpu"))).int().tolist()[5] == [0, 0, 1, 1, 1, 1, 0, 0]
    assert (~chunk_mask(8, 2, -1, torch.device("cpu"))).int().tolist()[5] == [1, 1, 1, 1, 1, 1, 0, 0]
    assert chunk_mask(8, -1, -1, torch.device("cpu")) is None


@pytest.mark.parametrize("frames, left", [(1, 0), (1, 5), (4, 0), (4, 6)])
def test_relative_shift(frames, left):
    keys = frames + left
    scores = torch.randn(2, 3, frames, keys + frames - 1)
    expected = torch.empty(2, 3, frames, keys)
    for i in range(frames):
        for j in range(keys):
            expected[..., i, j] = scores[..., i, j - i + frames - 1]
    assert torch.equal(shift_relative(scores), expected)


def test_state_sizes_are_those_of_one_stream(model):
    assert state_sizes(model.init_state(1, 64)) == state_sizes(model.init_state(3, 64))


@pytest.mark.parametrize("frames", [7, 9, 10, 11, 50])
def test_frame_counts(model, frames):
    out, lens = model.encode(torch.randn(1, max(frames, 9), 80), torch.tensor([frames]), 16, 64)
    assert lens.item() == output_frames(frames) == (embed_frames(frames) + 1) // 2
    if frames >= 9:
        assert out.shape[1] == output_frames(frames)
