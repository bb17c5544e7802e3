"""Write lhotse manifests of LibriSpeech, mini LibriSpeech or a made corpus, whichever parts are there.

The program writes NAME_recordings.jsonl.gz and NAME_supervisions.jsonl.gz for NAME = train (all train-* parts joined),
dev (all dev-* parts joined) and each test-* part, and NAME.left_out.tsv with what cannot be used. `python -m
ssm_asr.prepare check` turns them into cuts.
"""

import argparse
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from lhotse import Recording, RecordingSet, SupervisionSegment, SupervisionSet
from lhotse.recipes.librispeech import LIBRISPEECH, MINI_LIBRISPEECH, parse_utterance
from tqdm import tqdm

from ssm_asr.cli.program import run
from ssm_asr.data.errors import AudioError
from ssm_asr.data.features import load_samples
from ssm_asr.data.report import Report

PARTS = sorted((*LIBRISPEECH, *MINI_LIBRISPEECH))


class Transcript(NamedTuple):
    """A transcript is one line of a transcript file: "ID TEXT"."""

    part: Path
    audio: Path
    line: str


def find_parts(corpus: Path) -> dict[str, list[Path]]:
    """Returns the corpus' part directories by the name of the set that they belong to.

    Args:
        corpus: LibriSpeech/ or the directory that holds it.

    Raises:
        SystemExit: if there is none; the message says what is expected.
    """
    for root in (corpus, corpus / "LibriSpeech"):
        found = [root / part for part in PARTS if (root / part).is_dir()]
        if found:
            sets: dict[str, list[Path]] = {}
            for part in found:
                kind = part.name.split("-")[0]
                sets.setdefault(part.name if kind == "test" else kind, []).append(part)
            return sets
    sys.exit(
        f"{corpus}: no LibriSpeech here; expected at least one of the directories {', '.join(PARTS)}, "
        "each with SPEAKER/CHAPTER/SPEAKER-CHAPTER-NUMBER.flac and SPEAKER-CHAPTER.trans.txt"
    )


def read_transcripts(part: Path, report: Report) -> Iterator[Transcript]:
    """Yields the transcript lines of a part that have text and audio, and reports the others."""
    seen: set[str] = set()
    for file in sorted(part.rglob("*.trans.txt")):
        for line in file.read_text(encoding="utf-8").splitlines():
            if not line.strip():
                continue
            utterance, *words = line.split()
            if utterance in seen:
                report.leave_out(utterance, "two utterances with one id", f"{file}: the first one is kept")
                continue
            seen.add(utterance)
            audio = part / Path(*utterance.split("-")[:-1]) / f"{utterance}.flac"
            if not words:
                report.leave_out(utterance, "empty transcript", str(file))
            elif not audio.is_file():
                report.leave_out(utterance, "transcript with no audio", f"{file}: no {audio}")
            else:
                yield Transcript(part, audio, line)
    for audio in sorted(part.rglob("*.flac")):
        if audio.stem not in seen:
            report.leave_out(str(audio), "audio with no transcript")


def parse(transcript: Transcript) -> tuple[Recording, SupervisionSegment] | AudioError:
    """Returns lhotse's manifests of one utterance, or what is wrong with its audio."""
    try:
        return parse_utterance(transcript.part, transcript.line, {})
    except Exception as error:  # lhotse raises many kinds, which depend on its backend
        try:
            load_samples(transcript.audio)
        except AudioError as fault:
            return fault
        return AudioError(transcript.audio, "audio cannot be read", str(error))


def write_set(name: str, parts: list[Path], out: Path, num_jobs: int) -> None:
    """Writes the manifests of one set and prints what is left out.

    Raises:
        SystemExit: if nothing usable is left.
    """
    report = Report()
    transcripts = [transcript for part in parts for transcript in read_transcripts(part, report)]
    recordings, supervisions = [], []
    with ThreadPoolExecutor(num_jobs) as pool:
        results = tqdm(pool.map(parse, transcripts), name, len(transcripts), unit="file", mininterval=1.0)
        for transcript, result in zip(transcripts, results, strict=True):
            if isinstance(result, AudioError):
                report.leave_out(str(transcript.audio), result.reason, result.detail)
            else:
                recordings.append(result[0])
                supervisions.append(result[1])
    report.num_kept = len(recordings)
    left_out = out / f"{name}.left_out.tsv"
    report.write(left_out)
    where = f"; all in {left_out}" if report.left_out else ""
    print(f"{name} ({', '.join(part.name for part in parts)}): {report.summary()}{where}")
    if not recordings:
        sys.exit(f"{', '.join(map(str, parts))}: no usable utterance, expected *.flac and *.trans.txt")
    RecordingSet.from_recordings(recordings).to_file(out / f"{name}_recordings.jsonl.gz")
    SupervisionSet.from_segments(supervisions).to_file(out / f"{name}_supervisions.jsonl.gz")


def main() -> None:
    """Runs the program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True, help="LibriSpeech/, or the directory it is in")
    parser.add_argument("--out", type=Path, required=True, help="directory for the manifests")
    parser.add_argument("--jobs", type=int, default=4, help="threads (default: 4)")
    args = parser.parse_args()
    sets = find_parts(args.corpus.resolve())
    args.out.mkdir(parents=True, exist_ok=True)
    for name, parts in sets.items():
        write_set(name, parts, args.out, args.jobs)


if __name__ == "__main__":
    sys.exit(run(main))
