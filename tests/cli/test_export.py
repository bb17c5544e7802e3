"""The export program: its directories, what it prints, the commands in its READMEs, and what it says to a mistake."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile
import toy
from encoders import ENCODERS

from ssm_asr import checkpoint
from ssm_asr.cli import export
from ssm_asr.config import load_experiment
from ssm_asr.exporting import check

Captured = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("exp") / "model.pt"
    toy.write_checkpoint(path)
    return path


def run(model: Path, out: Path, *options: str) -> int:
    return export.main(["--checkpoint", str(model), "--out", str(out), *options])


def commands(readme: Path) -> list[str]:
    """The command blocks of a README, without installations, run by this Python."""
    blocks = re.findall(r"```bash\n(.*?)```", readme.read_text(encoding="utf-8"), re.DOTALL)
    return [re.sub(r"^pip install .*\n", "", block).replace("python", sys.executable, 1) for block in blocks]


@pytest.mark.parametrize(
    ("options", "files"),
    [
        (["--format", "sherpa"], ["decoder.onnx", "encoder.onnx", "joiner.onnx"]),
        (["--format", "sherpa", "--carrier", "zipformer2"], ["decoder.onnx", "encoder.onnx", "joiner.onnx"]),
        (["--format", "sherpa", "--precision", "int8"], [f"{p}.int8.onnx" for p in ("decoder", "encoder", "joiner")]),
        (["--format", "sherpa-offline"], ["decoder.onnx", "encoder.onnx", "joiner.onnx"]),
        (["--format", "sherpa-ctc", "--precision", "fp32", "fp16"], ["model.fp16.onnx", "model.onnx"]),
        (["--format", "torchscript"], ["decoder.pt", "encoder.pt", "joiner.pt"]),
        (["--format", "weights"], ["model.safetensors"]),
    ],
)
def test_formats(model: Path, tmp_path: Path, options: list[str], files: list[str], capsys: Captured) -> None:
    """What is written is what was asked for, and the commands of the README work as they stand."""
    out = tmp_path / "deep" / "export"
    assert run(model, out, *options) == 0
    printed = capsys.readouterr()
    assert printed.out.endswith("README.md says how to use it\n") and "Warning" not in printed.err
    assert sorted(path.name for path in out.iterdir()) == sorted(
        [*files, "README.md", "config.yaml", "tokens.txt", "word.model"]
    )
    assert list(out.parent.iterdir()) == [out]
    for name in files:
        assert "weights" in options or f"{out / name}: {(out / name).stat().st_size:,} bytes" in printed.out
    soundfile.write(out / "audio.wav", toy.tones("LOW MID HIGH"), 16000)
    for command in commands(out / "README.md"):
        result = subprocess.run(["bash", "-c", command], cwd=out, capture_output=True, text=True)
        assert result.returncode == 0 and result.stdout.strip(), result.stderr


def test_the_configuration_is_that_of_the_export(model: Path, tmp_path: Path) -> None:
    assert run(model, tmp_path / "out", "--format", "torchscript", "--chunk", "32", "--left", "96") == 0
    decode = load_experiment(tmp_path / "out" / "config.yaml").decode
    assert (decode.chunk_frames, decode.left_context_frames) == (32, 96)
    assert "in chunks of 640 ms with 130 ms of look-ahead and 1920 ms of left context" in (
        tmp_path / "out" / "README.md"
    ).read_text(encoding="utf-8")


def test_an_export_is_replaced_and_nothing_else(model: Path, tmp_path: Path, capsys: Captured) -> None:
    out = tmp_path / "out"
    assert run(model, out, "--format", "torchscript") == 0
    assert run(model, out, "--format", "weights") == 0
    assert (out / "model.safetensors").is_file() and not (out / "encoder.pt").exists()
    other = tmp_path / "thesis"
    other.mkdir()
    (other / "thesis.tex").write_text("all of it")
    capsys.readouterr()
    assert run(model, other, "--format", "weights") == 2
    assert (
        capsys.readouterr().err == f"{other}: is there and holds no export, so it is not replaced; give another --out\n"
    )
    assert [path.name for path in other.iterdir()] == ["thesis.tex"]


def test_a_failed_check_leaves_nothing(
    model: Path, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = tmp_path / "out"
    assert run(model, before, "--format", "weights") == 0
    capsys.readouterr()
    monkeypatch.setattr(check, "TOLERANCE", 1e-9)
    assert run(model, tmp_path / "rounded", "--format", "sherpa") == 0  # no worse than what rounding does to the model
    shutil.rmtree(tmp_path / "rounded")
    capsys.readouterr()
    monkeypatch.setattr(check, "ROUNDING_ERRORS", 1e-3)
    assert run(model, before, "--format", "sherpa") == 2
    assert re.fullmatch(
        r"encoder.onnx: differs from the model by \d\.\de-0\d, more than 1e-09\n", capsys.readouterr().err
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    assert (before / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("encoder", "options", "message"),
    [
        (
            "zipformer",
            ["--format", "sherpa", "--chunk", "15"],
            "chunk of 15 frames (300 ms): give a multiple of 2 frames",
        ),
        ("sammo", ["--format", "sherpa", "--carrier", "zipformer2"], "use the packed carrier"),
        ("conformer", ["--format", "sherpa", "--left", "-1"], "left context of -1 frames"),
        (
            "conformer",
            ["--format", "torchscript", "--precision", "int8"],
            "format torchscript is in fp32; leave it out",
        ),
        ("zipformer", ["--format", "sherpa-ctc", "--carrier", "zipformer2"], "only format sherpa has it"),
        (
            "zipformer",
            ["--format", "sherpa-offline", "--chunk", "7"],
            "format sherpa-offline is for any; leave them out",
        ),
        ("zipformer", ["--format", "weights", "--left", "64"], "format weights is for any; leave them out"),
    ],
)
def test_what_cannot_be_exported(
    tmp_path: Path, encoder: str, options: list[str], message: str, capsys: Captured
) -> None:
    settings, left_context = ENCODERS[encoder]
    sections = {"model": {"encoder": settings}, "decode": {"left_context_frames": left_context}}
    toy.write_checkpoint(tmp_path / "model.pt", **sections)
    assert run(tmp_path / "model.pt", tmp_path / "out", *options) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_model_without_ctc(tmp_path: Path, capsys: Captured) -> None:
    toy.write_checkpoint(tmp_path / "model.pt", model={"ctc": False})
    assert run(tmp_path / "model.pt", tmp_path / "out", "--format", "sherpa-ctc") == 2
    assert capsys.readouterr().err == "this model has no CTC head (model.ctc is false); use --format sherpa\n"


def test_a_model_that_cannot_stream(tmp_path: Path, capsys: Captured) -> None:
    settings = ENCODERS["zipformer"][0] | {"causal": False}
    toy.write_checkpoint(tmp_path / "model.pt", model={"encoder": settings})
    assert run(tmp_path / "model.pt", tmp_path / "out", "--format", "sherpa") == 2
    assert "trained without chunks" in capsys.readouterr().err
    assert run(tmp_path / "model.pt", tmp_path / "out", "--format", "sherpa-offline") == 0


def test_what_is_no_checkpoint(tmp_path: Path, capsys: Captured) -> None:
    assert run(tmp_path / "none.pt", tmp_path / "out", "--format", "weights") == 2
    assert "no such checkpoint" in capsys.readouterr().err
    assert issubclass(checkpoint.CheckpointError, ValueError)
