"""Streaming recognition equals the chunk-masked pass over the whole utterance, in whatever blocks the audio arrives."""

from pathlib import Path

import numpy as np
import pytest
import torch
import toy
from encoders import ENCODERS
from waits import Refuse

from ssm_asr.checkpoint import Loaded
from ssm_asr.data.features import OnlineFbank, make_fbank
from ssm_asr.data.tokens import train_tokenizer
from ssm_asr.encoder.state import leaves
from ssm_asr.search import make_search
from ssm_asr.search.audio_stream import AudioStream
from ssm_asr.search.encoding import encode_as_streamed, encode_by_chunks, streaming_context
from ssm_asr.search.greedy import GreedySearch
from ssm_asr.search.offline import OfflineRecognizer
from ssm_asr.search.recognizer import StreamingRecognizer
from ssm_asr.search.scorer import TransducerScorer
from ssm_asr.transducer.model import Transducer
from ssm_asr.units import LOG_MEL_SILENCE, NUM_MELS, output_frames


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    return toy.write_checkpoint(tmp_path_factory.mktemp("model") / "model.pt")


def recording(words: int, seed: int = 0) -> np.ndarray:
    """Makes the audio of so many random words."""
    rng = np.random.default_rng(seed)
    return toy.tones(" ".join(rng.choice(list(toy.PITCH_HZ), size=words)), seed)


def recognise(
    recognizer: StreamingRecognizer, samples_S: np.ndarray, block_samples: int
) -> tuple[tuple[int, ...], AudioStream]:
    """Pushes a recording in blocks into a new stream; returns the tokens and the stream."""
    stream = recognizer.open()
    for start in range(0, len(samples_S), block_samples):
        stream.accept(samples_S[start : start + block_samples])
        recognizer.decode_ready([stream])
    recognizer.finish(stream)
    recognizer.decode_ready([stream])
    return recognizer.tokens(stream), stream


def offline_tokens(loaded: Loaded, features_TF: torch.Tensor, chunk: int, left_context: int) -> tuple[int, ...]:
    """Recognises features by greedy search over the chunk-masked pass."""
    scorer = TransducerScorer(loaded.model, loaded.tokenizer.unk_id)
    search = make_search("greedy", scorer)
    with torch.inference_mode():
        out_BTD, lens = encode_as_streamed(
            loaded.model, features_TF[None], torch.tensor([len(features_TF)]), chunk, left_context
        )
        (state,) = search.step(scorer.project(out_BTD), lens, [search.start()])
    return search.tokens(state)


def online_features(samples_S: np.ndarray) -> torch.Tensor:
    fbank = OnlineFbank()
    return torch.cat([fbank.push(samples_S), fbank.finish()])


@pytest.mark.parametrize("chunk", [16, 32, 64, 128])
@pytest.mark.parametrize("left_context", [0, 64, 128])
def test_encoder_output_is_that_of_the_masked_pass(loaded: Loaded, chunk: int, left_context: int) -> None:
    """The outputs differ by at most 1e-4 for identical features, and by 1e-3 for features of the offline extractor."""
    samples_S = recording(9)
    features_TF = online_features(samples_S)
    visible = streaming_context(loaded.experiment.model.encoder, chunk, left_context)
    with torch.inference_mode():
        streamed_SD = encode_by_chunks(loaded.model, features_TF, chunk, visible)
    offline_TF = torch.from_numpy(make_fbank().extract(samples_S, 16000))
    assert len(offline_TF) == len(features_TF) > 300
    for masked_TF, tolerance in ((features_TF, 1e-4), (offline_TF, 1e-3)):
        with torch.inference_mode():
            out_BTD, (valid,) = encode_as_streamed(
                loaded.model, masked_TF[None], torch.tensor([len(masked_TF)]), chunk, left_context
            )
        assert valid == len(streamed_SD) == output_frames(len(features_TF))
        torch.testing.assert_close(streamed_SD, out_BTD[0, :valid], atol=tolerance, rtol=0)


@pytest.mark.parametrize("block_samples", [1600, 160, 777, 16001, 10**6])
@pytest.mark.parametrize("chunk", [16, 64])
def test_recognised_tokens_are_those_of_the_masked_pass(loaded: Loaded, chunk: int, block_samples: int) -> None:
    recognizer = StreamingRecognizer(loaded, chunk, 64)
    for seed, words in ((0, 1), (1, 4), (2, 9)):
        samples_S = recording(words, seed)
        expected = offline_tokens(loaded, online_features(samples_S), chunk, 64)
        tokens, stream = recognise(recognizer, samples_S, block_samples)
        assert tokens == expected
        assert stream.search_state.frames == output_frames(len(online_features(samples_S)))
        assert recognizer.text(stream) == loaded.tokenizer.decode(tokens)
    assert len(set(expected)) >= 3 and len(expected) < 0.9 * stream.search_state.frames  # varied tokens, and blanks


