"""Keeps manifests from running commands and from fetching from the network, unless the user trusts them.

lhotse runs what a manifest gives as a source of the type `command`, or as a path that begins with `pipe:`. Manifests
come from strangers, too, so both are refused where a manifest is read, and nothing of it has been opened then.
"""

import os
import stat
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from lhotse import MonoCut

TRUST = "SSM_ASR_TRUST"  # environment variable: commands, urls, or both with a comma, which child processes see as well
FETCHED = ("url", "lilcom_url")
RUN = ("command", "kaldiio")  # Kaldi's files of features may name commands


class Need(NamedTuple):
    """What reading a part of a manifest needs trust for: "commands" or "urls", and the text that says so there."""

    kind: str
    text: str


def trust(kind: str) -> None:
    """Lets this process and those that it starts read manifests with "commands" or "urls"."""
    os.environ[TRUST] = ",".join(sorted({*filter(None, os.environ.get(TRUST, "").split(",")), kind}))


def require_trusted(manifest: Any, items: Iterable[Any]) -> None:
    """Checks that reading recordings or cuts runs and fetches nothing that is not trusted. It opens nothing.

    Args:
        manifest: what an error calls the manifest.
        items: recordings or cuts of it.

    Raises:
        ValueError: if it would; the message says what, and how to allow it.
    """
    trusted = os.environ.get(TRUST, "").split(",")
    for item in items:
        for kind, text in _needs(item):
            if kind not in trusted:
                would = "run the command" if kind == "commands" else "fetch"
                raise ValueError(
                    f"{manifest}: {item.id}: reading this would {would} {text[:100]!r}; give --trust-{kind}, or set "
                    f"{TRUST}={kind}, if you trust this manifest"
                )


def _needs(item: Any) -> Iterator[Need]:
    """Yields what reading an item needs trust for."""
    # Nearly all cuts have one channel and no custom fields, and to look at their parts takes a tenth of the time.
    simple = isinstance(item, MonoCut) and not item.custom
    for kind, place in _places(item) if simple else _parts(item.to_dict()):
        need = _need(kind, place)
        if need is not None:
            yield need


def _places(cut: MonoCut) -> Iterator[tuple[str, Any]]:
    """Yields type and place of all audio sources and arrays of a cut, but for those in its custom fields."""
    recording = cut.recording
    if recording is not None:
        yield from ((source.type, source.source) for source in recording.sources)
        for transform in recording.transforms or ():
            yield from _parts(transform if isinstance(transform, dict) else transform.to_dict())
    if cut.features is not None:
        yield cut.features.storage_type, cut.features.storage_path


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    """Yields type and place of all audio sources and arrays in a dictionary, such as those of impulse responses."""
    if isinstance(value, dict):
        if "source" in value and "type" in value:
            yield str(value["type"]), value["source"]
        if "storage_type" in value:
            yield str(value["storage_type"]), value.get("storage_path")
        value = list(value.values())
    if isinstance(value, list | tuple):
        for part in value:
            yield from _parts(part)


def _need(kind: str, place: Any) -> Need | None:
    path = place if isinstance(place, str) else ""
    if kind in RUN or path.startswith("pipe:") or path.rstrip().endswith("|"):
        return Need("commands", path or kind)
    if kind in FETCHED or "://" in path:
        return Need("urls", path)
    return None


def require_files(item: Any) -> None:
    """Checks that the files of a cut are files: opening a pipe waits for somebody to write to it, perhaps for ever.

    Raises:
        ValueError: if one is there but is something else.
    """
    for kind, place in _parts(item.to_dict()) if not isinstance(item, MonoCut) else _places(item):
        if isinstance(place, str) and kind != "command" and _is_special(place):
            raise ValueError(f"{place}: a pipe or a device, where a file is needed")


def _is_special(path: str) -> bool:
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return False  # whoever opens it says why it cannot
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))
