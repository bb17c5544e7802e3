"""Makes directories of data once: each is complete or absent, and replaces no directory that was made otherwise."""

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MARKER = ".complete.json"


def is_made(final: Path, settings: dict[str, Any]) -> bool:
    """Tells whether a directory is there, complete and made with these settings.

    Raises:
        ValueError: if it exists and was not made by `making`.
    """
    marker = final / MARKER
    if final.exists() and not marker.is_file():
        raise ValueError(f"{final} exists and is no made corpus: choose another --out")
    return marker.is_file() and json.loads(marker.read_text()) == settings


@contextmanager
def making(final: Path, settings: dict[str, Any]) -> Iterator[Path]:
    """Gives a temporary directory beside the final one, whose place it takes when the block ends without error."""
    final.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".making-", dir=final.parent) as made:
        root = Path(made) / final.name
        root.mkdir()
        yield root
        (root / MARKER).write_text(json.dumps(settings))
        if final.exists():
            shutil.rmtree(final)
        root.rename(final)