def test_streams_of_different_ages_share_a_batch(loaded: Loaded) -> None:
    """Streams begin and end at different times, and each gives the tokens that it gives alone."""
    recognizer = StreamingRecognizer(loaded, 16, 64)
    recordings = [recording(words, seed) for seed, words in enumerate((9, 2, 5, 1, 7))]
    expected = [recognise(recognizer, samples_S, 1600)[0] for samples_S in recordings]
    streams: list[AudioStream] = []
    sizes = set()
    for step in range(60):
        if step % 5 == 0 and len(streams) < len(recordings):
            streams.append(recognizer.open())
        for k, stream in enumerate(streams):
            begin = (step - 5 * k) * 1600
            if begin < len(recordings[k]):
                stream.accept(recordings[k][begin : begin + 1600])
            elif stream.frames_left is None:
                recognizer.finish(stream)
        while step % 4 == 0 and (ready := [stream for stream in streams if recognizer.ready(stream)]):
            recognizer.decode(ready)
            sizes.add(len(ready))
    assert [recognizer.tokens(stream) for stream in streams] == expected
    assert sizes >= {1, 2, 3}


@pytest.mark.parametrize("num_samples", [0, 1, 100, 400, 1000, 1500, 2000])
@pytest.mark.parametrize("chunk", [4, 16])
def test_very_short_audio(loaded: Loaded, num_samples: int, chunk: int) -> None:
    recognizer = StreamingRecognizer(loaded, chunk, 64)
    samples_S = recording(1)[:num_samples]
    tokens, stream = recognise(recognizer, samples_S, 160)
    features_TF = online_features(samples_S)
    assert stream.search_state.frames == output_frames(len(features_TF))
    expected = offline_tokens(loaded, features_TF, chunk, 64) if len(features_TF) else ()
    assert tokens == expected
    if num_samples < 1000:
        assert tokens == () and recognizer.text(stream) == ""


@pytest.mark.parametrize("extra", [-1, 0, 1])
def test_audio_of_about_one_chunk(loaded: Loaded, extra: int) -> None:
    """The audio has 44, 45 or 46 feature frames, where a chunk of 16 frames of 20 ms takes 45."""
    recognizer = StreamingRecognizer(loaded, 16, 64)
    samples_S = recording(3)[: (recognizer.frames_needed + extra) * 160]
    features_TF = online_features(samples_S)
    assert len(features_TF) == 45 + extra
    tokens, stream = recognise(recognizer, samples_S, 160)
    assert tokens == offline_tokens(loaded, features_TF, 16, 64)
    assert stream.search_state.frames == output_frames(45 + extra)


def test_short_utterances_in_a_whole_pass(loaded: Loaded) -> None:
    """Utterances that are too short for an encoder frame do no harm, alone or in a batch with others."""
    for chunk in (16, -1):
        for lens in ([3], [1, 8, 60], [9]):
            features_BTF = torch.full((len(lens), max(lens), NUM_MELS), LOG_MEL_SILENCE)
            with torch.inference_mode():
                out_BTD, valid = encode_as_streamed(loaded.model, features_BTF, torch.tensor(lens), chunk, 64)
            assert valid == [output_frames(n) for n in lens] and out_BTD.shape[1] >= max(valid)
            assert out_BTD.isfinite().all()


def test_a_stream_ends_once(loaded: Loaded) -> None:
    recognizer = StreamingRecognizer(loaded)
    stream = recognizer.open()
    stream.accept(recording(2))
    recognizer.finish(stream)
    with pytest.raises(ValueError, match=r"audio after finish\(\): open a new stream"):
        stream.accept(recording(1))
    with pytest.raises(ValueError, match=r"finish\(\) was called before: a stream ends once"):
        recognizer.finish(stream)


def test_a_stream_that_is_not_ready_is_refused(loaded: Loaded) -> None:
    recognizer = StreamingRecognizer(loaded)
    waiting, full = recognizer.open(), recognizer.open()
    full.accept(recording(3))
    with pytest.raises(ValueError, match=r"a stream without a whole chunk to decode: ask ready\(\) first"):
        recognizer.decode([full, waiting])
    recognizer.decode([full])
    assert full.search_state.frames == 8


