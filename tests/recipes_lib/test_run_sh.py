"""The recipes find mistakes before anything is installed or made, and call their programs in order."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
RECIPES = ("librispeech", "csj")


@pytest.fixture(autouse=True)
def default_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests themselves may run in the environment of a caller."""
    monkeypatch.delenv("SSM_ASR_ENV", raising=False)


def copy_library(root: Path) -> None:
    """Copies what run.sh reads."""
    for name in ("recipes_lib/recipe.sh", "recipes_lib/asr_stages.sh", "tools/environment.sh"):
        (root / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, root / name)


@pytest.fixture(params=RECIPES)
def run_sh(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Copies a recipe whose set-up only says that it was called, and fails."""
    recipe = tmp_path / "egs" / request.param / "run.sh"
    (recipe.parent / "conf").mkdir(parents=True)
    shutil.copy(ROOT / "egs" / request.param / "run.sh", recipe)
    copy_library(tmp_path)
    (tmp_path / "tools" / "setup.sh").write_text('echo "setup $*"; exit 9\n')
    (recipe.parent / "conf" / "mine.yaml").touch()
    return recipe


def run(recipe: Path, *options: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", str(recipe), *options], capture_output=True, text=True, timeout=30, cwd=cwd)


def test_help(run_sh: Path) -> None:
    done = run(run_sh, "--help")
    assert done.returncode == 0 and done.stderr == ""
    for option in ("--corpus DIR", "--stage N", "--stop-stage N", "--config FILE", "--set A.B=VALUE", "--exp-dir DIR"):
        assert f"  {option} " in done.stdout
    own = {"librispeech": "--small SIZE", "csj": "--transcript-mode MODE"}[run_sh.parent.name]
    assert f"  {own} " in done.stdout
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
        (["--compare-with", "/none.yaml"], "--compare-with /none.yaml: no such file"),
        (["--gpus", "all"], "--gpus all: give a number"),
        (["--stream-limit", "-1"], "--stream-limit -1: give a number"),
        (["--stage", "two"], "--stage two: give a number up to 13"),
        (["--env", "conda"], "--env conda: give one of venv, current"),
    ],
)
def test_mistakes(run_sh: Path, options: list[str], message: str) -> None:
    done = run(run_sh, *options)
    assert done.returncode == 2
    assert done.stderr == f"run.sh: error: {message}\n" and done.stdout == ""


def test_numbers(run_sh: Path) -> None:
    assert run(run_sh, "--jobs", "0").stderr == "run.sh: error: --jobs 0: give 1 or more\n"
    assert run(run_sh, "--gpus", "two").stderr == "run.sh: error: --gpus two: give a number\n"


def test_choices(run_sh: Path) -> None:
    options, choices = {
        "librispeech": (["--small", "novels"], "digits, sentences"),
        "csj": (["--transcript-mode", "novels"], "disfluent, fluent, number, symbol"),
    }[run_sh.parent.name]
    done = run(run_sh, *options)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"run.sh: error: {' '.join(options)}: give one of {choices}\n"


def test_paths_are_those_of_the_caller(run_sh: Path, tmp_path: Path) -> None:
    (tmp_path / "Corpus").mkdir()
    (tmp_path / "own.yaml").touch()
    for config in ("own.yaml", "conf/mine.yaml", str(tmp_path / "own.yaml")):
        options = ["--corpus", "Corpus", "--config", config, "--compare-with", config]
        done = run(run_sh, *options, cwd=tmp_path)
        assert (done.returncode, done.stdout, done.stderr) == (9, "setup --extras export\n", "")
    assert run(run_sh).stdout == "setup --extras corpus,export\n"
    assert run(run_sh, "--stage", "2", "--stop-stage", "9").stdout == "setup --extras \n"
    done = run(run_sh, "--corpus", "Corpus", cwd=run_sh.parent)
    assert done.stderr == f"run.sh: error: --corpus {run_sh.parent}/Corpus: no such directory\n"


# This stands for python: it logs the command and makes the outputs of the stage; of a configuration, its source.
STUB = """
case "$*" in
    -c*) exit ;;  # is_recent asks for the version
    *check_environment.py*) echo "$PYTHONPATH $*" >>"$STUB_LOG"; exit "${STUB_CHECK:-0}" ;;
    *ssm_asr.describe*wrong*) exit 2 ;;
    *ssm_asr.describe*) cat "$4"; echo "# $*"; exit ;;
