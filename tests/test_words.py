"""The project's files hold no path of the machine that they were written on."""

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parent.parent

# Home directories and the like, at the start of a path; tests may make up what they need.
PRIVATE_PATH = re.compile(r"(?<![\w.~$}/])/(?:home|root|Users|work|mnt|tmp)/[\w.]")


def project_files() -> list[Path]:
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [ROOT / name for name in names.split("\0") if name]


def test_no_private_paths() -> None:
    found = []
    for path in project_files():
        if path.is_relative_to(ROOT / "tests") or not path.is_file():
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # not a text file
        found += [f"{path}: {match.group()}..." for match in PRIVATE_PATH.finditer(text)]
    assert found == []


def test_private_paths_are_found() -> None:
    for text in ("see /home/ann/x", '"/tmp/x"', "file:/root/.cache"):
        assert PRIVATE_PATH.search(text), text
    for text in (
        "network/work/x",
        "/data/LibriSpeech",
        "$HOME/tmp/x",
        "https://example.org/home/x",
        "./tmp/x",
    ):
        assert not PRIVATE_PATH.search(text), text
