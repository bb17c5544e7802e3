"""The programs after training: what they print, what they write, and what they say to a mistake."""

import importlib
import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import toy
from lhotse import CutSet
from lhotse.audio import AudioSource
from lhotse.utils import fastcopy

from ssm_asr import checkpoint, cli
from ssm_asr.cli import VERBS, average, check_streaming, decode, describe, prepare, program, report, stream, train
from ssm_asr.config import load_experiment, to_yaml
from ssm_asr.evaluation import check_streaming as evaluation_of_streaming
from ssm_asr.training.averaging import RunningAverage

ROOT = Path(__file__).parent.parent.parent
CONF = ROOT / "egs" / "librispeech" / "conf"
Captured = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of an untrained toy model."""
    path = tmp_path_factory.mktemp("exp") / "model.pt"
    toy.write_checkpoint(path)
    return path


@pytest.fixture(scope="module")
def cuts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy.write_cuts(tmp_path_factory.mktemp("cuts"), "test-tones", 7)


@pytest.fixture
def odd_cuts(cuts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Good cuts; beside them, where the test then works, are manifests that are odd in one way each."""
    monkeypatch.chdir(tmp_path)
    for name in ("cuts", "cuts_cuts"):
        Path(f"{name}.jsonl.gz").write_bytes(cuts.read_bytes())
    some = CutSet.from_file(cuts).to_eager().subset(first=3)
    some.map(lambda cut: cut.drop_features().resample(8000)).to_file("slow.jsonl.gz")
    some.drop_supervisions().to_file("silent.jsonl.gz")
    CutSet.from_cuts(cut.with_id("same") for cut in some).to_file("same.jsonl.gz")
    CutSet.from_cuts(cut.drop_supervisions() if n == 0 else cut for n, cut in enumerate(some)).to_file("half.jsonl.gz")
    CutSet.from_cuts(fastcopy(cut, recording=None) for cut in some).to_file("features.jsonl.gz")
    return cuts


def hypotheses(directory: Path) -> dict[str, tuple[str, str]]:
    rows = (directory / "hypotheses.tsv").read_text(encoding="utf-8").splitlines()
    assert rows[0] == "id\treference\thypothesis"
    return {row.split("\t")[0]: tuple(row.split("\t")[1:]) for row in rows[1:]}