esac
echo "$*" >>"$STUB_LOG"
for (( i = 1; i <= $#; i++ )); do
    next=$((i + 1))
    case "${!i}" in
        --out | --exp-dir) out="${!next}" ;;
        --cuts) cuts=() ;;
        */cuts_*.jsonl.gz) cuts+=("$(basename "${!i}")") ;;
    esac
done
case "$*" in
    *make_corpus.py*) mkdir -p "$out/CSJ" "$out/LibriSpeech" ;;
    *ssm_asr.average*) touch "$out" ;;
    *ssm_asr.report* | *check-export* | *long-form*) ;;
    *) mkdir -p "$out"; cd "$out"; touch tokens.txt trained.json summary.json results.json ;;&
    *"prepare noise"*) touch cuts_noise.jsonl.gz ;;
    *"prepare check"*) touch cuts_{train,dev,test-a,test-b}.jsonl.gz ;;
    *"prepare features"*) touch "${cuts[@]}" ;;
esac
"""


@pytest.fixture(params=RECIPES)
def stubbed(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Copies a recipe whose programs only say that they were called."""
    for name in RECIPES:
        shutil.copytree(ROOT / "egs" / name, tmp_path / "egs" / name, ignore=shutil.ignore_patterns("data", "exp"))
    copy_library(tmp_path)
    (tmp_path / "tools" / "setup.sh").touch()
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    python = tmp_path / "stub" / "python"
    python.parent.mkdir()
    python.write_text(f"#!/usr/bin/env bash\nset -euo pipefail\n{STUB}")
    python.chmod(0o755)
    (tmp_path / ".venv" / "bin" / "activate").write_text(f'PATH="{python.parent}:$PATH"\n')
    monkeypatch.setenv("STUB_LOG", str(tmp_path / "log"))
    return tmp_path / "egs" / request.param / "run.sh"


def stages(recipe: Path, *options: str) -> list[str]:
    """Returns the commands that a run called."""
    log = recipe.parents[2] / "log"
    log.write_text("")
    done = run(recipe, *options)
    assert done.returncode == 0, done.stdout + done.stderr
    return log.read_text().splitlines()


def programs(commands: list[str]) -> list[str]:
    """Returns the script or program of each command; prepare has its verb."""
    words = [[word for word in line.split() if word != "-m"] for line in commands]
    return [" ".join(line[: 2 if line[0] in ("ssm_asr", "ssm_asr.prepare") else 1]) for line in words]


DATA = ["local/make_corpus.py", "local/manifests.py", "ssm_asr.prepare check"]
FEATURES = ["ssm_asr.prepare features"] * 2
TOKENS_AND_NOISE = ["ssm_asr.prepare tokens", "ssm_asr.prepare noise"]
MODEL = ["ssm_asr.train", "ssm_asr.average"]
TESTS = ["ssm_asr.decode", "ssm_asr.stream"] * 2
EXPORT = ["ssm_asr.export", "ssm_asr check-export", "ssm_asr check-export"]


def test_stages_in_order(stubbed: Path) -> None:
    commands = stages(stubbed)
    compared = [TOKENS_AND_NOISE[0], *MODEL, "ssm_asr.compare"] if stubbed.parent.name == "csj" else []
    assert programs(commands) == [
        *DATA,
        *FEATURES,
        *TOKENS_AND_NOISE,
        *MODEL,
        *TESTS,
        *EXPORT,
        *compared,
        "ssm_asr.report",
    ]
    assert programs(stages(stubbed)) == ["ssm_asr.report"]  # everything else is up to date
    assert programs(stages(stubbed, "--stage", "8", "--stop-stage", "9")) == []
    assert not [line for line in commands if "--speed-perturb" in line]


