"""Check that this Python has the packages that setup.py requires; nothing is installed, and no network is used.

A package that is missing or too old takes a line on stderr, which says how to get it, and makes the exit status 2.
Packages in other versions than the tested ones, those of tools/constraints.txt, are noted in one line on stdout.
"""

import argparse
import ast
import importlib.util
import platform
import re
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
TORCH_REMEDY = "choose the build for your CUDA at https://pytorch.org/get-started/locally"


def read_setup(path: Path) -> dict[str, Any]:
    """Returns the literal arguments of setup() in a setup.py, by name, without running it."""
    calls = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
    (call,) = (node for node in calls if isinstance(node.func, ast.Name) and node.func.id == "setup")
    wanted = ("install_requires", "extras_require")
    return {word.arg: ast.literal_eval(word.value) for word in call.keywords if word.arg in wanted}


def plain(name: str) -> str:
    """Returns the name of a distribution in the one form that PyPI compares."""
    return re.sub(r"[-_.]+", "-", name).lower()


def read_constraints(path: Path) -> dict[str, str]:
    """Returns the tested version of each package."""
    lines = path.read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==") for line in lines if "==" in line and not line.startswith("#")]
    return {plain(name): version.strip() for name, version in pairs}


def numbers(version: str) -> tuple[int, ...]:
    """Returns the release numbers that a version begins with: 2.11.0a0+git is (2, 11, 0)."""
    return tuple(int(number) for number in re.findall(r"\d+", re.split(r"[^\d.]", version)[0]))


def installed_version(name: str) -> str | None:
    """Returns the version of a package; "" if it can only be imported, and None if it is missing."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:  # a container may have it under another name, such as onnxruntime-gpu
        return "" if importlib.util.find_spec(name.replace("-", "_")) else None


def check(requirements: list[str], tested: dict[str, str]) -> tuple[list[str], list[str]]:
    """Compares requirements such as "lhotse>=1.33" with what is installed.

    Returns:
        A line for each package that is missing or too old, and a phrase for each in a version that is not tested.
    """
    faults, others = [], []
    for requirement in requirements:
        name, _, least = requirement.partition(">=")
        version, best = installed_version(name), tested.get(plain(name), "")
        remedy = TORCH_REMEDY if name == "torch" else f"python -m pip install {name}{best and f'=={best}'}"
        if version is None:
            faults.append(f"{name}{least and f' {least} or later'} is missing: {remedy}")
        elif version and least and numbers(version) < numbers(least):
            faults.append(f"{name} {version} is too old, {least} or later is needed: {remedy}")
        elif best and version.partition("+")[0] != best:
            others.append(f"{name} {version or 'of unknown version'} ({best})")
    return faults, others


def main() -> int:
    """Runs the program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--extras", default="", help="extras of setup.py to check too, such as corpus,export")
    options = parser.parse_args()
    setup = read_setup(ROOT / "setup.py")
    requirements = list(setup["install_requires"])
    for extra in filter(None, options.extras.split(",")):
        if extra not in setup["extras_require"]:
            parser.error(f"--extras {extra}: give some of {', '.join(setup['extras_require'])}")
        requirements += setup["extras_require"][extra]
    faults, others = check(list(dict.fromkeys(requirements)), read_constraints(ROOT / "tools" / "constraints.txt"))
    if not faults:
        print(f"environment: {sys.prefix} is used as it is (Python {platform.python_version()})")
    if others:
        print(f"environment: versions other than the tested ones: {', '.join(others)}")
    for fault in faults:
        print(f"environment: error: {fault}", file=sys.stderr)
    return 2 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
