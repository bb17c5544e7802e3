"""Write lhotse manifests and transcripts of CSJ, or of a made corpus in its layout.

The program writes NAME_recordings.jsonl.gz and NAME_supervisions.jsonl.gz for NAME = train, dev, test-eval1, test-eval2
and test-eval3, and NAME.left_out.tsv with what cannot be used. `python -m ssm_asr.prepare check` turns them into cuts.
The corpus is only read: lhotse works on a copy, in --transcripts, of the sound lines of the transcripts.

Segments of a talk are joined up to 10 s if less than 1 s is between them. Segments with a name that was made
unrecognisable (×) are left out.
"""

import argparse
import io
import shutil
import sys
from collections import defaultdict
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple

import soundfile
import talks
from lhotse import Recording, RecordingSet, SupervisionSegment, SupervisionSet
from lhotse.recipes.csj import concat_csj_supervisions, prepare_manifests
from sdb import Line, read_sdb
from transcripts import MODES, transcribe

from ssm_asr.cli.program import run
from ssm_asr.data.errors import AudioError
from ssm_asr.data.features import load_samples
from ssm_asr.data.parallel import parallel_map
from ssm_asr.data.report import Report

JOIN_UP_TO_S, JOIN_GAP_S = 10.0, 1.0
MAX_LINES_SHOWN = 20
NO_SPEECH = "no speech in this talk"


class Talk(NamedTuple):
    """A talk is one unit of work.

    Attributes:
        sdb: its transcript.
        transcripts: the directory of lhotse's transcripts, in which the talk gets a directory.
        mode: the mode of its texts.
    """

    sdb: Path
    transcripts: Path
    mode: str

    @property
    def wavs(self) -> dict[str, Path]:
        """Holds the talk's recordings by channel: L, R, or "" for both."""
        folder = self.sdb.parents[3] / "WAV" / self.sdb.parent.name
        suffixes = talks.channels_of(self.sdb.stem)
        return {suffix.removeprefix("-"): folder / f"{self.sdb.stem}{suffix}.wav" for suffix in suffixes}


class Content(NamedTuple):
    """Holds what is in a talk."""

    recordings: list[Recording]
    supervisions: list[SupervisionSegment]
    report: Report


def find_corpus(corpus: Path) -> Path:
    """Returns the directory with MORPH and WAV: the given one, or CSJ in it.

    Raises:
        SystemExit: if there is none; the message says what is expected.
    """
    for root in (corpus, corpus / "CSJ"):
        if any(root.glob("MORPH/SDB/*/*.sdb")) and any(root.glob("WAV/*/*.wav")):
            return root
    sys.exit(
        f"{corpus}: no CSJ here; expected MORPH/SDB/core/TALK.sdb, MORPH/SDB/noncore/TALK.sdb and the audio in "
        "WAV/core/TALK.wav, WAV/noncore/TALK.wav, as in the corpus' USB edition"
    )


def find_talks(root: Path, args: argparse.Namespace, reports: dict[str, Report]) -> dict[str, list[Talk]]:
    """Returns the talks of each set, and reports missing talks and audio without a transcript."""
    sets: dict[str, list[Talk]] = defaultdict(list)
    sdbs = {sdb.stem: sdb for sdb in sorted(root.glob("MORPH/SDB/*/*.sdb"))}
    for talk, sdb in sdbs.items():
        sets[talks.set_of(talk)].append(Talk(sdb, args.transcripts, args.transcript_mode))
    for name, ids in talks.SETS.items():
        for talk in ids:
            if talk not in sdbs:
                reports[name].leave_out(talk, "talk is missing", f"no MORPH/SDB/*/{talk}.sdb in {root}")
    for wav in sorted(root.glob("WAV/*/*.wav")):
        talk = wav.stem.removesuffix("-L").removesuffix("-R")
        if talk not in sdbs:
            reports[talks.set_of(talk)].leave_out(str(wav), "audio with no transcript")
    return sets


def read_talk(talk: Talk) -> Content:
    """Returns the recordings of a talk, its utterances, and a report of its faults, none of which raises an error."""
    report = Report()
    durations_s = {}
    for channel, wav in talk.wavs.items():
        try:
            durations_s[channel] = _duration_s(wav)
        except AudioError as fault:
            what = "transcript with no audio" if not wav.exists() else fault.reason
            report.leave_out(str(wav), what, f"{talk.sdb}: {fault.detail}" if fault.detail else str(talk.sdb))
    if not durations_s:
        return Content([], [], report)
    lines = read_sdb(talk.sdb, max(durations_s.values()), report)
    folder = talk.transcripts / "SDB" / talk.sdb.stem
    shutil.rmtree(folder, ignore_errors=True)
    for channel in durations_s:
        _copy([line for line in lines if line.segment and channel in ("", line.segment.channel)], talk, channel, folder)
    try:
        recordings, supervisions = _by_lhotse(folder)
    except Exception as error:  # lhotse raises many kinds
        report.leave_out(str(talk.sdb), "lhotse cannot read this talk", f"{type(error).__name__}: {error}")
        return Content([], [], report)
    said = {segment.recording_id for segment in supervisions}
    for channel in durations_s:
        if talk.wavs[channel].stem not in said:
            report.leave_out(str(talk.wavs[channel]), NO_SPEECH, f"no segment of {talk.sdb} has words")
    for segment in supervisions:
        if "×" in segment.custom["raw"]:
            report.leave_out(segment.id, "made unrecognisable (×)", str(talk.sdb))
    joined = concat_csj_supervisions(supervisions, gap=JOIN_GAP_S, maxlen=JOIN_UP_TO_S)
    report.num_kept = len(joined)
    return Content(list(recordings), [_with_text(segment, talk.mode) for segment in joined], report)


