"""What programs share: counts as arguments, and how they end, in one line where a file is wrong or on Ctrl-C."""

import argparse
import re
import sys
from collections.abc import Callable

from ssm_asr.data.errors import CutError


def positive(text: str) -> int:
    """A type of arguments: whole numbers from 1 on."""
    if not re.fullmatch(r"[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"{text}: give a whole number, 1 or more")
    return int(text)


def positives(text: str) -> list[int]:
    """The same with commas between them."""
    return [positive(part) for part in text.split(",")]


def numbers(text: str) -> list[int]:
    """Any whole numbers with commas between them."""
    return [int(part) for part in text.split(",")]


numbers.__name__ = "list of numbers"  # in the message of argparse


def run(main: Callable[[], int | None]) -> int:
    """The exit status of a program: its own, 130 after Ctrl-C, 2 after an error of the system that concerns a file."""
    try:
        return main() or 0
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    except CutError as error:  # those of a loader's worker have its traceback in front
        print(str(error).strip().splitlines()[-1].partition("CutError: ")[2] or error, file=sys.stderr)
        return 2
    except OSError as error:
        if error.filename is None:
            raise
        print(f"{error.filename}: {error.strerror}", file=sys.stderr)
        return 2
