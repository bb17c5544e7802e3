"""Stock sherpa-onnx decodes exports as the project does, and the check says so when it does not."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import sherpa_onnx
import torch
import toy
from encoders import ENCODERS

from ssm_asr import checkpoint
from ssm_asr.checkpoint import Loaded, load_model
from ssm_asr.cli import check_export, export
from ssm_asr.data.features import OnlineFbank, make_fbank
from ssm_asr.data.store import read_cuts
from ssm_asr.evaluation.check_export import check_utterances
from ssm_asr.search import make_search
from ssm_asr.search.recognizer import StreamingRecognizer
from ssm_asr.search.scorer import TransducerScorer

CHUNK = 16
Captured = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def cuts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy.write_cuts(tmp_path_factory.mktemp("cuts"), "test-tones", 9)


def vary_ctc(path: Path, loaded: Loaded) -> None:
    """Makes the untrained CTC head of a checkpoint emit all tokens."""
    features_TF = torch.from_numpy(make_fbank().extract(toy.tones("LOW MID HIGH LOW HIGH MID"), 16000))
    with torch.inference_mode():
        out_BTD, _ = loaded.model.encode(features_TF[None], torch.tensor([len(features_TF)]))
    head = loaded.model.ctc_output[1]
    saved = checkpoint.load(path)
    # Larger weights would make more of the last digits of the encoder's output than an export may differ by.
    weight_VD = 5 * head.weight.detach() / out_BTD[0].std(dim=0)
    saved["model"] |= {"ctc_output.1.weight": weight_VD, "ctc_output.1.bias": -weight_VD @ out_BTD[0].mean(dim=0)}
    checkpoint.save(saved, path)


def exported(directory: Path, encoder: str, *options: str) -> tuple[Path, Path]:
    """A toy checkpoint and its export."""
    settings, left_context = ENCODERS[encoder]
    model, out = directory / f"{encoder}.pt", directory / "export"
    vary_ctc(model, toy.write_checkpoint(model, model={"encoder": settings}))
    arguments = ["--checkpoint", str(model), "--out", str(out), "--format", *options]
    if options[0] != "sherpa-offline":
        arguments += ["--chunk", str(CHUNK), "--left", str(left_context)]
    assert export.main(arguments) == 0
    return model, out


@pytest.mark.parametrize(
    ("encoder", "carrier"),
    [
        ("zipformer", "packed"),
        ("zipformer", "zipformer2"),
        ("zipformer_left0", "packed"),
        ("sammo", "packed"),
        ("conformer", "packed"),
        ("com_real", "packed"),
        ("dir_lin", "packed"),
    ],
)
def test_token_sequences_are_equal(cuts: Path, tmp_path: Path, encoder: str, carrier: str, capsys: Captured) -> None:
    """Every utterance, three streams of different ages at once. An untrained model emits in almost every frame."""
    model, out = exported(tmp_path, encoder, "sherpa", "--carrier", carrier)
    loaded = load_model(model)
    reference = StreamingRecognizer(loaded, CHUNK, ENCODERS[encoder][1], "greedy")
    assert check_utterances(out, "fp32", reference, list(read_cuts(cuts)), 3, "word")
    assert "fp32: 9 of 9 token sequences equal, 3 streams at once" in capsys.readouterr().out


def test_the_whole_check(cuts: Path, tmp_path: Path, capsys: Captured) -> None:
    """With a model that is silent in silence, so that there are endpoints."""
    model, out = exported(tmp_path, "sammo", "sherpa", "--precision", "fp32", "int8")
    options = ["--checkpoint", str(model), "--export", str(out), "--cuts", str(cuts)]
    assert check_export.main([*options, "--hours", "0.02"]) == 0
    printed = capsys.readouterr().out
    assert "9 of 9 token sequences equal" in printed and "one stream of 1 min" in printed
    assert printed.endswith("all as it should be\n")
    # Other weights than those that were exported.
    saved = checkpoint.load(model)
    saved["model"]["joiner.output_linear.bias"][1] += 3.0
    checkpoint.save(saved, model)
    assert check_export.main([*options, "--limit", "3"]) == 1
    printed = capsys.readouterr().out
    assert "of 3 token sequences equal" in printed and "3 of 3" not in printed and printed.endswith("FAILED\n")


def test_a_missing_file_is_no_end_of_the_process(cuts: Path, tmp_path: Path, capsys: Captured) -> None:
    model, out = exported(tmp_path, "conformer", "sherpa")
    options = ["--checkpoint", str(model), "--export", str(out), "--cuts", str(cuts)]
    assert check_export.main([*options, "--precision", "int8"]) == 2
    assert capsys.readouterr().err.startswith(f"{out / 'encoder.int8.onnx'}: no such file")


def features(samples_S: np.ndarray) -> torch.Tensor:
    """(T, F), as every runtime with kaldi-native-fbank computes them."""
    fbank = OnlineFbank()
    return torch.cat([fbank.push(samples_S), fbank.finish()])


def ctc_reference(loaded: Loaded, samples_S: np.ndarray, left_context: int) -> list[str]:
    """Best tokens of the CTC head frame by frame, repetitions and blanks removed."""
    features_TF = features(samples_S)
    state, best = loaded.model.init_state(1, left_context), []
    needed, hop = 2 * CHUNK + 13, 2 * CHUNK
    with torch.inference_mode():
        for start in range(0, len(features_TF) - needed, hop):  # the runtime waits for one frame more than it needs
            out_BSD, state = loaded.model.stream(features_TF[None, start : start + needed], state)
            best += loaded.model.ctc_output(out_BSD)[0].argmax(dim=-1).tolist()
    kept = [b for a, b in zip([0, *best], best, strict=False) if b not in (0, a)]
    return [loaded.tokenizer.symbols[b].replace("▁", " ") for b in kept]


@pytest.mark.parametrize("encoder", ["zipformer", "sammo"])
def test_ctc(tmp_path: Path, encoder: str) -> None:
    model, out = exported(tmp_path, encoder, "sherpa-ctc")
    recognizer = sherpa_onnx.OnlineRecognizer.from_zipformer2_ctc(
        tokens=str(out / "tokens.txt"), model=str(out / "model.onnx"), num_threads=1
    )
    loaded = load_model(model)
    utterances = [
        np.concatenate([toy.tones(text), np.zeros(7360, np.float32)]) for text in ("LOW MID", "HIGH MID LOW MID")
    ]
    streams = [recognizer.create_stream() for _ in utterances]
    for stream, samples_S in zip(streams, utterances, strict=True):
        stream.accept_waveform(16000, samples_S)
        stream.input_finished()
    while ready := [stream for stream in streams if recognizer.is_ready(stream)]:
        recognizer.decode_streams(ready)
    for stream, samples_S in zip(streams, utterances, strict=True):
        expected = ctc_reference(loaded, samples_S, ENCODERS[encoder][1])
        assert recognizer.tokens(stream) == expected and len(set(expected)) > 2


def offline_reference(loaded: Loaded, samples_S: np.ndarray) -> list[str]:
    """Greedy tokens of a whole utterance."""
    features_TF = features(samples_S)
    scorer = TransducerScorer(loaded.model, loaded.tokenizer.unk_id)
    search = make_search("greedy", scorer)
    with torch.inference_mode():
        out_BSD, lens_B = loaded.model.encode(features_TF[None], torch.tensor([len(features_TF)]))
        (state,) = search.step(scorer.project(out_BSD), lens_B.tolist(), [search.start()])
    return [loaded.tokenizer.symbols[token].replace("▁", " ") for token in search.tokens(state)]


@pytest.mark.parametrize("encoder", ["zipformer", "sammo", "com_real"])
def test_offline(tmp_path: Path, encoder: str) -> None:
    model, out = exported(tmp_path, encoder, "sherpa-offline")
    files = {part: str(out / f"{part}.onnx") for part in ("encoder", "decoder", "joiner")}
    recognizer = sherpa_onnx.OfflineRecognizer.from_transducer(**files, tokens=str(out / "tokens.txt"), num_threads=1)
    loaded = load_model(model)
    for text in ("LOW", "LOW MID", "HIGH MID LOW MID"):
        stream = recognizer.create_stream()
        stream.accept_waveform(16000, toy.tones(text))
        recognizer.decode_stream(stream)
        expected = offline_reference(loaded, toy.tones(text))
        assert stream.result.tokens == expected and len(set(expected)) > 1


def test_metadata_is_read_in_the_native_carrier(tmp_path: Path) -> None:
    """The runtime takes the sizes of its first states from the file: with another chunk and left context, too."""
    settings, _ = ENCODERS["zipformer"]
    toy.write_checkpoint(tmp_path / "model.pt", model={"encoder": settings})
    arguments = ["--checkpoint", str(tmp_path / "model.pt"), "--out", str(tmp_path / "out"), "--format", "sherpa"]
    assert export.main([*arguments, "--carrier", "zipformer2", "--chunk", "32", "--left", "128"]) == 0
    metadata = {entry.key: entry.value for entry in onnx.load(tmp_path / "out" / "encoder.onnx").metadata_props}
    assert (metadata["left_context_len"], metadata["T"], metadata["decode_chunk_len"]) == ("128,64", "77", "64")