def test_a_change_of_the_whole_configuration_trains_anew(stubbed: Path) -> None:
    options = ["--config", "conf/sammo_tiny.yaml", "--stop-stage", "9"]
    stages(stubbed, *options)
    config = stubbed.parent / "conf" / "sammo_tiny.yaml"
    config.write_text(config.read_text() + "# changed\n")
    # The tokens do not change, but these stages read the configuration.
    assert programs(stages(stubbed, *options)) == ["ssm_asr.prepare tokens", "ssm_asr.train", "ssm_asr.average"]


def test_comparison(stubbed: Path) -> None:
    options = ["--config", "conf/sammo_tiny.yaml", "--compare-with", "conf/conformer_tiny.yaml"]
    commands = stages(stubbed, *options, "--set", "train.seed=7")
    compared = commands[-2]
    trained = [line for line in commands if "ssm_asr.train" in line]
    name = "small-digits" if stubbed.parent.name == "librispeech" else "small"
    configs = [f"data/{name}/configs/{model}.yaml" for model in ("sammo_tiny", "conformer_tiny")]
    for command, config in zip(trained, configs, strict=True):
        assert f" --config {config} " in command
        assert "--set=train.seed=7 --yaml" in (stubbed.parent / config).read_text()
    models = [f"exp/{name}-{model}/averaged.pt" for model in ("sammo_tiny", "conformer_tiny")]
    assert f"--checkpoints {' '.join(models)} --chunks " in compared
    cuts = [f"data/{name}/features/cuts_{part}.jsonl.gz" for part in ("test-a", "test-b")]
    assert f"--cuts {' '.join(cuts)} --limit 500 " in compared
    assert compared.endswith(f" --out exp/{name}-sammo_tiny/compare")


def test_configurations_are_read_before_any_work(stubbed: Path) -> None:
    other = stubbed.parent / "conf" / "wrong.yaml"
    other.touch()
    for options in (["--set", "wrong=1"], ["--compare-with", str(other)]):
        done = run(stubbed, *options)
        assert (done.returncode, done.stdout) == (2, "")
    assert not (stubbed.parents[2] / "log").exists()


def test_comparisons_that_would_share_a_place(stubbed: Path) -> None:
    other = stubbed.parent / "conf" / "other" / "sammo_tiny.yaml"
    other.parent.mkdir()
    other.touch()
    name = "small-digits" if stubbed.parent.name == "librispeech" else "small"
    conformer, place = stubbed.parent / "conf" / "conformer_tiny.yaml", f"{stubbed.parent}/exp/{name}-conformer_tiny"
    for refused, reason in (
        ([str(other)], f"{other}: has the name of what it is compared with; give a file of another name"),
        ([str(conformer), "--exp-dir", place], f"{conformer}: would train in {place}, too; give another --exp-dir"),
    ):
        done = run(stubbed, "--config", "conf/sammo_tiny.yaml", "--compare-with", *refused)
        assert (done.returncode, done.stderr) == (2, f"run.sh: error: --compare-with {reason}\n")


def test_real_corpus(stubbed: Path, tmp_path: Path) -> None:
    (tmp_path / "Real").mkdir()
    commands = stages(stubbed, "--corpus", str(tmp_path / "Real"))
    assert programs(commands) == [*DATA[1:], *FEATURES, *TOKENS_AND_NOISE, *MODEL, *TESTS, *EXPORT, "ssm_asr.report"]
    config = {"librispeech": "zipformer_m", "csj": "sammo_m"}[stubbed.parent.name]
    assert f"/configs/{config}.yaml " in next(line for line in commands if "ssm_asr.train" in line)
    perturbed = [line for line in commands if "--speed-perturb" in line]
    assert len(perturbed) == 1 and "cuts_train" in perturbed[0] and "--on-the-fly" in perturbed[0]
    assert all("--on-the-fly" in line for line in commands if "prepare features" in line)
    assert "made" not in commands[-1] and "--at-most" not in commands[-1]
    stored = stages(stubbed, "--corpus", str(tmp_path / "Real"), "--store-features", "--stop-stage", "3")
    assert programs(stored) == FEATURES and not any("--on-the-fly" in line for line in stored)


