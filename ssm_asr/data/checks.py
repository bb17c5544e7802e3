"""Checks a corpus: every recording is read in full, every transcript is checked, every fault is reported."""

import shlex
from collections import Counter
from collections.abc import Iterable
from typing import TypeVar

from lhotse import CutSet, MonoCut, Recording, SupervisionSegment
from lhotse.utils import fastcopy

from ssm_asr.data.errors import AudioError, first_line
from ssm_asr.data.features import load_samples, not_mono
from ssm_asr.data.parallel import parallel_map
from ssm_asr.data.report import Report
from ssm_asr.data.samples import check_samples
from ssm_asr.units import FRAME_SHIFT_MS, SAMPLE_RATE_HZ

TIME_TOLERANCE_S = FRAME_SHIFT_MS / 1000  # transcripts give their times rounded
# Manifests give lengths rounded, such as those from Kaldi. lhotse pads up to half a second, in which words are lost.
LENGTH_TOLERANCE_S = 0.025

Item = TypeVar("Item", Recording, SupervisionSegment)


def check_corpus(
    recordings: Iterable[Recording],
    supervisions: Iterable[SupervisionSegment],
    *,
    num_jobs: int = 1,
    title: str = "checking audio",
) -> tuple[CutSet, Report]:
    """Leaves out the recordings and transcripts of a corpus that cannot be used.

    Args:
        recordings: recordings whose audio is in files.
        supervisions: transcripts; a recording may have several.
        num_jobs: number of processes that read audio.
        title: what the progress bar says.

    Returns:
        A cut for each usable supervision, with its id, in the order of the supervisions; and a report of the
        rest, which names recordings by file and transcripts by id.
    """
    report = Report()
    recording_of = _unique(recordings, "two recordings with one id", report)
    segment_of = _unique(supervisions, "two utterances with one id", report)
    num_transcripts = Counter(segment.recording_id for segment in segment_of.values())
    bad = set()
    faults = parallel_map(_audio_fault, list(recording_of.values()), num_jobs, title, "file")
    for recording, fault in zip(recording_of.values(), faults, strict=True):
        path = _name_of(recording)
        if fault:
            bad.add(recording.id)
            lost = num_transcripts[recording.id]
            report.leave_out(path, fault[0], f"{fault[1]} [{lost} transcript{'s' * (lost != 1)} lost with it]")
        elif recording.id not in num_transcripts:
            report.leave_out(path, "audio with no transcript")
    cuts = []
    for segment in segment_of.values():
        if segment.recording_id in bad:
            continue  # the report has its recording
        recording = recording_of.get(segment.recording_id)
        reason, detail = _segment_fault(segment, recording)
        if reason:
            report.leave_out(segment.id, reason, detail)
        else:
            cuts.append(_to_cut(segment, recording))
    report.num_kept = len(cuts)
    return CutSet.from_cuts(cuts), report


def _unique(items: Iterable[Item], reason: str, report: Report) -> dict[str, Item]:
    """Returns the items by id; the first of each id stays and the others are reported."""
    by_id: dict[str, Item] = {}
    for item in items:
        if item.id in by_id:
            report.leave_out(item.id, reason, "the first one is kept")
        else:
            by_id[item.id] = item
    return by_id


def _name_of(recording: Recording) -> str:
    """Returns what a report calls a recording: its first file, or its id."""
    source = recording.sources[0]
    return str(source.source) if source.type == "file" else str(recording.id)


def _audio_fault(recording: Recording) -> tuple[str, str] | None:
    """Returns what is wrong with the audio of a recording, as (reason, detail); None if nothing is."""
    try:
        files = [source for source in recording.sources if source.type == "file"]
        for source in files:  # each is read in full, at its own rate
            samples_SC, rate_hz = load_samples(source.source)
            if samples_SC.shape[1] != 1:
                raise not_mono(source.source, samples_SC.shape[1])
            fault = _length_fault(recording, len(samples_SC), rate_hz)
            if fault or not samples_SC.any():
                return fault or ("all samples are zero", f"{recording.duration:.2f} s")
        if len(files) < len(recording.sources) or not _only_resampled(recording):
            samples_CS = recording.load_audio()  # as the manifest says, of which lhotse checks the length
            check_samples(samples_CS.ravel())
            return _length_fault(recording, samples_CS.shape[1], recording.sampling_rate, made=True)
    except AudioError as error:
        return error.reason, error.detail
    except Exception as error:  # lhotse raises many kinds
        return "audio cannot be read", first_line(error)
    return None


def _only_resampled(recording: Recording) -> bool:
    """Returns whether lhotse changes nothing of the audio when it loads it, but the rate."""
    return all(
        (transform["name"] if isinstance(transform, dict) else type(transform).__name__) == "Resample"
        for transform in recording.transforms or ()
    )


def _length_fault(recording: Recording, num_samples: int, rate_hz: int, made: bool = False) -> tuple[str, str] | None:
    """Returns what is wrong with the rate of a recording, or with its length, if it is off by more than rounding.

    Args:
        num_samples, rate_hz: of the samples.
        made: whether they are what lhotse makes of a file, not the file's own.
    """
    if recording.transforms and not made:
        if not _only_resampled(recording):
            return None
        num_samples, rate_hz = round(num_samples * recording.sampling_rate / rate_hz), recording.sampling_rate
    if rate_hz != SAMPLE_RATE_HZ:
        sox = f"sox {shlex.quote(str(recording.sources[0].source))} -r {SAMPLE_RATE_HZ} OUT.wav"
        remedy = f"use recording.resample({SAMPLE_RATE_HZ}) for the manifest, or {sox}"
        return "wrong sample rate", f"{rate_hz} Hz, need {SAMPLE_RATE_HZ}; {remedy}"
    if abs(num_samples - recording.num_samples) > LENGTH_TOLERANCE_S * rate_hz:
        return "length differs from manifest", f"{num_samples} samples, not {recording.num_samples}"
    return None


def _segment_fault(segment: SupervisionSegment, recording: Recording | None) -> tuple[str, str]:
    """Returns what is wrong with a transcript, as (reason, detail); ("", "") if nothing is."""
    if recording is None:
        return "transcript with no audio", f"no recording {segment.recording_id}"
    if not (segment.text or "").strip():
        return "empty transcript", ""
    end_s = recording.duration + TIME_TOLERANCE_S
    if segment.start < 0 or segment.duration <= 0 or segment.start >= end_s or segment.end > end_s:
        times = f"{segment.start:.3f} - {segment.end:.3f} s of {recording.duration:.3f} s"
        return "transcript times outside the audio", times
    if _channel(segment, recording) is None:
        return "transcript not of one channel", f"channel {segment.channel} of {recording.channel_ids}"
    return "", ""


def _channel(segment: SupervisionSegment, recording: Recording) -> int | None:
    """Returns the channel that a transcript is of; the only one of a recording, or None if it cannot be told."""
    if recording.num_channels == 1:
        return int(recording.channel_ids[0])
    channels = segment.channel if isinstance(segment.channel, list) else [segment.channel]
    return channels[0] if len(channels) == 1 and channels[0] in recording.channel_ids else None


def _to_cut(segment: SupervisionSegment, recording: Recording) -> MonoCut:
    """Returns the part of a recording that a supervision transcribes."""
    duration = min(segment.duration, recording.duration - segment.start)
    return MonoCut(
        id=segment.id,
        start=segment.start,
        duration=duration,
        channel=_channel(segment, recording),
        recording=recording,
        supervisions=[fastcopy(segment, start=0.0, duration=duration)],
    )
