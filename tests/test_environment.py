"""docs/environment.md lists each environment variable that the project reads or sets, once."""

import ast
import re
from collections import Counter
from pathlib import Path

from test_words import project_files

ROOT = Path(__file__).parent.parent
# The shell sets these itself, or has them from any login.
OF_SHELL = {"BASH_REMATCH", "BASH_SOURCE", "HOME", "IFS", "PATH", "PWD", "RANDOM", "SECONDS"}


def listed() -> list[str]:
    """Returns the variables in the first column of the table."""
    rows = re.findall(r"^\| (`.*?) \|", (ROOT / "docs" / "environment.md").read_text(encoding="utf-8"), re.MULTILINE)
    return [name for row in rows for name in re.findall(r"`([A-Z][A-Z0-9_]+)`", row)]


def is_environ(node: ast.expr) -> bool:
    """Tells whether an expression is os.environ."""
    return ast.unparse(node) in ("os.environ", "environ")


def python_variables(source: str) -> set[str]:
    """Returns the variables that a Python file reads or sets through os.environ or os.getenv."""
    found: list[ast.expr | None] = []
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Subscript) and is_environ(node.value):
            found.append(node.slice)
        elif isinstance(node, ast.Compare) and any(is_environ(right) for right in node.comparators):
            found.append(node.left)
        elif isinstance(node, ast.Dict) and any(is_environ(value) for value in node.values):
            found += node.keys
        elif isinstance(node, ast.BinOp) and is_environ(node.left) and isinstance(node.right, ast.Dict):
            found += node.right.keys
        elif isinstance(node, ast.Call):
            function = ast.unparse(node.func)
            if re.fullmatch(r"(os\.)?(getenv|environ\.\w+)", function):
                found += node.args[:1]
            elif function == "patch.dict" and is_environ(node.args[0]):
                names |= {keyword.arg for keyword in node.keywords if keyword.arg}
    names |= {node.value for node in found if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    return names - OF_SHELL


def shell_variables(source: str) -> set[str]:
    """Returns the variables in capitals that a shell script uses or exports."""
    code = re.sub(r"(?m)(^|\s)#.*$", "", source)
    return set(re.findall(r"(?:\$\{?[!#]?|export )([A-Z][A-Z0-9_]*)", code)) - OF_SHELL


def test_every_variable_is_listed() -> None:
    missing = []
    for path in filter(Path.is_file, project_files()):
        if path.suffix == ".py":
            used = python_variables(path.read_text(encoding="utf-8"))
        elif path.suffix == ".sh" or path.parent.name == ".ci":
            used = shell_variables(path.read_text(encoding="utf-8"))
        else:
            continue
        missing += [f"{path}: {name}" for name in sorted(used - set(listed()))]
    assert missing == []


def test_each_variable_is_listed_once() -> None:
    assert Counter(listed()).most_common(1)[0][1] == 1


def test_variables_are_found() -> None:
    python = """
import os
a = os.environ["ONE"], os.environ.get("TWO"), os.getenv("THREE", "x"), "FOUR" in os.environ
b = {**os.environ, "FIVE": "x"}, os.environ | {"SIX": "x"}
os.environ["SEVEN"] = "NOT_THIS"
with patch.dict(os.environ, EIGHT="NOT_THIS"):
    pass
"""
    assert python_variables(python) == {"ONE", "TWO", "THREE", "FOUR", "FIVE", "SIX", "SEVEN", "EIGHT"}
    shell = 'echo "${ONE:-x} $TWO ${#THREE}" "${PATH}" $lower # $NOT_THIS\n# $NOT_THIS\nexport FOUR=4'
    assert shell_variables(shell) == {"ONE", "TWO", "THREE", "FOUR"}
