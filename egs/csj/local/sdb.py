"""Reads the SDB files of CSJ, transcripts by words in Shift-JIS; what cannot be read is reported and left out.

The columns are separated by tabs. Counted from 0, column 2 has the talk, 3 the segment, its times and its channel
("0001 00000.500-00003.700 L:…"), 5 the surface form with tags, 10 the pronunciation with tags. Tags such as (F …) may
span several words, and segments.
"""

import re
from pathlib import Path
from typing import NamedTuple

from lhotse.recipes.csj import DECISIONS

from ssm_asr.data.report import Report

BROKEN = "broken SDB line"
TALK, PLACE, SURFACE, PRONUNCIATION = 2, 3, 5, 10
TIME_TOLERANCE_S = 0.01
_PLACE = re.compile(r"(\d+) (\d+\.\d+)-(\d+\.\d+) ([LR]):\S*")
_OPENED = re.compile(r"\(([!-'*-+\--:<-^`-~]+|[笑泣咳])?")  # a tag may be of ASCII other than ( ) , ; _ and space


class Segment(NamedTuple):
    """A segment is a part of a talk; its channel is L or R."""

    number: str
    channel: str


class Line(NamedTuple):
    """A line holds one word.

    Attributes:
        number: which line of the file it is, from 1.
        text: the whole line.
        segment: the segment of the word; None if it cannot be read.
        surface, pronunciation: columns of the line.
        fault: what is wrong with it; may be empty.
    """

    number: int
    text: str
    segment: Segment | None
    surface: str
    pronunciation: str
    fault: str


def read_sdb(path: Path, duration_s: float, report: Report) -> list[Line]:
    """Returns the lines of an SDB file whose segments are whole, and reports each line that is at fault.

    A segment with a broken line would lack a word, so it is left out. If the segment of a broken line cannot be read,
    the line belongs to the segment before or to the one after, and both are left out.

    Args:
        path: the SDB file.
        duration_s: the duration of the recording.
        report: collects the faults.
    """
    raw_lines = path.read_bytes().split(b"\n")
    lines = [_parse(number, raw, duration_s) for number, raw in enumerate(raw_lines, start=1) if raw.strip()]
    lost: set[Segment | None] = {None}
    for i, line in enumerate(lines):
        if line.fault:
            beside = lines[max(0, i - 1) : i + 2] if line.segment is None else [line]
            _lose(line, {other.segment for other in beside}, line.fault, path, report, lost)
    while True:  # a bracket that a lost segment closed is open now
        kept = [line for line in lines if line.segment not in lost]
        faults = [fault for column in (SURFACE, PRONUNCIATION) for fault in _unmatched(kept, column)]
        if not faults:
            return kept
        for line, fault in faults:
            if line.segment not in lost:
                _lose(line, {line.segment}, fault, path, report, lost)


def _lose(
    line: Line, segments: set[Segment | None], fault: str, path: Path, report: Report, lost: set[Segment | None]
) -> None:
    """Reports a line at fault and adds its segments to `lost`."""
    names = ", ".join(sorted(segment.number for segment in segments if segment))
    report.leave_out(f"{path}:{line.number}", BROKEN, f"{fault} [segment left out: {names or 'none'}]")
    lost |= segments


def _parse(number: int, raw: bytes, duration_s: float) -> Line:
    """Returns a line, with what is wrong with it."""
    text = raw.decode("shift_jis", errors="replace").rstrip("\r")
    columns = text.split("\t")
    place = _PLACE.fullmatch(columns[PLACE]) if len(columns) > PLACE else None
    segment = Segment(place[1], place[4]) if place else None
    columns += [""] * (PRONUNCIATION + 1 - len(columns))
    surface, pronunciation = columns[SURFACE], columns[PRONUNCIATION]
    line = Line(number, text, segment, surface, pronunciation, "")
    return line._replace(fault=_fault(raw, line, place, duration_s))


def _fault(raw: bytes, line: Line, place: re.Match[str] | None, duration_s: float) -> str:
    """Returns what is wrong with a line, considered by itself; "" if nothing is."""
    num_columns = line.text.count("\t") + 1
    try:
        raw.decode("shift_jis")
    except UnicodeDecodeError as error:
        return f"no Shift-JIS from byte {error.start} on"
    if num_columns <= SURFACE:
        return f"{num_columns} columns, {SURFACE + 1} or more are expected"
    columns = line.text.split("\t")
    if not columns[TALK].strip():
        return f"column {TALK}, the talk, is empty"
    if place is None:
        return f"column {PLACE} is {columns[PLACE]!r}; expected SEGMENT START-END CHANNEL:…"
    if not float(place[2]) < float(place[3]) <= duration_s + TIME_TOLERANCE_S:
        return f"times {place[2]} - {place[3]} s in audio of {duration_s:.3f} s"
    for tag in _OPENED.findall(line.surface):
        if tag not in DECISIONS:
            return f"column {SURFACE}: unknown tag ({tag} in {line.surface!r}"
    return ""


def _unmatched(lines: list[Line], column: int) -> list[tuple[Line, str]]:
    """Returns the lines with a bracket that lacks its counterpart."""
    faults = []
    opened: dict[str, list[Line]] = {"L": [], "R": []}
    for line in lines:
        text = line.surface if column == SURFACE else line.pronunciation
        assert line.segment is not None
        stack = opened[line.segment.channel]
        for bracket in re.findall("[()]", text):
            if bracket == "(":
                stack.append(line)
            elif stack:
                stack.pop()
            else:
                faults.append((line, f"column {column}: ) without ( in {text!r}"))
    faults += [(line, f"column {column}: a bracket is never closed") for stack in opened.values() for line in stack]
    return faults
