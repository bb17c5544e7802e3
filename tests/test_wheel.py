"""The wheel that pip builds: what is in it, and that it works by itself."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import soundfile
import toy
import trained_toy

import ssm_asr
from ssm_asr.config import to_yaml

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel, built from a copy: pip leaves its work beside what it builds, and a later wheel would hold it, too."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    listed = [
        "git",
        "ls-files",
        "-z",
        "--cached",
        "--others",
        "--exclude-standard",
        "*.py",
        "*.toml",
        "*.typed",
        "LICENSE",
    ]
    for name in subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0"):
        if name and (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    assert (source / "tests").is_dir() and (source / "egs").is_dir()
    command = [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "--no-index", "--quiet"]
    subprocess.run([*command, "--wheel-dir", str(out)], cwd=source, check=True)
    (path,) = out.iterdir()
    return path


@pytest.fixture(scope="module")
def unpacked(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("unpacked")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(directory)
    return directory


def test_what_is_in_it(wheel: Path, unpacked: Path) -> None:
    assert wheel.name == f"ssm_asr-{ssm_asr.__version__}-py3-none-any.whl"
    info = f"ssm_asr-{ssm_asr.__version__}.dist-info"
    assert {path.name for path in unpacked.iterdir()} == {"ssm_asr", info}
    expected = {path.relative_to(ROOT) for path in (ROOT / "ssm_asr").rglob("*.py")} | {Path("ssm_asr/py.typed")}
    files = {path.relative_to(unpacked) for path in (unpacked / "ssm_asr").rglob("*") if path.is_file()}
    assert files == expected
    assert (unpacked / info / "entry_points.txt").read_text().split() == [
        "[console_scripts]",
        *("ssm-asr", "=", "ssm_asr.cli:main"),
    ]
    assert re.search(r"^Requires-Dist: torch>=", (unpacked / info / "METADATA").read_text(), re.MULTILINE)


def test_it_works_by_itself(unpacked: Path, tmp_path: Path) -> None:
    """From another directory, with nothing of the checkout in reach."""

    def run(*command: str) -> str:
        environment = os.environ | {"PYTHONPATH": str(unpacked)}
        done = subprocess.run([sys.executable, *command], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert run("-c", "import ssm_asr; print(ssm_asr.__file__)").strip() == str(unpacked / "ssm_asr" / "__init__.py")
    assert run("-m", "ssm_asr", "--help").startswith("usage: ssm-asr VERB [options]\n\n  transcribe ")
    assert run("-m", "ssm_asr", "--version") == f"ssm-asr {ssm_asr.__version__}\n"
    (tmp_path / "toy.yaml").write_text(to_yaml(toy.experiment()))
    assert "streaming state" in run("-m", "ssm_asr", "describe", "--config", "toy.yaml", "--vocab-size", "6")
    trained_toy.write_checkpoint(tmp_path / "model.pt")
    soundfile.write(tmp_path / "a.wav", trained_toy.recording("a"), 16000)
    text = run("-m", "ssm_asr", "transcribe", "--checkpoint", "model.pt", "--device", "cpu", "a.wav")
    assert text == f"a.wav\t{trained_toy.TEXTS['a']}\n"
