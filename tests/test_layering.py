"""Imports of ssm_asr go one way: units -> ops -> ssm -> encoder -> transducer -> config -> ... -> programs."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Each may import those before it.
SPINE = ("units", "fields", "ops", "ssm", "encoder", "transducer", "config", "checkpoint", "search", "api")
# Beside the spine: what each may import beside itself.
ASIDE = {
    "data": {"units", "fields"},
    "training": {*SPINE[: SPINE.index("search")], "data"},
    "exporting": {*SPINE, "data"},
    "evaluation": {*SPINE, "data", "exporting"},
}
PROGRAMS = "cli"  # parse arguments, and may import everything
# `python -m ssm_asr.VERB`: these import the programs and nothing else.
SHIMS = {"__main__", "average", "compare", "decode", "describe", "export", "import_icefall", "prepare", "report"}
SHIMS |= {"stream", "train"}
OUTSIDE = ("egs", "tools", "benchmarks", "research", "recipes_lib", "tests")
TESTED = {"benchmarks", "research"}  # the tests may import these

SOURCES = sorted((ROOT / "ssm_asr").rglob("*.py"))


def part_of(path: Path) -> str:
    """The module or subpackage of ssm_asr that a file belongs to."""
    return path.relative_to(ROOT / "ssm_asr").parts[0].removesuffix(".py")


def allowed(part: str) -> set[str]:
    """The parts of ssm_asr that a part may import, itself included."""
    if part == PROGRAMS:
        return {*SPINE, *ASIDE, PROGRAMS, "__version__"}
    if part in SHIMS:
        return {PROGRAMS}
    if part in ASIDE:
        return {part, *ASIDE[part]}
    if part == "__init__":
        return {"api"}
    before = {*SPINE[: SPINE.index(part) + 1]}
    return {*before, "data"} if "config" in before else before


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
    """The imports of a part of ssm_asr that go up or aside, or that only some parts may have."""
    wrong = []
    for name in imports(source):
        package, _, rest = name.partition(".")
        if package == "ssm_asr":
            if rest.split(".")[0] not in allowed(part):
                wrong.append(name)
        elif package in OUTSIDE or (package == "argparse" and part != PROGRAMS):
            wrong.append(name)
    return wrong


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path: Path) -> None:
    part = part_of(path)
    assert part in {"__init__", PROGRAMS, *SPINE, *ASIDE, *SHIMS}, f"{part} is new: give it a place in this test"
    assert wrong_imports(part, path.read_text()) == []


@pytest.mark.parametrize("path", sorted((ROOT / "ssm_asr" / "cli").glob("*.py")), ids=lambda path: path.name)
def test_programs_do_not_import_one_another(path: Path) -> None:
    assert imported_programs(path) == []


@pytest.mark.parametrize("folder", ["egs", "tools", "benchmarks", "research"])
def test_scripts_do_not_import_programs(folder: str) -> None:
    for path in (ROOT / folder).rglob("*.py"):
        assert imported_programs(path) == [], path


def imported_programs(path: Path) -> list[str]:
    """Returns what a file imports of programs, other than what they share."""
    shared = {"arguments", "program"}
    names = [name for name in imports(path.read_text()) if name.startswith("ssm_asr.cli.")]
    return [name for name in names if name.split(".")[2] not in shared]


@pytest.mark.parametrize("folder", OUTSIDE)
def test_nothing_imports_recipes_or_tools(folder: str) -> None:
    for path in (ROOT / folder).rglob("*.py"):
        for name in imports(path.read_text()):
            package = name.split(".")[0]
            mine = {folder, *TESTED} if folder == "tests" else {folder}
            assert package not in OUTSIDE or package in mine, f"{path}: {name}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_triton_is_in_the_kernels_alone(path: Path) -> None:
    """And the kernels are known to the operations alone, which choose."""
    is_op = path.parent.name == "ops"
    for name in imports(path.read_text()):
        if name.split(".")[0] == "triton":
            assert is_op and (path.stem.endswith("_kernel") or path.stem == "ahead"), f"{path}: {name}"
        if name.startswith("ssm_asr.ops.") and name.split(".")[2].endswith("_kernel"):
            assert is_op, f"{path}: {name}"


@pytest.mark.parametrize(
    ("part", "source", "wrong"),
    [
        ("encoder", "from ssm_asr import units, transducer", ["ssm_asr.transducer"]),
        ("encoder", "import ssm_asr.data.features", ["ssm_asr.data.features"]),
        ("config", "from ssm_asr.data.features import Fbank", []),
        ("data", "from ssm_asr.data.tokens import A\nfrom ssm_asr.config import B", ["ssm_asr.config.B"]),
        ("ops", "def f():\n    from ssm_asr.encoder.state import leaves", ["ssm_asr.encoder.state.leaves"]),
        ("search", "import argparse, ssm_asr.cli.decode", ["argparse", "ssm_asr.cli.decode"]),
        ("cli", "import argparse\nfrom ssm_asr.training import optim\nfrom tools import x", ["tools.x"]),
        ("train", "from ssm_asr.cli import start\nfrom ssm_asr.training import optim", ["ssm_asr.training.optim"]),
    ],
)
def test_wrong_imports_are_found(part: str, source: str, wrong: list[str]) -> None:
    assert wrong_imports(part, source) == wrong
