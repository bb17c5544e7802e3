"""What the documentation names is there: links, files, modules and programs; and what it quotes is what is printed."""

import re
import subprocess
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

import pytest
import torch

from ssm_asr.cli import VERBS
from ssm_asr.training.fast import Fast, resolve_fast

ROOT = Path(__file__).parent.parent
LISTED = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
NAMES = subprocess.run(LISTED, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
FILES = {PurePosixPath(name) for name in NAMES if name and (ROOT / name).exists()}
PATHS = FILES | {folder for file in FILES for folder in file.parents}
DOCUMENTS = sorted(str(file) for file in FILES if file.suffix == ".md")
# Records keep the names of the commit at which they were written.
RECORDS = {document for document in DOCUMENTS if re.search(r"^docs/log/|RESULTS\.md$|^CHANGELOG\.md$", document)}

FENCED = re.compile(r"^ *```.*?\n(.*?)^ *```", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
COMMAND = re.compile(r"(?:ssm-asr|python -m ssm_asr(?:\.| ))[ ]?([a-z][a-z_-]*)")
MODULE = re.compile(r"-m ssm_asr\.(\w+)")


def read(document: str) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


def code_of(text: str) -> list[str]:
    """Fenced blocks, and what stands between backticks elsewhere."""
    return FENCED.findall(text) + re.findall(r"`([^`\n]+)`", FENCED.sub("", text))


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives to headings."""
    headings = re.findall(r"^#+ (.+)$", FENCED.sub("", text), re.MULTILINE)
    plain = [re.sub(r"[^\w\- ]", "", heading.strip().lower()) for heading in headings]
    return {heading.replace(" ", "-") for heading in plain}


def broken_links(document: str, text: str) -> list[str]:
    """Relative links to files that are not there, or to headings that a document lacks."""
    broken = []
    for link in LINK.findall(FENCED.sub("", text)):
        target, _, anchor = link.partition("#")
        if re.match(r"\w+:", link):
            continue
        path = (ROOT / document).parent / target if target else ROOT / document
        if not path.exists() or (anchor and anchor not in anchors(path.read_text(encoding="utf-8"))):
            broken.append(link)
    return broken


def missing_paths(document: str, text: str) -> list[str]:
    """Paths in code that match no file: those whose first part is a folder of the root, or of the document's folder.

    NAME and parts in braces stand for anything. What git ignores need not be there, since programs make it.
    """
    missing = []
    for token in " ".join(code_of(text)).split():
        token = token.strip("\"'();,:").rstrip("/.")
        if not re.fullmatch(r"[\w.*{},-]+(/[\w.*{},-]+)+", token):
            continue
        pattern = re.sub(r"NAME|\{[^}]*\}", "*", token)
        folders = [PurePosixPath(), PurePosixPath(document).parent]
        patterns = [str(folder / pattern) for folder in folders if folder / pattern.split("/")[0] in PATHS]
        if patterns and not any(fnmatchcase(str(path), each) for path in PATHS for each in patterns):
            missing += [] if any(map(is_ignored, patterns)) else [token]
    return missing


def is_ignored(path: str) -> bool:
    return subprocess.run(["git", "check-ignore", "--quiet", f"{path}/"], cwd=ROOT, check=False).returncode == 0


def unknown_programs(text: str) -> list[str]:
    """Verbs of ssm-asr in code that there are not, and modules that `python -m` cannot run."""
    code = "\n".join(code_of(text))
    verbs = {verb.replace("_", "-") for verb in COMMAND.findall(code)}
    modules = [f"ssm_asr.{name}" for name in MODULE.findall(code)]
    absent = [name for name in modules if PurePosixPath(f"{name.replace('.', '/')}.py") not in FILES]
    return sorted(verbs - VERBS.keys()) + [name for name in absent if name[8:].islower()]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links(document: str) -> None:
    assert broken_links(document, read(document)) == []


@pytest.mark.parametrize("document", [document for document in DOCUMENTS if document not in RECORDS])
def test_paths(document: str) -> None:
    assert missing_paths(document, read(document)) == []


@pytest.mark.parametrize("document", [document for document in DOCUMENTS if document not in RECORDS])
def test_programs(document: str) -> None:
    assert unknown_programs(read(document)) == []


def test_what_is_wrong_is_found() -> None:
    text = "[a](no.md) [b](README.md#no) [c](README.md#recipes) [d](https://x.org/y) `tests/no.py` `egs/*/RESULTS.md`"
    assert broken_links("README.md", text) == ["no.md", "README.md#no"]
    assert missing_paths("README.md", text) == ["tests/no.py"]
    text = "```\nbash egs/NAME/run.sh ssm_asr/ops/NAME_kernel.py exp/no egs/csj/exp/x\n```\n"
    assert missing_paths("docs/a.md", text) == []
    text = "`ssm_asr/ops/NAME_no.py`, `log/no.md`, `log/README.md`"
    assert missing_paths("docs/a.md", text) == ["ssm_asr/ops/NAME_no.py", "log/no.md"]
    text = "ssm-asr is, `ssm-asr VERB`, `ssm-asr sing -x`\n```\npython -m ssm_asr.hum\npython -m ssm_asr.train\n```\n"
    assert unknown_programs(text) == ["hum", "sing", "ssm_asr.hum"]


def test_what_the_start_of_a_run_prints() -> None:
    """The text of docs/performance.md is the program's."""
    text = read("docs/performance.md")
    on_cpu = resolve_fast("auto", torch.device("cpu"), fixed_shapes=True, loss_backend="torch")
    for fast in (Fast("", "", ""), Fast("", *["data.fixed_shapes is false"] * 2), on_cpu):
        assert "```\n" + "\n".join(fast.lines()) + "\n```" in text