def _duration_s(wav: Path) -> float:
    """Returns the duration in s that a wav's header says.

    Raises:
        AudioError: if the file cannot be read.
    """
    try:
        return soundfile.info(wav).duration
    except soundfile.LibsndfileError:
        load_samples(wav)  # says what is wrong
        raise


def _copy(lines: list[Line], talk: Talk, channel: str, folder: Path) -> None:
    """Writes what lhotse reads: the lines of a channel, and where its audio is."""
    if not lines:
        return
    wav = talk.wavs[channel]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{wav.stem}.sdb").write_bytes("".join(f"{line.text}\n" for line in lines).encode("shift_jis"))
    (folder / f"{wav.stem}-wav.list").write_text(wav.as_posix(), encoding="utf-8")


def _by_lhotse(folder: Path) -> tuple[RecordingSet, SupervisionSet]:
    """Returns lhotse's manifests of one talk, given to it as a part of the corpus; they may be empty."""
    if not folder.is_dir():
        return RecordingSet(), SupervisionSet()
    try:
        with redirect_stderr(io.StringIO()), redirect_stdout(io.StringIO()):  # lhotse shows progress bars
            manifests = prepare_manifests(folder.parent, dataset_parts=folder.name)[folder.name]
    except AssertionError as error:
        if "No recordings left" in str(error):
            return RecordingSet(), SupervisionSet()
        raise
    return manifests["recordings"], manifests["supervisions"]


def _with_text(segment: SupervisionSegment, mode: str) -> SupervisionSegment:
    """Sets the text of a segment; its `custom` gets the texts of all modes, and "marked" if there are disfluencies."""
    texts = transcribe(segment.custom["raw"])
    segment.text = texts[mode]
    segment.custom = {name: texts[name] for name in MODES}
    if f"{mode}_marked" in texts:
        segment.custom["marked"] = texts[f"{mode}_marked"]
    return segment


def write_sets(sets: dict[str, list[Talk]], out: Path, jobs: int, reports: dict[str, Report]) -> None:
    """Writes the manifests of all sets, talk by talk, and prints what is left out.

    Raises:
        SystemExit: if nothing usable is left to train on or to validate on.
    """
    names = [name for name in ("train", *talks.SETS) if name != "excluded"]
    all_talks = [talk for name in names for talk in sets[name]]
    with ExitStack() as stack:
        recordings, supervisions = (
            {
                name: stack.enter_context(kind.open_writer(out / f"{name}_{suffix}.jsonl.gz", overwrite=True))
                for name in names
            }
            for kind, suffix in ((RecordingSet, "recordings"), (SupervisionSet, "supervisions"))
        )
        contents = parallel_map(read_talk, all_talks, jobs, "reading talks", "talk")
        for talk, content in zip(all_talks, contents, strict=True):
            name = talks.set_of(talk.sdb.stem)
            for recording in content.recordings:
                recordings[name].write(recording)
            for segment in content.supervisions:
                supervisions[name].write(segment)
            reports[name].num_kept += content.report.num_kept
            reports[name].left_out += content.report.left_out
    for name in names:
        report = reports[name]
        left_out = out / f"{name}.left_out.tsv"
        report.write(left_out)
        for line, _ in zip(report.lines(), range(MAX_LINES_SHOWN), strict=False):
            print(f"  {line}")
        where = f"; all in {left_out}" if report.left_out else ""
        print(f"{name} ({len(sets[name])} talks): utterances {report.summary()}{where}")
        if not report.num_kept:
            for suffix in ("recordings", "supervisions"):
                (out / f"{name}_{suffix}.jsonl.gz").unlink()
            if name in ("train", "dev"):
                sys.exit(f"no usable utterance for {name}: see {left_out}")
    print(f"excluded ({len(sets['excluded'])} talks): a speaker of eval2 speaks in them")


def main() -> None:
    """Runs the program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True, help="the directory with MORPH/ and WAV/, or CSJ/ in it")
    parser.add_argument("--out", type=Path, required=True, help="directory for the manifests")
    parser.add_argument("--transcripts", type=Path, required=True, help="directory for lhotse's copy of transcripts")
    parser.add_argument("--transcript-mode", choices=MODES, default=MODES[0], help=f"(default: {MODES[0]})")
    parser.add_argument("--jobs", type=int, default=2, help="processes (default: 2)")
    args = parser.parse_args()
    root = find_corpus(args.corpus.resolve())
    args.transcripts = args.transcripts.resolve()
    if args.transcripts.is_relative_to(root):
        sys.exit(f"--transcripts {args.transcripts}: is within the corpus {root}, which is only read; choose another")
    args.out.mkdir(parents=True, exist_ok=True)
    reports: dict[str, Report] = defaultdict(Report)
    write_sets(find_talks(root, args, reports), args.out, args.jobs, reports)


if __name__ == "__main__":
    sys.exit(run(main))
