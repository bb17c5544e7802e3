"""The front door: every way from audio to a result gives one result, and what cannot be used is refused in one line."""

import doctest
import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import toy
import trained_toy
from encoders import ENCODERS

import ssm_asr
from ssm_asr import api
from ssm_asr.data.features import AudioError, OnlineFbank
from ssm_asr.search import offline
from ssm_asr.search.encoding import encode_as_streamed

ROOT = Path(__file__).parent.parent
FOUR_ENCODERS = ("zipformer", "sammo", "conformer", "com_lin")


def recordings() -> list[np.ndarray]:
    """Four recordings of 0.45 to 2.2 s; one of no samples, and one of less than a frame."""
    rng = np.random.default_rng(0)
    texts = (" ".join(rng.choice(list(toy.PITCH_HZ), size=size)) for size in (4, 1, 6, 2))
    return [*(toy.tones(text, seed) for seed, text in enumerate(texts)), np.zeros(0, np.float32), np.ones(100) / 2]


def streamed(model: ssm_asr.Model, samples_S: np.ndarray, block_samples: int, **settings: object) -> ssm_asr.Result:
    """The result of one stream, whose audio comes in blocks."""
    with model.stream(**settings) as stream:
        for start in range(0, len(samples_S), block_samples):
            before = stream.result
            assert stream.push(samples_S[start : start + block_samples]) is stream.result
            assert stream.result.text.startswith(stream.settled_text)
            if settings["method"] == "greedy":
                assert stream.result.tokens[: len(before.tokens)] == before.tokens
    return stream.result


def streamed_together(model: ssm_asr.Model, audio: list[np.ndarray], **settings: object) -> list[ssm_asr.Result]:
    """The results of streams that are decoded in one batch, and begin one after the other."""
    recognizer = model.recognizer(**settings)
    streams = [recognizer.open() for _ in audio]
    sizes = set()
    for step in range(40):
        for k, (stream, samples_S) in enumerate(zip(streams, audio, strict=True)):
            begin = (step - 2 * k) * 1600
            if 0 <= begin < len(samples_S):
                stream.accept(samples_S[begin : begin + 1600])
            elif begin >= len(samples_S) and stream.frames_left is None:
                recognizer.finish(stream)
        while ready := [stream for stream in streams if recognizer.ready(stream)]:
            recognizer.decode(ready)
            sizes.add(len(ready))
    assert max(sizes) > 1
    return [recognizer.result(stream) for stream in streams]


