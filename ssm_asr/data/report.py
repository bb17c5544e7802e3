"""What was left out of a corpus, and why: nothing is dropped in silence."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


class LeftOut(NamedTuple):
    """One item that was left out."""

    item: str  # file or utterance id
    reason: str  # one of a few fixed phrases, so that reasons can be counted
    detail: str = ""


class Report:
    """Counts what is kept and collects what is left out.

    Attributes:
        num_kept: items that stay.
        left_out: the others, each with its reason.
    """

    def __init__(self) -> None:
        self.num_kept = 0
        self.left_out: list[LeftOut] = []

    def leave_out(self, item: str, reason: str, detail: str = "") -> None:
        """Record one item that is left out."""
        self.left_out.append(LeftOut(item, reason, " ".join(detail.split())))

    def lines(self) -> Iterator[str]:
        """One tab-separated line per item left out: item, reason, detail."""
        for entry in self.left_out:
            yield "\t".join(entry).rstrip("\t")

    def counts(self) -> Counter[str]:
        """Number of items left out by reason."""
        return Counter(entry.reason for entry in self.left_out)

    def summary(self) -> str:
        """ "kept 98, left out 2: 1 empty transcript (e.g. 84-12-0001), 1 ..." in one line."""
        text = f"kept {self.num_kept}, left out {len(self.left_out)}"
        examples = {entry.reason: entry.item for entry in reversed(self.left_out)}
        parts = [f"{n} {reason} (e.g. {examples[reason]})" for reason, n in self.counts().most_common()]
        return f"{text}: {', '.join(parts)}" if parts else text

    def write(self, path: Path) -> None:
        """Write `lines` to a file."""
        path.write_text("".join(line + "\n" for line in self.lines()), encoding="utf-8")
