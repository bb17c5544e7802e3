"""Runs programs in this process. One of its own would import PyTorch and lhotse first, which takes seconds."""

import io
import runpy
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch


class Done(NamedTuple):
    """How a program ended."""

    returncode: int
    stdout: str
    stderr: str


def call(main: Callable[[], object], *arguments: object) -> Done:
    """Calls a program's main function, which finds the arguments in sys.argv."""
    out, err, status = io.StringIO(), io.StringIO(), 0
    with patch.object(sys, "argv", ["program", *map(str, arguments)]), redirect_stdout(out), redirect_stderr(err):
        try:
            main()
        except SystemExit as end:  # as the interpreter treats it
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
            if isinstance(end.code, str):
                print(end.code, file=err)
    return Done(status, out.getvalue(), err.getvalue())


def run(program: Path | str, *arguments: object) -> Done:
    """Runs a script, given by its path, or a module, given by its name, as `python` and `python -m` do."""
    if isinstance(program, str):
        return call(lambda: runpy.run_module(program, run_name="__main__", alter_sys=True), *arguments)
    with patch.object(sys, "path", [str(program.parent), *sys.path]):
        return call(lambda: runpy.run_path(str(program), run_name="__main__"), *arguments)
