"""Reports what is left out of a corpus, and why."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


class LeftOut(NamedTuple):
    """This item is left out.

    Attributes:
        item: a file or the id of an utterance.
        reason: one of a few fixed phrases, so reasons can be counted.
        detail: more about the reason.
    """

    item: str
    reason: str
    detail: str = ""


class Report:
    """A report counts what is kept and collects what is left out.

    Attributes:
        num_kept: number of items that are kept.
        left_out: the other items, each with its reason.
    """

    def __init__(self) -> None:
        self.num_kept = 0
        self.left_out: list[LeftOut] = []

    def leave_out(self, item: str, reason: str, detail: str = "") -> None:
        """Records one item that is left out."""
        self.left_out.append(LeftOut(item, reason, " ".join(detail.split())))

    def lines(self) -> Iterator[str]:
        """Yields a tab-separated line for each item left out: item, reason, detail."""
        for entry in self.left_out:
            yield "\t".join(entry).rstrip("\t")

    def counts(self) -> Counter[str]:
        """Returns how many items are left out for each reason."""
        return Counter(entry.reason for entry in self.left_out)

    def summary(self) -> str:
        """Returns one line such as "kept 98, left out 2: 1 empty transcript (e.g. 84-12-0001), 1 too long (e.g. …)"."""
        text = f"kept {self.num_kept}, left out {len(self.left_out)}"
        examples = {entry.reason: entry.item for entry in reversed(self.left_out)}
        parts = [f"{n} {reason} (e.g. {examples[reason]})" for reason, n in self.counts().most_common()]
        return f"{text}: {', '.join(parts)}" if parts else text

    def write(self, path: Path) -> None:
        """Writes `lines` to a file."""
        path.write_text("".join(line + "\n" for line in self.lines()), encoding="utf-8")
