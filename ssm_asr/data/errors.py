"""Errors about audio and cuts, each of which fits into one line.

This module imports no package, so a program can catch these errors without loading lhotse.
"""

from pathlib import Path


class AudioError(ValueError):
    """This error means that audio cannot be used; its message names the file, the reason and details in one line.

    Attributes:
        reason: one of a few fixed phrases, so reasons can be counted.
        detail: numbers and a remedy; may be empty.
    """

    def __init__(self, path: Path | str, reason: str, detail: str = "") -> None:
        super().__init__(f"{path}: {reason}" + (f": {detail}" if detail else ""))
        self.reason = reason
        self.detail = detail


class CutError(ValueError):
    """This error means that the audio or the features of a cut cannot be read; its message is one line."""


def first_line(error: Exception) -> str:
    """Returns what an exception of lhotse says first; pages about the cut and the call stack may follow it."""
    return str(error).strip().partition("\n")[0].removesuffix(" Details:") or type(error).__name__
