"""Options of the LibriSpeech recipe: mistakes are found before anything is installed or made."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture
def run_sh(tmp_path: Path) -> Path:
    """A copy of the recipe whose set-up only says that it was called, and fails."""
    recipe = tmp_path / "egs" / "librispeech" / "run.sh"
    (tmp_path / "tools").mkdir()
    recipe.parent.mkdir(parents=True)
    shutil.copy(ROOT / "egs" / "librispeech" / "run.sh", recipe)
    shutil.copy(ROOT / "tools" / "recipe.sh", tmp_path / "tools")
    (tmp_path / "tools" / "setup.sh").write_text('echo "setup $*"; exit 9\n')
    (recipe.parent / "conf").mkdir()
    (recipe.parent / "conf" / "mine.yaml").touch()
    return recipe


def run(recipe: Path, *options: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", str(recipe), *options], capture_output=True, text=True, timeout=30, cwd=cwd)


def test_help(run_sh: Path) -> None:
    done = run(run_sh, "--help")
    assert done.returncode == 0 and done.stderr == ""
    for option in ("--corpus DIR", "--stage N", "--stop-stage N", "--config FILE", "--set A.B=VALUE", "--exp-dir DIR"):
        assert f"  {option} " in done.stdout
    assert "Stages: 1 data, 2 manifests," in done.stdout and "setup" not in done.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--corpse", "x"], "unknown option --corpse (see --help)"),
        (["digits"], "unexpected argument 'digits' (see --help)"),
        (["--corpus"], "--corpus needs a value (see --help)"),
        (["--corpus", "/none"], "--corpus /none: no such directory"),
        (["--musan", "/none"], "--musan /none: no such directory"),
        (["--config", "/none.yaml"], "--config /none.yaml: no such file"),
        (["--small", "novels"], "--small novels: give digits or sentences"),
        (["--gpus", "all"], "--gpus all: give a number"),
        (["--stream-limit", "-1"], "--stream-limit -1: give a number"),
        (["--stage", "two"], "--stage two: give a number up to 10"),
    ],
)
def test_mistakes(run_sh: Path, options: list[str], message: str) -> None:
    done = run(run_sh, *options)
    assert done.returncode == 2
    assert done.stderr == f"run.sh: error: {message}\n" and done.stdout == ""


def test_paths_are_those_of_the_caller(run_sh: Path, tmp_path: Path) -> None:
    (tmp_path / "LibriSpeech").mkdir()
    (tmp_path / "own.yaml").touch()
    for config in ("own.yaml", "conf/mine.yaml", str(tmp_path / "own.yaml")):
        done = run(run_sh, "--corpus", "LibriSpeech", "--config", config, cwd=tmp_path)
        assert (done.returncode, done.stdout, done.stderr) == (9, "setup --extras \n", "")
    assert run(run_sh).stdout == "setup --extras corpus\n"
    done = run(run_sh, "--corpus", "LibriSpeech", cwd=run_sh.parent)
    assert done.stderr == f"run.sh: error: --corpus {run_sh.parent}/LibriSpeech: no such directory\n"