@pytest.fixture(scope="module", params=FOUR_ENCODERS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ssm_asr.Model:
    encoder, left = ENCODERS[request.param]
    path = tmp_path_factory.mktemp(request.param) / "model.pt"
    toy.write_checkpoint(path, model={"encoder": encoder}, decode={"left_context_frames": left})
    return ssm_asr.load(path, device="cpu")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a trained toy model, averaged.pt, and recordings that it knows, a.wav and b.wav."""
    directory = tmp_path_factory.mktemp("trained")
    trained_toy.write_checkpoint(directory / "averaged.pt")
    for name in trained_toy.TEXTS:
        soundfile.write(directory / f"{name}.wav", trained_toy.recording(name), 16000, subtype="FLOAT")
    return directory


@pytest.fixture(scope="module")
def toy_model(trained: Path) -> ssm_asr.Model:
    return ssm_asr.load(trained / "averaged.pt", device="cpu")


# --- all ways are one


@pytest.mark.parametrize("method", ["greedy", "beam"])
@pytest.mark.parametrize("chunk", ["160ms", "0.32s", 64])
def test_every_way_gives_one_result(model: ssm_asr.Model, chunk: str | int, method: str) -> None:
    settings = {"chunk": chunk, "method": method}
    audio = recordings()
    together = model.transcribe(audio, **settings)
    assert together == [model.transcribe(samples_S, **settings) for samples_S in audio]
    assert together == [streamed(model, samples_S, 1600, **settings) for samples_S in audio]
    assert together[2] == streamed(model, audio[2], 7777, **settings)
    assert together == streamed_together(model, audio, **settings)
    assert together[-2:] == [ssm_asr.Result()] * 2
    assert len(together[2].tokens) > 10 and len({token for r in together for token in r.tokens}) > 2  # says something
    for samples_S, result in zip(audio, together, strict=True):
        assert len(result.times) == len(result.tokens)
        assert all(a < b for a, b in itertools.pairwise(result.times))  # at most one token a frame
        assert all(0 <= time_s < len(samples_S) / 16000 for time_s in result.times)


def test_long_recordings_go_chunk_by_chunk(model: ssm_asr.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    audio = recordings()
    expected = model.transcribe(audio)
    monkeypatch.setattr(offline, "LONGEST_IN_ONE_PASS", 50)
    monkeypatch.setattr(offline, "encode_as_streamed", None)
    assert model.transcribe(audio[:4]) == expected[:4]  # the others are too short


def test_defaults_are_the_checkpoints(model: ssm_asr.Model) -> None:
    left = model.loaded.experiment.decode.left_context_frames
    samples_S = recordings()[2]
    assert model.transcribe(samples_S) == model.transcribe(samples_S, chunk=16, left=left, method="greedy")
    assert model.transcribe(samples_S) != model.transcribe(samples_S, chunk=4)
    recognizer = model.recognizer()
    assert (recognizer.chunk, recognizer.left_context, recognizer.method) == (16, left, "greedy")


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("method", ["greedy", "beam"])
def test_whole_recordings(causal: bool, method: str, tmp_path: Path) -> None:
    """Batched or one by one, by default for a model that is not causal; the reference computes each frame's best."""
    toy.write_checkpoint(tmp_path / "model.pt", model={"encoder": ENCODERS["zipformer"][0] | {"causal": causal}})
    model = ssm_asr.load(tmp_path / "model.pt", "cpu")
    assert model.causal is causal
    audio = recordings()
    settings = {"method": method} | ({"chunk": None} if causal else {})
    results = model.transcribe(audio, **settings)
    assert results == [model.transcribe(samples_S, **settings) for samples_S in audio]
    assert model.transcribe(audio[2], chunk=-1, left=-1, method=method) == results[2]
    if causal:
        assert model.transcribe(audio[2], method=method) != results[2]
    if method == "greedy":
        assert (results[0].tokens, results[0].times) == tokens_and_times(model, audio[0])


@torch.no_grad()
def tokens_and_times(model: ssm_asr.Model, samples_S: np.ndarray) -> tuple[tuple[str, ...], tuple[float, ...]]:
    """Greedy search over a whole recording, written out."""
    transducer, tokenizer = model.loaded.model, model.loaded.tokenizer
    fbank = OnlineFbank()
    features_TF = torch.cat([fbank.push(samples_S), fbank.finish()])
    out_BSD, (count,) = encode_as_streamed(transducer, features_TF[None], torch.tensor([len(features_TF)]), -1, -1)
    context, tokens, times = [-1, 0], [], []
    for s in range(count):
        decoder_out = transducer.decoder(torch.tensor([context]), pad=False)[:, 0]
        best = int(transducer.joiner(out_BSD[:, s], decoder_out).argmax())
        if best not in (0, tokenizer.unk_id):
            context = [context[1], best]
            tokens.append(tokenizer.symbols[best])
            times.append(round(0.04 * s, 2))
    return tuple(tokens), tuple(times)


def test_what_is_said_is_recognised_when_it_is_said(toy_model: ssm_asr.Model, trained: Path) -> None:
    for name, text in trained_toy.TEXTS.items():
        expected = ssm_asr.Result(
            text,
            tuple(f"▁{word}" for word in text.split()),
            tuple(round(0.04 * frame, 2) for frame in trained_toy.emission_frames(name)),
        )
        path = trained / f"{name}.wav"
        for method, chunk in itertools.product(("greedy", "beam"), ("160ms", "320ms", "1.28s", None)):
            assert toy_model.transcribe(path, chunk, method=method) == expected
        assert toy_model.transcribe(str(path)) == expected
        assert toy_model.transcribe(torch.from_numpy(trained_toy.recording(name))) == expected
        assert toy_model.transcribe(trained_toy.recording(name).astype(np.float64)) == expected


def test_batches_and_windows(toy_model: ssm_asr.Model, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However little is held at a time, results come in order; what cannot be used costs only its own."""
    audio = [trained / "a.wav", trained / "none.wav", trained_toy.recording("b"), np.array([1, 2]), trained / "b.wav"]
    texts = [*trained_toy.TEXTS.values()]
    expected = [texts[0], f"{trained}/none.wav: no such file", texts[1], "audio 3: type int64: give floats", texts[1]]
    for window_s, batch_s in ((600.0, 200.0), (600.0, 4.0), (0.1, 0.1), (3.0, 600.0)):
        monkeypatch.setattr(api, "WINDOW_S", window_s)
        monkeypatch.setattr(api, "BATCH_S", batch_s)
        results = [str(r) if isinstance(r, AudioError) else r.text for r in toy_model.transcribe_each(iter(audio))]
        assert [result[: len(text)] for result, text in zip(results, expected, strict=True)] == expected
    assert toy_model.transcribe([]) == []


def test_batches_are_bounded() -> None:
    lengths_s = {n: float(length_s) for n, length_s in enumerate([10, 300, 90, 60, 100, 1, 1, 50])}
    batches = list(api._batches(lengths_s))
    assert sorted(itertools.chain(*batches)) == sorted(lengths_s)
    assert batches[0] == [1] and all(len(b) * max(lengths_s[n] for n in b) <= 200 for b in batches[1:])
    assert len(batches) == 4


# --- a stream


def test_a_stream_ends_with_its_block(toy_model: ssm_asr.Model) -> None:
    samples_S = trained_toy.recording("a")
    with toy_model.stream() as stream:
        stream.push(samples_S[:-8000])  # the last word is not there yet
        assert stream.result.text == "LOW HIGH"
    assert stream.result.text == "LOW HIGH MID"
    assert stream.finish() is stream.result  # ends once
    with pytest.raises(ValueError, match=r"^audio after finish\(\): open a new stream$"):
        stream.push(samples_S)
    with pytest.raises(RuntimeError), toy_model.stream() as stream:
        stream.push(samples_S[:-8000])
        raise RuntimeError
    assert stream.result.text == "LOW HIGH"  # after an error nothing is flushed


# --- what cannot be used


GOOD = np.zeros(8000, dtype=np.float32)
BAD_SAMPLES = [
    (np.stack([GOOD, GOOD]), "shape (2, 8000): give one channel, an array of shape (num_samples,)"),
    (np.zeros((8000, 1)), "shape (8000, 1): give one channel, an array of shape (num_samples,)"),
    (np.where(np.arange(8000) == 7, np.nan, GOOD), "NaN or infinite samples: 1 of them"),
    (torch.full((5,), torch.inf), "NaN or infinite samples: 5 of them"),
    (
        np.zeros(8000, dtype=np.int16),
        "type int16: give floats in [-1, 1]; 16-bit integers become so by samples / 32768",
    ),
    (
        torch.zeros(5, dtype=torch.int32),
        "type int32: give floats in [-1, 1]; 16-bit integers become so by samples / 32768",
    ),
    (GOOD + 8000, "samples up to 8000: give floats in [-1, 1]; 16-bit numbers become so by samples / 32768"),
    ((GOOD, 16000), "no audio but tuple: give an array or a tensor of samples"),
    (b"RIFF", "no audio but bytes: give an array or a tensor of samples"),
    (None, "no audio but NoneType: give an array or a tensor of samples"),
]


@pytest.mark.parametrize(("samples", "message"), BAD_SAMPLES)
def test_samples_that_cannot_be_used(toy_model: ssm_asr.Model, samples: object, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        toy_model.transcribe(samples)
    assert str(caught.value) == f"audio 0: {message}"
    with pytest.raises(ValueError) as caught:
        toy_model.transcribe([GOOD, samples])
    assert str(caught.value) == f"audio 1: {message}"
    stream = toy_model.stream()
    with pytest.raises(ValueError) as caught:
        stream.push(samples)
    assert str(caught.value) == f"samples: {message}"
    stream.push(trained_toy.recording("a"))
    assert stream.finish().text == "LOW HIGH MID"  # the stream goes on as if nothing had come


def test_files_that_cannot_be_used(toy_model: ssm_asr.Model, tmp_path: Path) -> None:
    stereo, text = tmp_path / "stereo.wav", tmp_path / "text.wav"
    soundfile.write(stereo, np.zeros((8000, 2)), 16000)
    text.write_text("no audio")
    for path, message in (
        (tmp_path / "none.wav", "no such file"),
        (stereo, "not mono: 2 channels; take the first with: sox"),
        (text, "truncated or no audio"),
    ):
        with pytest.raises(AudioError) as caught:
            toy_model.transcribe(path)
        assert str(caught.value).startswith(f"{path}: {message}") and "\n" not in str(caught.value)


def test_another_rate_is_converted_with_a_warning(
    toy_model: ssm_asr.Model, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "48k.wav"
    soundfile.write(path, np.repeat(trained_toy.recording("a"), 3), 48000)
    assert abs(len(toy_model.transcribe(path).tokens) - 3) < 3
    assert f"{path}: resampled from 48000 to 16000 Hz" in caplog.text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"chunk": "330ms"}, "time '330ms': no whole number of frames of 20 ms; give 320ms or 340ms"),
        ({"chunk": "20ms"}, "chunk of 1 frames (20 ms): give a multiple of 2 frames (40 ms)"),
        ({"left": 0.5}, "time 0.5: give it with its unit"),
        ({"left": "-2"}, "time '-2': give it with its unit"),
        ({"method": "best"}, "search method 'best': give greedy or beam"),
        ({"method": "beam", "beam": 0}, "beam of 0: give a positive number"),
    ],
)
def test_settings_that_cannot_be(toy_model: ssm_asr.Model, settings: dict, message: str) -> None:
    for start in (toy_model.stream, toy_model.recognizer, lambda **s: toy_model.transcribe(GOOD, **s)):
        with pytest.raises(ValueError) as caught:
            start(**settings)
        assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_what_a_kind_of_recognition_cannot_do(toy_model: ssm_asr.Model, tmp_path: Path) -> None:
    toy.write_checkpoint(tmp_path / "full.pt", model={"encoder": ENCODERS["zipformer"][0] | {"causal": False}})
    full = ssm_asr.load(tmp_path / "full.pt", "cpu")
    for start in (full.stream, lambda: full.transcribe(GOOD, chunk="320ms")):
        with pytest.raises(
            ValueError, match=r"^this model was trained without chunks .* recognises whole utterances only"
        ):
            start()
    with pytest.raises(ValueError, match=r"^chunk of -1, which is the whole utterance: streaming needs a chunk"):
        toy_model.stream(chunk=None)
    with pytest.raises(ValueError, match=r"^left context of -1 frames: with chunks, give 0 or more"):
        toy_model.stream(left=None)
    with pytest.raises(ValueError, match=r"^left context of 64 frames: whole utterances are decoded, which see all"):
        toy_model.transcribe(GOOD, chunk=None, left="1.28s")


def test_what_cannot_be_loaded(tmp_path: Path) -> None:
    (tmp_path / "text.pt").write_text("no checkpoint")
    for arguments, message in (
        ((tmp_path / "none.pt",), "none.pt: no such checkpoint"),
        ((str(tmp_path / "text.pt"),), "text.pt: no checkpoint of this program"),
        ((tmp_path / "none.pt", "gpu"), "device 'gpu': give auto, cpu or cuda"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            ssm_asr.load(*arguments)
        assert "\n" not in str(caught.value)


# --- the package


def test_the_examples_of_the_documentation(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(trained)
    result = doctest.testfile(str(ROOT / "docs" / "api.md"), module_relative=False)
    assert result.failed == 0 and result.attempted > 30


def test_importing_a_module_does_not_import_all() -> None:
    """Nor does the package itself; what it gives out is imported when it is used."""
    code = (
        "import sys, ssm_asr.units; assert not {'torch', 'numpy', 'lhotse'} & sys.modules.keys();"
        "import ssm_asr; assert 'load' in dir(ssm_asr) and not hasattr(ssm_asr, 'unknown');"
        "assert 'torch' not in sys.modules; ssm_asr.Result; assert 'torch' in sys.modules;"
        "from ssm_asr import *; assert load is ssm_asr.load and Stream and Model and __version__"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