def test_long_form(stubbed: Path) -> None:
    commands = stages(stubbed, "--long-form")
    assert programs(commands)[-3:] == ["ssm_asr long-form", "ssm_asr long-form", "ssm_asr.report"]
    model = commands[-2].split("--checkpoint ")[1].split()[0]
    assert (stubbed.parent / model).with_name("long-form-test-b.md").exists()
    assert programs(stages(stubbed, "--long-form")) == ["ssm_asr.report"]


def test_ci(stubbed: Path) -> None:
    commands = stages(stubbed, "--ci")
    assert "--minutes" in commands[0] and commands[-1].endswith("--at-most 50")
    assert "(synthetic)" in commands[-1]
    (config,) = (stubbed.parent / "data").glob("*/configs/*_tiny.yaml")
    assert "--set=train.num_epochs=" in config.read_text()


def test_several_gpus(stubbed: Path) -> None:
    (train,) = (line for line in stages(stubbed, "--gpus", "4", "--stop-stage", "6") if "ssm_asr.train" in line)
    assert train.startswith("-m torch.distributed.run --standalone --nproc-per-node 4 -m ssm_asr.train --config ")


def test_current_environment(stubbed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is installed: setup.sh is not called, and the python of the caller does all work."""
    root = stubbed.parents[2]
    (root / "tools" / "setup.sh").write_text("echo setup was called; exit 9\n")
    shutil.rmtree(root / ".venv")
    monkeypatch.setenv("PATH", f"{root / 'stub'}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    check, *commands = stages(stubbed, "--env", "current")
    assert check == f"{root}:/elsewhere {root}/tools/check_environment.py --extras corpus,export"
    assert programs(commands)[:4] == [*DATA, FEATURES[0]] and programs(commands)[-1] == "ssm_asr.report"
    done = run(stubbed, "--env", "current", "--stage", "13")
    assert done.stdout.endswith(f"where the package is not installed, first: export PYTHONPATH={root}\n")
    monkeypatch.delenv("PYTHONPATH")
    monkeypatch.setenv("SSM_ASR_ENV", "current")
    (check,) = stages(stubbed, "--stage", "2", "--stop-stage", "4")
    assert check == f"{root} {root}/tools/check_environment.py --extras "
    done = run(stubbed, "--env", "venv")
    assert (done.returncode, done.stdout) == (9, "setup was called\n")


def test_unusable_current_environment(stubbed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = stubbed.parents[2]
    monkeypatch.setenv("PATH", f"{root / 'stub'}:{os.environ['PATH']}")
    monkeypatch.setenv("STUB_CHECK", "2")
    done = run(stubbed, "--env", "current")
    assert done.returncode == 2 and not (stubbed.parent / "data").exists()
    python = root / "stub" / "python"
    python.write_text('#!/bin/sh\ncase "$*" in *platform*) echo 3.9.2 ;; *) exit 1 ;; esac\n')
    done = run(stubbed, "--env", "current")
    message = f"environment: error: {python} is version 3.9.2; activate an environment with Python 3.11 or later\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", message)
    python.unlink()
    for name in ("bash", "basename", "dirname", "cat"):
        (root / "stub" / name).symlink_to(shutil.which(name))
    monkeypatch.setenv("PATH", str(root / "stub"))
    done = run(stubbed, "--env", "current")
    message = "environment: error: there is no 'python' on the PATH; activate an environment that has one\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", message)


@pytest.mark.parametrize("stubbed", ["csj"], indirect=True)
def test_transcript_modes_do_not_share_data(stubbed: Path) -> None:
    stages(stubbed, "--stop-stage", "9")
    commands = stages(stubbed, "--transcript-mode", "number", "--stop-stage", "9")
    assert "make_corpus" not in commands[0] and "--corpus data/small/corpus" in commands[0]
    assert "--transcript-mode number" in commands[0] and "--out data/small-number/manifests" in commands[0]
    assert "--checkpoint exp/small-number-sammo_tiny/averaged.pt" in commands[-1]
