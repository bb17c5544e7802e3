"""Imports go one way: units -> ssm -> encoder -> transducer -> config -> checkpoint -> search -> exporting -> verbs."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Each may import those before it; what stands aside may be imported from config on.
SPINE = ("units", "ssm", "encoder", "transducer", "config", "checkpoint", "search", "exporting")
ASIDE = {
    "averaging": {"units"},
    "data": {"units"},
    "distributed": {"units"},
    "experiment_dir": {"units", "config", "checkpoint", "data"},
    "optim": {"units", "ssm", "optim_kernels"},
    "program": {"units", "data"},
    "optim_kernels": {"units"},
    "results": {"units", "scoring"},
    "scoring": {"units"},
    "stopping": {"units"},
}
# Programs, the only modules that parse arguments, with what `program` has for them all.
VERBS = {"average", "compare", "decode", "describe", "export", "import_icefall", "prepare", "report", "stream", "train"}

SOURCES = sorted((ROOT / "ssm_asr").rglob("*.py"))


def part_of(path: Path) -> str:
    """The module or subpackage of ssm_asr that a file belongs to."""
    return path.relative_to(ROOT / "ssm_asr").parts[0].removesuffix(".py")


def allowed(part: str) -> set[str]:
    """The parts of ssm_asr that a part may import, itself included."""
    if part in VERBS:
        return {*SPINE, *ASIDE, *VERBS}
    if part in ASIDE:
        return {part, *ASIDE[part]}
    if part == "__init__":
        return set()
    before = {*SPINE[: SPINE.index(part) + 1]}
    return before | ASIDE.keys() if "config" in before else before


def imports(source: str) -> list[str]:
    """The full names of what a source imports; `from a import b` counts as a.b."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: import by the full name, not a relative one"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def wrong_imports(part: str, source: str) -> list[str]:
    """The imports of a part of ssm_asr that go up or aside, or parse arguments where only verbs may."""
    wrong = []
    for name in imports(source):
        package, _, rest = name.partition(".")
        if package == "ssm_asr":
            if rest.split(".")[0] not in allowed(part):
                wrong.append(name)
        elif package in ("egs", "tools") or (package == "argparse" and part not in {*VERBS, "program"}):
            wrong.append(name)
    return wrong


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path: Path) -> None:
    part = part_of(path)
    assert part in {"__init__", *SPINE, *ASIDE, *VERBS}, f"{part} is new: give it a place in {Path(__file__).name}"
    assert wrong_imports(part, path.read_text()) == []


@pytest.mark.parametrize("folder", ["egs", "tools", "tests"])
def test_nothing_imports_recipes_or_tools(folder: str) -> None:
    for path in (ROOT / folder).rglob("*.py"):
        for name in imports(path.read_text()):
            assert name.split(".")[0] not in ("egs", "tools"), f"{path}: {name}"


@pytest.mark.parametrize(
    ("part", "source", "wrong"),
    [
        ("encoder", "from ssm_asr import units, transducer", ["ssm_asr.transducer"]),
        ("encoder", "import ssm_asr.data.features", ["ssm_asr.data.features"]),
        ("config", "from ssm_asr.data.features import Fbank", []),
        ("data", "from ssm_asr.data.tokens import A\nfrom ssm_asr.config import B", ["ssm_asr.config.B"]),
        ("optim", "def f():\n    from ssm_asr.scoring import score", ["ssm_asr.scoring.score"]),
        ("search", "import argparse, ssm_asr.decode", ["argparse", "ssm_asr.decode"]),
        ("train", "import argparse\nfrom ssm_asr import optim\nfrom tools import x", ["tools.x"]),
    ],
)
def test_wrong_imports_are_found(part: str, source: str, wrong: list[str]) -> None:
    assert wrong_imports(part, source) == wrong
