"""The tutorial: its script makes manifests that the next command takes, its commands have the options they use."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from script import call

from ssm_asr.cli import VERBS, prepare

ROOT = Path(__file__).parent.parent
TUTORIAL = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(bash|python)\n(.*?)```", TUTORIAL, re.S)
COMMANDS = [
    line.strip()
    for kind, block in BLOCKS
    if kind == "bash"
    for line in re.split(r"\n|; do |; done|\| ", block.replace("\\\n", " "))
    if line.strip().startswith("ssm-asr ")
]


def test_the_script_makes_manifests(tmp_path: Path) -> None:
    script = next(block for kind, block in BLOCKS if kind == "python" and "RecordingSet" in block)
    (tmp_path / "manifests.py").write_text(script, encoding="utf-8")
    rng = np.random.default_rng(0)
    rows = ["file\tspeaker\ttext"]
    for speaker in range(6):
        for n in range(2):
            name = f"s{speaker}/{n}.wav"
            (tmp_path / "recordings" / f"s{speaker}").mkdir(parents=True, exist_ok=True)
            soundfile.write(tmp_path / "recordings" / name, 0.1 * rng.standard_normal(48000), 48000)
            rows.append(f"{name}\tspeaker{speaker}\tOne, {n}!")
    (tmp_path / "recordings" / "broken.wav").write_text("no sound")
    rows.append("broken.wav\tspeaker0\ttwo")
    (tmp_path / "recordings" / "transcripts.tsv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    command = [sys.executable, str(tmp_path / "manifests.py"), str(tmp_path / "recordings"), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr.startswith("left out: ") and "broken.wav" in done.stderr
    assert re.findall(r"(\S+): (\d+) recordings of (\d+) speakers", done.stdout) == [
        ("train", "8", "4"), ("dev", "2", "1"), ("test-unseen", "2", "1"),
    ]  # fmt: skip
    arguments = ("check", "--manifests", tmp_path / "out", "--out", tmp_path / "cuts", "--jobs", 1)
    checked = call(prepare.main, *arguments)
    assert checked.returncode == 0 and "train: kept 8, left out 0" in checked.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_have_their_options(command: str) -> None:
    verb, *words = command.removeprefix("ssm-asr ").split()
    assert verb in VERBS
    program = __import__(f"ssm_asr.cli.{verb.replace('-', '_')}", fromlist=["main"])
    under = words[:1] if verb == "prepare" else []
    help_text = call(program.main, *under, "--help").stdout
    options = [word for word in words if word.startswith("--")]
    assert options, command
    for option in options:
        assert re.search(rf"{option}\b", help_text), option
