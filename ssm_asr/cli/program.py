"""What all programs share: counts as arguments, and how programs end, in one line after a fault or on Ctrl-C."""

import argparse
import errno
import os
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
    """A type of arguments: whole numbers from 1 on, with commas between them."""
    return [positive(part) for part in text.split(",")]


def run(main: Callable[[], int | None]) -> int:
    """Runs a program and returns its exit status.

    The status is 130 after Ctrl-C, 141 if the reader of its output has gone, 2 after an error of the system that
    concerns a file, else the program's own.
    """
    try:
        status = main() or 0
        if sys.stdout is not None:  # it is None if the caller closed it
            sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # as after `| head`; Python would write at exit what is still in its buffer
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except CutError as error:  # if a loader's worker raised it, its traceback stands in front
        print(str(error).strip().splitlines()[-1].partition("CutError: ")[2] or error, file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno == errno.ENOSPC and error.filename is None and sys.stdout is not None:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            print("output cannot be written: no space left on device", file=sys.stderr)
            return 2
        if error.filename is None:
            raise
        print(f"{error.filename}: {error.strerror}", file=sys.stderr)
        return 2