@pytest.mark.parametrize("verb", list(VERBS))
def test_help(verb: str, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", [verb, "--help"])
    with pytest.raises(SystemExit) as caught:
        importlib.import_module(f"ssm_asr.cli.{verb.replace('-', '_')}").main()
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert f"ssm-asr {verb}" in out and out.count("--") > 2


TIMED = {  # programs with chunks: what they need, and the options that take times
    "decode": (["--checkpoint", "x", "--cuts", "x"], ["--chunk", "--left"]),
    "stream": (["--checkpoint", "x", "--cuts", "x"], ["--chunk", "--left"]),
    "transcribe": (["--checkpoint", "x", "x"], ["--chunk", "--left"]),
    "export": (["--checkpoint", "x", "--format", "sherpa", "--out", "x"], ["--chunk", "--left"]),
    "describe": (["--config", "x", "--vocab-size", "6"], ["--chunk", "--left"]),
    "long-form": (["--checkpoint", "x", "--cuts", "x"], ["--chunk", "--left"]),
    "check-streaming": (["--checkpoint", "x", "--cuts", "x"], ["--chunks", "--left"]),
    "compare": (["--checkpoints", "x", "--cuts", "x", "--out", "x"], ["--chunks", "--left"]),
}


@pytest.mark.parametrize(
    ("verb", "option"), [(verb, option) for verb, (_, options) in TIMED.items() for option in options]
)
def test_times_are_written_alike(verb: str, option: str, capsys: Captured) -> None:
    main = importlib.import_module(f"ssm_asr.cli.{verb.replace('-', '_')}").main
    for written, message in (
        ("330ms", "time '330ms': no whole number of frames of 20 ms; give 320ms or 340ms"),
        ("1.5", "time '1.5': give it with its unit, such as 320ms or 1.28s, or as a number of frames of 20 ms"),
    ):
        with pytest.raises(SystemExit) as caught:
            main([*TIMED[verb][0], option, written])
        assert caught.value.code == 2
        assert f"error: argument {option}: {message}" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "frames of 20 ms" in " ".join(capsys.readouterr().out.split())
    for written in ("320ms", "0.32s", "16"):  # and then it fails for want of a checkpoint or a configuration
        assert main([*TIMED[verb][0], option, written]) == 2
        assert capsys.readouterr().err.startswith("x: no ")


def test_a_time_is_one_time(model: Path, capsys: Captured) -> None:
    config = model.parent / "times.yaml"
    config.write_text(json.dumps(checkpoint.load(model)["config"]), encoding="utf-8")
    printed = set()
    for chunk, left in (("320ms", "1.28s"), ("0.32s", "1280ms"), ("16", "64")):
        assert describe.main(["--config", str(config), "--vocab-size", "6", "--chunk", chunk, "--left", left]) == 0
        printed.add(capsys.readouterr().out)
    assert len(printed) == 1 and "chunk 16 frames = 320 ms, left context 64 frames = 1280 ms" in printed.pop()


def test_a_missing_package_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    for name in ("ssm_asr.cli.check_export", "ssm_asr.evaluation.check_export"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "sherpa_onnx", None)
    monkeypatch.setattr("sys.argv", ["ssm-asr"])
    with pytest.raises(SystemExit) as caught:
        cli.start("check-export")
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error == "ssm-asr check-export: needs the package sherpa_onnx; pip install 'ssm-asr[export]'\n"


# --- decode and stream


@pytest.mark.parametrize("chunk", [16, 32])
def test_decode_and_stream_agree(model: Path, cuts: Path, chunk: int, tmp_path: Path, capsys: Captured) -> None:
    common = ["--checkpoint", str(model), "--cuts", str(cuts), "--chunk", f"{20 * chunk}ms", "--left", "1.28s"]
    assert decode.main([*common, "--out", str(tmp_path / "decode"), "--device", "cpu"]) == 0
    assert stream.main([*common, "--out", str(tmp_path / "stream")]) == 0
    out = capsys.readouterr().out
    assert out.count("test-tones: WER ") == 2 and "ms a chunk" in out and "real-time factor" in out
    decoded, streamed = (hypotheses(tmp_path / name) for name in ("decode", "stream"))
    assert decoded == streamed and len(decoded) == 7
    assert len({hypothesis for _, hypothesis in decoded.values()}) > 4
    masked, chunked = (
        json.loads((tmp_path / name / "summary.json").read_text(encoding="utf-8")) for name in ("decode", "stream")
    )
    for key in ("error_rate", "interval", "errors", "chunk_frames", "left_context_frames", "method", "utterances"):
        assert masked[key] == chunked[key], key
    assert (masked["mode"], chunked["mode"]) == ("chunk-masked", "streaming")
    facts = json.loads(describe_json(model, chunk, capsys))
    assert masked["state_bytes"] is None and chunked["state_bytes"] == facts["state_bytes"]
    assert chunked["audio_s"] == pytest.approx(masked["audio_s"], abs=0.01)
    assert chunked["lag_ms"] > facts["largest_delay_ms"]
    assert chunked["real_time_factor"] > 0 and chunked["streams"] == 1


@pytest.mark.parametrize("streams", [3, 20])
def test_many_streams_at_once(model: Path, cuts: Path, streams: int, tmp_path: Path) -> None:
    """Streams end at different times, and others take their places; each result is the one of a stream alone."""
    common = ["--checkpoint", str(model), "--cuts", str(cuts), "--chunk", "320ms", "--left", "1.28s"]
    assert stream.main([*common, "--out", str(tmp_path / "alone")]) == 0
    assert stream.main([*common, "--out", str(tmp_path / "together"), "--streams", str(streams)]) == 0
    assert hypotheses(tmp_path / "together") == hypotheses(tmp_path / "alone")
    alone, together = (json.loads((tmp_path / n / "summary.json").read_text()) for n in ("alone", "together"))
    assert together["streams"] == streams and together["audio_s"] == pytest.approx(alone["audio_s"], abs=0.01)


def test_streams_must_be_positive(model: Path, cuts: Path, capsys: Captured) -> None:
    assert stream.main(["--checkpoint", str(model), "--cuts", str(cuts), "--streams", "0"]) == 2
    assert capsys.readouterr().err == "--streams 0: give 1 or more\n"


@pytest.mark.parametrize("program", ["decode", "stream", "together"])
def test_an_unreadable_cut_costs_itself(
    model: Path, cuts: Path, program: str, tmp_path: Path, capsys: Captured
) -> None:
    """It counts as wholly deleted, is named, and changes the exit status; all others are as without it."""
    whole = CutSet.from_file(cuts).to_eager()
    gone = whole[2].recording.sources[0].source
    spoilt = [
        fastcopy(cut, features=None, recording=fastcopy(cut.recording, sources=[AudioSource("file", [0], "/none.wav")]))
        if cut.recording.sources[0].source == gone
        else cut
        for cut in whole
    ]
    CutSet.from_cuts(spoilt).to_file(tmp_path / "cuts_spoilt.jsonl.gz")
    lost = [cut.id for cut in whole if cut.recording.sources[0].source == gone]
    main = decode.main if program == "decode" else stream.main
    common = ["--checkpoint", str(model), "--device", "cpu", *(["--streams", "3"] if program == "together" else [])]
    assert main([*common, "--cuts", str(cuts), "--out", str(tmp_path / "whole")]) == 0
    capsys.readouterr()
    assert main([*common, "--cuts", str(tmp_path / "cuts_spoilt.jsonl.gz"), "--out", str(tmp_path / "spoilt")]) == 1
    printed = capsys.readouterr()
    for name in lost:
        assert f"cut {name}: " in printed.err and "/none.wav" in printed.err
    assert "Traceback" not in printed.err and "spoilt: WER " in printed.out
    expected, found = hypotheses(tmp_path / "whole"), hypotheses(tmp_path / "spoilt")
    assert found == {i: (ref, "" if i in lost else hyp) for i, (ref, hyp) in expected.items()}
    summary = json.loads((tmp_path / "spoilt" / "summary.json").read_text(encoding="utf-8"))
    assert summary["missing"] == lost and len(summary["faults"]) == len(lost)
    assert summary["deletions"] >= sum(len(expected[i][0].split()) for i in lost)


def describe_json(model: Path, chunk: int, capsys: Captured) -> str:
    config = model.parent / "config.yaml"
    config.write_text(json.dumps(checkpoint.load(model)["config"]), encoding="utf-8")
    vocab_size = checkpoint.load_model(model).tokenizer.vocab_size
    options = ["--config", str(config), "--vocab-size", str(vocab_size), "--chunk", str(chunk), "--left", "64"]
    assert describe.main([*options, "--json"]) == 0
    return capsys.readouterr().out


def test_defaults_are_the_checkpoints(model: Path, cuts: Path) -> None:
    assert decode.main(["--checkpoint", str(model), "--cuts", str(cuts)]) == 0
    summary = json.loads((model.parent / "decode-test-tones-model-chunk16-left64-greedy" / "summary.json").read_text())
    assert (summary["chunk_frames"], summary["left_context_frames"], summary["beam"]) == (16, 64, None)
    assert summary["checkpoint"] == str(model)
    options = ["--chunk", "-1", "--method", "beam", "--beam", "2"]
    assert decode.main(["--checkpoint", str(model), "--cuts", str(cuts), *options]) == 0
    summary = json.loads((model.parent / "decode-test-tones-model-chunk-1-left-1-beam2" / "summary.json").read_text())
    assert (summary["mode"], summary["chunk_frames"], summary["beam"]) == ("whole utterance", -1, 2)


def test_the_left_context_that_is_seen_is_the_one_reported(model: Path, cuts: Path, tmp_path: Path) -> None:
    """A chunk of 128 sees whole chunks of left context: decode and stream say so alike."""
    for verb in (decode, stream):
        options = ["--checkpoint", str(model), "--cuts", str(cuts), "--chunk", "128", "--left", "64"]
        assert verb.main([*options, "--out", str(tmp_path)]) == 0
        assert json.loads((tmp_path / "summary.json").read_text())["left_context_frames"] == 128


def test_a_model_without_chunks_decodes_whole_utterances(cuts: Path, tmp_path: Path, capsys: Captured) -> None:
    encoder = {**toy.EXPERIMENT["model"]["encoder"], "causal": False}
    toy.write_checkpoint(tmp_path / "full.pt", model={"encoder": encoder})
    options = ["--checkpoint", str(tmp_path / "full.pt"), "--cuts", str(cuts)]
    assert decode.main([*options, "--out", str(tmp_path / "out")]) == 0
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["mode"] == "whole utterance"
    assert stream.main(options) == 2
    assert capsys.readouterr().err.endswith("recognises whole utterances only: give no chunk, and do not stream\n")


@pytest.mark.parametrize("verb", [decode, stream])
def test_several_manifests_do_not_overwrite_each_other(
    verb: object, model: Path, cuts: Path, tmp_path: Path, capsys: Captured
) -> None:
    other = toy.write_cuts(tmp_path / "data", "other", 2)
    options = ["--checkpoint", str(model), "--cuts", str(cuts), str(other), "--out", str(tmp_path / "out")]
    assert verb.main(options) == 0
    name = verb.__name__.removeprefix("ssm_asr.cli.")
    folders = {f"{name}-{part}-model-chunk16-left64-greedy": count for part, count in (("test-tones", 7), ("other", 2))}
    assert {path.name for path in (tmp_path / "out").iterdir()} == folders.keys()
    for folder, count in folders.items():
        assert len(hypotheses(tmp_path / "out" / folder)) == count


def test_limit_and_units(model: Path, cuts: Path, tmp_path: Path, capsys: Captured) -> None:
    options = ["--checkpoint", str(model), "--cuts", str(cuts), "--limit", "3", "--unit", "char"]
    assert stream.main([*options, "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "test-tones: the first 3 utterances\n" in out and "CER " in out
    assert list(hypotheses(tmp_path)) == ["test-tones00", "test-tones01", "test-tones02"]


def test_stream_prints_what_comes(model: Path, tmp_path: Path, capsys: Captured) -> None:
    path = tmp_path / "a.wav"
    soundfile.write(path, toy.tones("LOW HIGH MID LOW MID HIGH LOW LOW HIGH"), 16000)
    assert stream.main(["--checkpoint", str(model), "--wav", str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{path} (3.25 s)"
    partial = [line.split(" s  ") for line in lines if " s  " in line]
    times, texts = [float(time) for time, _ in partial], [text for _, text in partial]
    assert len(partial) > 3 and times == sorted(times) and 0.4 < times[0] < 1.0 and times[-1] <= 3.25
    assert len(set(texts)) == len(texts)
    assert all(after.startswith(before) for before, after in itertools.pairwise(texts))
    assert lines[-2] == f"  final      {texts[-1]}"
    assert " ms a chunk (95 % below " in lines[-1] and ", lag " in lines[-1] and "real-time factor" in lines[-1]


def test_unusable_audio_is_passed_over(model: Path, tmp_path: Path, capsys: Captured) -> None:
    sound = toy.tones("LOW HIGH MID")
    good, stereo, cut, text, empty = (tmp_path / f"{name}.wav" for name in ("good", "stereo", "cut", "text", "empty"))
    soundfile.write(good, sound, 16000)
    soundfile.write(stereo, np.stack([sound, sound], axis=1), 16000)
    cut.write_bytes(good.read_bytes()[:20000])
    text.write_text("not audio")
    empty.touch()
    missing = tmp_path / "missing.wav"
    bad = {
        stereo: "not mono: 2 channels; take the first with: sox",
        cut: "truncated audio",
        text: "truncated or no audio",
        empty: "empty audio",
        missing: "no such file",
    }
    assert stream.main(["--checkpoint", str(model), "--wav", *map(str, bad), str(good)]) == 2
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert len(lines) == len(bad)
    for line, (path, reason) in zip(lines, bad.items(), strict=True):
        assert line.startswith(f"{path}: {reason}")
    assert f"{good} (1.15 s)" in captured.out and "  final  " in captured.out


@pytest.mark.parametrize("verb", [decode, stream])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--checkpoint", "none.pt"], "none.pt: no such checkpoint; train first, or give another path"),
        (["--checkpoint", "cuts.jsonl.gz"], "cuts.jsonl.gz: no checkpoint of this program, or a damaged one"),
        (["--cuts", "none.jsonl.gz"], "none.jsonl.gz: no cut manifest (FileNotFoundError"),
        (["--cuts", "silent.jsonl.gz"], "silent.jsonl.gz: no cut has a transcript, so nothing can be scored"),
        (["--cuts", "slow.jsonl.gz"], "slow.jsonl.gz: audio at [8000] Hz, not 16000"),
        (["--chunk", "300ms"], "chunk of 15 frames (300 ms): give a multiple of 2 frames (40 ms)"),
        (["--chunk", "0"], "chunk of 0 frames (0 ms): give a multiple of 2 frames (40 ms)"),
        (["--method", "beam", "--beam", "0"], "beam of 0: give a positive number"),
        (["--device", "gpu"], "device 'gpu': give auto, cpu or cuda"),
        (["--cuts", "same.jsonl.gz"], "same.jsonl.gz: 3 cuts have the id 'same'; results go by id"),
        (["--cuts", "cuts.jsonl.gz", "cuts_cuts.jsonl.gz"], "cuts_cuts.jsonl.gz: another manifest is called 'cuts'"),
    ],
)
def test_mistakes_are_one_line(
    verb: object, options: list[str], message: str, model: Path, odd_cuts: Path, capsys: Captured
) -> None:
    assert verb.main(["--checkpoint", str(model), "--cuts", str(odd_cuts), *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith(message) and error.count("\n") == 1


@pytest.mark.parametrize(
    ("verb", "options", "message"),
    [
        (stream, ["--limit", "-2"], "--limit -2: give a number of utterances, 0 for all"),
        (stream, ["--threads", "0"], "--threads 0: give 1 or more"),
        (stream, ["--limit", "1", "--cuts", "half.jsonl.gz"], "half.jsonl.gz: no cut has a transcript"),
        (stream, ["--cuts", "features.jsonl.gz"], "features.jsonl.gz: cut 'test-tones00' comes without audio"),
        (decode, ["--max-duration-s", "0"], "--max-duration-s 0: give a positive number of seconds"),
        (
            decode,
            ["--chunk", "-1", "--left", "64"],
            "left context of 64 frames: whole utterances are decoded, which see all there is; give none, or a chunk",
        ),
    ],
)
def test_mistakes_of_one_program(
    verb: object, options: list[str], message: str, model: Path, odd_cuts: Path, capsys: Captured
) -> None:
    test_mistakes_are_one_line(verb, options, message, model, odd_cuts, capsys)


@pytest.mark.parametrize("verb", ["decode", "stream"])
def test_files_that_cannot_be_are_one_line_before_any_work(verb: str, model: Path, cuts: Path, tmp_path: Path) -> None:
    """And so are sounds and features that are gone, of which lhotse would tell a page."""
    (tmp_path / "file").touch()
    moved = CutSet.from_file(cuts).to_eager()
    for cut in moved:
        cut.features = None
        cut.recording.sources[0].source = str(tmp_path / "gone.wav")
    moved.to_file(tmp_path / "moved.jsonl.gz")
    for options, message in (
        (["--cuts", str(cuts), "--out", str(tmp_path / "file")], f"{tmp_path}/file: File exists"),
        (
            ["--cuts", str(tmp_path / "moved.jsonl.gz")],
            f"none of 7 cuts can be read; the first: cut test-tones0\\d: Reading audio from '{tmp_path}/gone",
        ),
    ):
        command = [sys.executable, "-m", f"ssm_asr.{verb}", "--checkpoint", str(model), *options]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        last = done.stderr.strip().splitlines()[-1]
        assert done.returncode == 2 and "Traceback" not in done.stderr
        assert re.match(message, last), done.stderr


def test_an_interrupt_is_one_line(capsys: Captured) -> None:
    def interrupted() -> int:
        raise KeyboardInterrupt

    assert program.run(interrupted) == 130
    assert capsys.readouterr().err == "\ninterrupted\n"


@pytest.mark.parametrize("text", ["0", "-2", "two", "1.5", ""])
@pytest.mark.parametrize("verb", ["check", "features", "noise"])
def test_counts_are_numbers_from_one_on(verb: str, text: str, capsys: Captured) -> None:
    files = {"check": ["--manifests", "data"], "features": ["--cuts", "cuts"], "noise": ["--cuts", "cuts"]}[verb]
    option = "--count" if verb == "noise" else "--jobs"
    with pytest.raises(SystemExit):
        prepare.make_parser().parse_args([verb, *files, "--out", "out", option, text])
    assert capsys.readouterr().err.endswith(f"argument {option}: {text}: give a whole number, 1 or more\n")


# --- describe


@pytest.mark.parametrize(("vocab_size", "parameters"), [(500, 66110931), (3266, 71783997)])
@pytest.mark.parametrize(("left", "floats"), [(64, 286593), (128, 462721), (256, 814977)])
def test_describe_in_numbers(vocab_size: int, parameters: int, left: int, floats: int, capsys: Captured) -> None:
    options = ["--config", str(CONF / "zipformer_m.yaml"), "--vocab-size", str(vocab_size)]
    for chunk in (16, 32, 64):
        assert describe.main([*options, "--chunk", str(chunk), "--left", str(left), "--json"]) == 0
        facts = json.loads(capsys.readouterr().out)
        assert facts["parameters"] == sum(facts["parameters_by_part"].values()) == parameters
        assert facts["state_floats"] == sum(facts["state_floats_by_kind"].values()) == floats
        assert facts["state_bytes"] == 4 * floats
        assert (facts["chunk_ms"], facts["left_context_ms"]) == (20 * chunk, 20 * left)
        assert facts["look_ahead_ms"] == 130 and facts["largest_delay_ms"] == 20 * chunk + 130
    assert facts["frame_rates_hz"] == [50, 25, 12.5, 6.25, 12.5, 25] and facts["output_rate_hz"] == 25


def test_describe_for_a_reader(capsys: Captured) -> None:
    options = ["--config", str(CONF / "zipformer_m.yaml"), "--vocab-size", "500"]
    assert describe.main([*options, "--chunk", "16", "--left", "64"]) == 0
    out = capsys.readouterr().out
    for text in ("66,110,931", "286,593 floats, 1,146,372 bytes a stream", "chunk 16 frames = 320 ms", "130 ms"):
        assert text in out
    assert describe.main([*options, "--set", "model.encoder.causal=false"]) == 0
    out = capsys.readouterr().out
    assert "65,549,011" in out and out.endswith("no streaming: encoder.causal is false\n")


@pytest.mark.parametrize("name", ["sammo_m_n32", "ssmformer_tiny"])  # each over the configuration of another encoder
def test_the_whole_configuration_is_the_same_one(name: str, tmp_path: Path, capsys: Captured) -> None:
    options = ["--config", str(CONF / f"{name}.yaml"), "--set", "train.seed=7"]
    assert describe.main([*options, "--yaml"]) == 0
    whole = tmp_path / "whole.yaml"
    whole.write_text(capsys.readouterr().out)
    assert "base:" not in whole.read_text() and "\ndecode:" in whole.read_text()
    assert load_experiment(whole) == load_experiment(options[1], options[3:])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--config", "none.yaml"], "none.yaml: no such configuration file"),
        (["--chunk", "20"], "chunk of 20 frames (400 ms): give a multiple of 8 frames (160 ms)"),
        (["--chunk", "0"], "chunk of 0 frames"),
        (["--left", "-1"], "left context of -1 frames: with chunks, give 0 or more"),
        (["--set", "model.encoder.layers=2"], f"{CONF}/zipformer_m.yaml: model.encoder.layers is 2; give a list"),
    ],
)
def test_mistakes_to_describe(options: list[str], message: str, capsys: Captured) -> None:
    config = ["--config", str(CONF / "zipformer_m.yaml"), "--vocab-size", "500"]
    assert describe.main([*config, *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith(message) and error.count("\n") == 1


# --- average


def test_average_takes_the_settings_of_decoding(epochs: Path, tmp_path: Path, capsys: Captured) -> None:
    """They can still be changed after training, and say how many epochs to average; what was trained stays."""
    config = tmp_path / "config.yaml"
    config.write_text(to_yaml(toy.experiment(decode={"chunk_frames": 32}, optim={"base_lr": 0.1})), encoding="utf-8")
    options = ["--exp-dir", str(epochs), "--out", str(tmp_path / "averaged.pt"), "--config", str(config)]
    assert average.main([*options, "--set", "decode.beam=7", "--set", "train.num_epochs=2"]) == 0
    assert "mean of the weights over epochs 2 to 2" in capsys.readouterr().out
    experiment = checkpoint.load_model(tmp_path / "averaged.pt").experiment
    assert (experiment.decode.chunk_frames, experiment.decode.beam) == (32, 7)
    assert experiment.optim == toy.experiment().optim
    assert average.main(["--exp-dir", str(epochs), "--set", "decode.beam=7"]) == 2
    assert capsys.readouterr().err == "--set: changes a field of --config, so give that as well\n"


@pytest.fixture(scope="module")
def epochs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three epochs of two batches; after batch n, every weight is n. The mean is updated with every batch."""
    exp_dir = tmp_path_factory.mktemp("epochs")
    loaded = toy.write_checkpoint(exp_dir / "unused.pt", decode={"average_epochs": 2}, train={"average_period": 2})
    mean = RunningAverage(1)
    for batch in range(1, 7):
        with torch.no_grad():
            for p in loaded.model.parameters():
                p.fill_(batch)
        mean.update(loaded.model, batch)
        if batch % 2 == 0:
            parts = (loaded.experiment, loaded.tokenizer, loaded.model.state_dict(), {"batch": batch})
            packed = checkpoint.pack(*parts, average=mean.state_dict())
            checkpoint.save(packed, exp_dir / f"epoch-{batch // 2}.pt")
    return exp_dir


@pytest.mark.parametrize(
    ("options", "mean", "covered"),
    [
        ([], 4.5, "2 to 3"),  # the configuration's two epochs: (3 + 4 + 5 + 6) / 4
        (["--last", "1"], 5.5, "3 to 3"),
        (["--last", "9"], 3.5, "1 to 3"),
        (["--epoch", "2", "--last", "1"], 3.5, "2 to 2"),
    ],
)
def test_average(epochs: Path, tmp_path: Path, options: list[str], mean: float, covered: str, capsys: Captured) -> None:
    out = tmp_path / "averaged.pt"
    assert average.main(["--exp-dir", str(epochs), "--out", str(out), *options]) == 0
    assert capsys.readouterr().out == f"{out}: mean of the weights over epochs {covered}\n"
    model = checkpoint.load_model(out).model
    assert all(torch.allclose(p, torch.full_like(p, mean)) for p in model.parameters())
    assert "average" not in checkpoint.load(out)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--epoch", "9"], "no epoch-9.pt; there are epochs 1, 2, 3: give another --epoch or --last"),
        (["--last", "0"], "--last 0: give a positive number of epochs"),
    ],
)
def test_mistakes_to_average(epochs: Path, options: list[str], message: str, capsys: Captured) -> None:
    assert average.main(["--exp-dir", str(epochs), *options]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_nothing_to_average(epochs: Path, tmp_path: Path, capsys: Captured) -> None:
    assert average.main(["--exp-dir", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"{tmp_path}: no epoch-*.pt; train first, or give another --exp-dir\n"
    for number in (1, 2):  # no update of the mean in between
        (tmp_path / f"epoch-{number}.pt").write_bytes((epochs / "epoch-1.pt").read_bytes())
    assert average.main(["--exp-dir", str(tmp_path), "--last", "1"]) == 2
    assert "the running mean was not updated in epochs 2 to 2; average more epochs, or" in capsys.readouterr().err


# --- from training to the table


def test_from_training_to_the_report(tmp_path: Path, capsys: Captured) -> None:
    corpus = toy.Corpus(tmp_path, num_train=12)
    exp_dir = tmp_path / "exp"
    assert train.main(corpus.arguments(exp_dir, train={"num_epochs": 1})) == 0
    assert average.main(["--exp-dir", str(exp_dir)]) == 0
    averaged = ["--checkpoint", str(exp_dir / "averaged.pt"), "--cuts", str(corpus.valid_cuts)]
    assert decode.main(averaged) == 0 and stream.main(averaged) == 0
    assert report.main(["--exp-dir", str(exp_dir)]) == 0
    assert capsys.readouterr().out.count("| valid | ") == 2
    assert load_experiment(exp_dir / "config.yaml") == toy.experiment(train={"num_epochs": 1})
    # epoch-N.pt and best.pt serve decoding, too, and their results stand beside the others.
    assert decode.main([*averaged, "--checkpoint", str(exp_dir / "best.pt")]) == 0
    assert report.main(["--exp-dir", str(exp_dir)]) == 0
    rows = [line.split(" | ")[:3] for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert rows[0] == ["| checkpoint", "cuts", "mode"]
    assert sorted(row[0] for row in rows[1:]) == ["| averaged.pt", "| averaged.pt", "| best.pt"]


# --- check-streaming


def test_check_of_streaming(model: Path, cuts: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["--checkpoint", str(model), "--cuts", str(cuts), "--chunks", "4,16", "--limit", "3"]
    assert check_streaming.main(options) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("3 utterances, 2.") and lines[-1] == "all within 0.0001"
    assert [line.split()[:2] for line in lines[2:4]] == [["80", "1280"], ["320", "1280"]]
    assert all(float(line.split()[2]) < 1e-5 < 1.0 < float(line.split()[3]) for line in lines[2:4])

    exact = evaluation_of_streaming.encode_by_chunks
    monkeypatch.setattr(evaluation_of_streaming, "encode_by_chunks", lambda *args: exact(*args) + 2e-4)
    assert check_streaming.main(options) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "FAILED: above 0.0001"
    assert check_streaming.main([*options, "--chunks", "5"]) == 2