@pytest.mark.parametrize(
    ("chunk", "left", "message"),
    [
        (0, 64, "chunk of 0 frames (0 ms): give a multiple of 2 frames (40 ms)"),
        (-1, 64, "chunk of -1, which is the whole utterance: streaming needs a chunk, such as 320ms"),
        (15, 64, "chunk of 15 frames (300 ms): give a multiple of 2 frames (40 ms)"),
        (16, -1, "left context of -1 frames: with chunks, give 0 or more (frames of 20 ms)"),
    ],
)
def test_chunks_that_do_not_fit(loaded: Loaded, chunk: int, left: int, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        StreamingRecognizer(loaded, chunk, left)
    assert str(caught.value) == message


@torch.no_grad()
@pytest.mark.parametrize("chunk", [-1, 16])
@pytest.mark.parametrize("downsampling", [[1, 4], [2, 3]])
def test_an_utterance_does_not_depend_on_its_batch(chunk: int, downsampling: list[int], tmp_path: Path) -> None:
    encoder = {**toy.EXPERIMENT["model"]["encoder"], "downsampling": downsampling, "chunk_frames": [12, -1]}
    model = toy.write_checkpoint(tmp_path / "model.pt", model={"encoder": encoder}).model
    chunk = chunk if chunk < 0 else model.config.encoder.chunk_multiple
    lens = [40, 95, 96, 97, 98, 99, 100, 131]
    features_BTF = 3 * torch.randn(len(lens), max(lens), 80, generator=torch.Generator().manual_seed(0)) - 5
    together, frames = encode_as_streamed(model, features_BTF, torch.tensor(lens), chunk, -1)
    for b, length in enumerate(lens):
        alone, (count,) = encode_as_streamed(model, features_BTF[b : b + 1, :length], torch.tensor([length]), chunk, -1)
        assert count == frames[b]
        torch.testing.assert_close(together[b, :count], alone[0, :count], atol=2e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize(("downsampling", "multiple"), [([1, 1], 2), ([2, 3], 6), ([4, 6], 12)])
def test_a_chunk_has_whole_frames_of_every_stack(downsampling: list[int], multiple: int, tmp_path: Path) -> None:
    encoder = {**toy.EXPERIMENT["model"]["encoder"], "downsampling": downsampling, "chunk_frames": [-1]}
    model = toy.write_checkpoint(tmp_path / "model.pt", model={"encoder": encoder}).model
    assert model.config.encoder.chunk_multiple == multiple
    with pytest.raises(ValueError, match=f"give a multiple of {multiple} "):
        streaming_context(model.config.encoder, multiple // 2, 0)
    left = streaming_context(model.config.encoder, multiple, 2 * multiple)
    features_TF = 3 * torch.randn(150, 80, generator=torch.Generator().manual_seed(0)) - 5
    streamed_SD = encode_by_chunks(model, features_TF, multiple, left)
    whole_BSD, (count,) = encode_as_streamed(model, features_TF[None], torch.tensor([150]), multiple, left)
    torch.testing.assert_close(whole_BSD[0, :count], streamed_SD, atol=2e-5, rtol=1e-4)


def test_settings(loaded: Loaded, tmp_path: Path) -> None:
    recognizer = StreamingRecognizer(loaded)
    assert (recognizer.chunk, recognizer.left_context, recognizer.method, recognizer.beam) == (16, 64, "greedy", 4)
    assert StreamingRecognizer(loaded, 128, 64).left_context == 128  # left context is whole chunks, at least one
    assert StreamingRecognizer(loaded, 16, 0).left_context == 0
    with pytest.raises(ValueError, match="beam of 0"):
        StreamingRecognizer(loaded, method="beam", beam=0)
    encoder = {**toy.EXPERIMENT["model"]["encoder"], "causal": False}
    full = toy.write_checkpoint(tmp_path / "full.pt", model={"encoder": encoder})
    with pytest.raises(ValueError, match="trained without chunks"):
        StreamingRecognizer(full)


def test_beam_search_streams(loaded: Loaded) -> None:
    whole, chunked = (
        recognise(StreamingRecognizer(loaded, 16, 64, "beam", 3), recording(5), block)[0] for block in (10**6, 1600)
    )
    assert whole == chunked and len(whole) > 3


@pytest.mark.parametrize("name", ENCODERS)
@torch.inference_mode()
def test_what_a_gpu_captures_waits_for_nothing(name: str) -> None:
    """A chunk of streams, a batch of whole utterances, and the steps of greedy search."""
    encoder, left_context = ENCODERS[name]
    experiment = toy.experiment(model={"encoder": encoder})
    tokenizer = train_tokenizer(["A B C"], "word")
    model = Transducer(experiment.model, tokenizer.vocab_size).eval()
    loaded = Loaded(model, experiment, tokenizer, {})
    streaming = StreamingRecognizer(loaded, 16, left_context)
    state = model.init_state(3, streaming.left_context)
    whole = OfflineRecognizer(loaded, 16, left_context)
    with Refuse():
        streaming._encode_chunk(torch.randn(3, streaming.frames_needed, 80), *(x for _, x in leaves(state)))
        (out_BSJ,) = whole._project_encoded(torch.randn(2, 269, 80), torch.tensor([269, 200]), 16, left_context)
        context_BC = torch.tensor([[-1, 0], [2, 1]])
        GreedySearch(whole._scorer)._steps(out_BSJ, torch.tensor([60, 50]), torch.tensor([0, 3]), context_BC, 4)
