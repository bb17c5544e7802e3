"""How a program ends: what was wrong with files, or an interrupt, in one line instead of a traceback."""

import sys
from collections.abc import Callable

from ssm_asr.data.features import CutError


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
