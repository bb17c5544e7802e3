"""The program that turns files and live audio into text."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
import trained_toy

import ssm_asr
from ssm_asr.cli import transcribe

ROOT = Path(__file__).parents[2]
Captured = pytest.CaptureFixture[str]
LINES = {name: f"{name}.wav\t{text}\n" for name, text in trained_toy.TEXTS.items()}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a model that recognises the recordings beside it."""
    directory = tmp_path_factory.mktemp("trained")
    trained_toy.write_checkpoint(directory / "model.pt")
    for name in trained_toy.TEXTS:
        soundfile.write(directory / f"{name}.wav", trained_toy.recording(name), 16000, subtype="FLOAT")
    return directory


@pytest.fixture(autouse=True)
def work_there(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(trained)


def raw(name: str) -> bytes:
    return (trained_toy.recording(name) * 32767).astype("<i2").tobytes()


def run(*arguments: str) -> int:
    return transcribe.main(["--checkpoint", "model.pt", "--device", "cpu", *arguments])


def test_files(capsys: Captured) -> None:
    assert run("a.wav", "b.wav") == 0
    assert capsys.readouterr() == (LINES["a"] + LINES["b"], "")
    assert run("b.wav", "--chunk", "160ms", "--left", "640ms", "--method", "beam", "--beam", "2") == 0
    assert run("b.wav", "--chunk", "-1") == 0
    assert capsys.readouterr().out == 2 * LINES["b"]


def test_options_reach_the_model(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}

    def transcribe_each(self: ssm_asr.Model, audio: list[Path], **settings: object) -> list[ssm_asr.Result]:
        asked.update(settings)
        return [ssm_asr.Result()]

    monkeypatch.setattr(ssm_asr.Model, "transcribe_each", transcribe_each)
    assert run("a.wav", "--chunk", "160ms", "--left", "32", "--method", "beam", "--beam", "2") == 0
    assert asked == {"chunk": 8, "left": 32, "method": "beam", "beam": 2}


def test_a_file_that_cannot_be_read_does_not_stop_the_others(tmp_path: Path, capsys: Captured) -> None:
    soundfile.write(tmp_path / "stereo.wav", np.zeros((8000, 2)), 16000)
    assert run("none.wav", "a.wav", str(tmp_path / "stereo.wav"), "b.wav") == 2
    out, err = capsys.readouterr()
    assert out == LINES["a"] + LINES["b"]
    assert err.splitlines()[0] == "none.wav: no such file" and err.count("\n") == 2
    assert err.splitlines()[1].startswith(f"{tmp_path}/stereo.wav: not mono: 2 channels")


def test_json_lines(capsys: Captured) -> None:
    assert run("--json", "a.wav", "b.wav") == 0
    model = ssm_asr.load("model.pt", "cpu")
    for line, name in zip(capsys.readouterr().out.splitlines(), trained_toy.TEXTS, strict=True):
        result = model.transcribe(f"{name}.wav")
        assert json.loads(line) == {
            "file": f"{name}.wav",
            "text": result.text,
            "tokens": list(result.tokens),
            "times": list(result.times),
        }
        assert "▁LOW" in line


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--checkpoint", "none.pt", "a.wav"], "none.pt: no such checkpoint"),
        (["--device", "gpu", "a.wav"], "device 'gpu': give auto, cpu or cuda"),
        (["--chunk", "20ms", "a.wav"], "chunk of 1 frames (20 ms): give a multiple of 2 frames (40 ms)"),
    ],
)
def test_mistakes_are_one_line(options: list[str], message: str, capsys: Captured) -> None:
    assert run(*options) == 2
    error = capsys.readouterr().err
    assert error.startswith(message) and error.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give audio files, or --stdin"),
        (["--stdin", "a.wav"], "give audio files, or --stdin"),
        (
            ["--chunk", "330ms", "a.wav"],
            "argument --chunk: time '330ms': no whole number of frames of 20 ms; give 320ms",
        ),
        (["--stdin", "--rate", "0"], "argument --rate: 0: give a whole number, 1 or more"),
    ],
)
def test_mistakes_in_the_command_line(options: list[str], message: str, capsys: Captured) -> None:
    with pytest.raises(SystemExit) as caught:
        run(*options)
    assert caught.value.code == 2 and message in capsys.readouterr().err


# --- live audio


def live(content: bytes, monkeypatch: pytest.MonkeyPatch, *options: str) -> int:
    """Runs the program with what a pipe holds."""
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))
    return run("--stdin", *options)


@pytest.mark.parametrize("options", [[], ["--chunk", "160ms"], ["--method", "beam"]])
def test_live_audio(options: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    assert live(raw("b"), monkeypatch, *options) == 0
    assert live(Path("b.wav").read_bytes(), monkeypatch, *options) == 0
    assert capsys.readouterr().out == 2 * f"{trained_toy.TEXTS['b']}\n"


def test_live_audio_at_another_rate(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    assert live(np.repeat(np.frombuffer(raw("b"), "<i2"), 3).tobytes(), monkeypatch, "--rate", "48000", "--json") == 0
    times = json.loads(capsys.readouterr().out.splitlines()[-1])["times"]
    assert len(times) > 2 and all(time_s < 2.1 for time_s in times)


def test_live_audio_in_json(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    """A line whenever the text has changed, of which the last is final."""
    monkeypatch.setattr("ssm_asr.data.pipe.READ_BYTES", 3200)
    assert live(raw("b"), monkeypatch, "--json") == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    texts = [line["text"] for line in lines]
    assert texts[-1] == trained_toy.TEXTS["b"] and len(set(texts)) > 2
    assert all(line["file"] == "-" and len(line["times"]) == len(line["tokens"]) for line in lines)


def test_live_audio_that_cannot_be_used(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    for content, message in ((b"", "empty audio: 0 bytes"), (b"fLaC1234", "FLAC, neither wav nor raw samples")):
        assert live(content, monkeypatch) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"standard input: {message}") and error.count("\n") == 1


def test_a_terminal_is_no_audio(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO()))
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    assert run("--stdin") == 2
    assert "standard input is a terminal; pipe audio into it" in capsys.readouterr().err


def test_a_microphone_that_is_stopped(trained: Path) -> None:
    """Text comes while the pipe is open; Ctrl-C flushes the rest, and is the usual end."""
    command = [sys.executable, "-m", "ssm_asr", "transcribe", "--checkpoint", "model.pt", "--stdin", "--device", "cpu"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdin and process.stdout
        process.stdin.write(raw("b")[:-9600])  # the last 0.3 s are still to be said
        process.stdin.flush()
        text = process.stdout.read(len("MID LOW HIGH"))
        assert text == b"MID LOW HIGH"
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        assert text + process.stdout.read() == f"{trained_toy.TEXTS['b']}\n".encode()
        assert process.wait(timeout=60) == 0


def test_a_reader_that_has_gone(trained: Path) -> None:
    """As after `| head`: no traceback."""
    command = f"{sys.executable} -m ssm_asr transcribe --checkpoint model.pt --device cpu a.wav b.wav 2>err.txt | true"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(["bash", "-c", f"{command}; exit ${{PIPESTATUS[0]}}"], env=environment)
    assert done.returncode == 141 and Path("err.txt").read_text() == ""
