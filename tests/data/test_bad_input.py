"""Every kind of bad input is reported with its file and reason, counted, and left out; nothing crashes."""

import gzip
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from lhotse import CutSet, Recording, SupervisionSegment
from script import run
from tones import tone

from ssm_asr.cli import prepare
from ssm_asr.data.checks import check_corpus

MANIFESTS = Path(__file__).parent.parent.parent / "egs" / "librispeech" / "local" / "manifests.py"


def segment(name: str, recording: str = "", text: str = "ONE", start: float = 0.0) -> SupervisionSegment:
    return SupervisionSegment(name, recording or name, start, 1.0, text=text)


def bad_wavs(directory: Path) -> dict[str, str]:
    """Writes unusable wav files beside a good one, and returns the expected reason for each."""
    good, rate = tone(1.0), 16000
    soundfile.write(directory / "good.wav", good, rate)
    whole = (directory / "good.wav").read_bytes()
    soundfile.write(directory / "nan.wav", np.where(good > 0.2, np.nan, good), rate, subtype="FLOAT")
    soundfile.write(directory / "zeros.wav", 0 * good, rate)
    soundfile.write(directory / "rate.wav", good, 8000)
    soundfile.write(directory / "stereo.wav", np.stack([good, good], 1), rate)
    for name, data in (("empty", b""), ("truncated", whole[:9000]), ("text", b"no audio at all")):
        (directory / f"{name}.wav").write_bytes(data)
    return {
        "empty": "empty audio",
        "truncated": "truncated audio",
        "text": "truncated or no audio",
        "gone": "no such file",
        "nan": "NaN or infinite samples",
        "zeros": "all samples are zero",
        "rate": "wrong sample rate",
        "stereo": "not mono",
    }


@pytest.mark.parametrize("num_jobs", [1, 2])
def test_bad_audio_and_transcripts_in_manifests(tmp_path: Path, num_jobs: int) -> None:
    reasons = bad_wavs(tmp_path)
    good = Recording.from_file(tmp_path / "good.wav", recording_id="good")
    recordings = [good, good]
    for name in (*reasons, "alone"):
        path = str(tmp_path / f"{name}.wav")
        recordings.append(Recording.from_dict({**good.to_dict(), "id": name}))
        recordings[-1].sources[0].source = path
    soundfile.write(tmp_path / "alone.wav", tone(1.0), 16000)
    supervisions = [segment("good"), segment("good", text="TWO"), *(segment(name) for name in reasons)]
    supervisions += [segment("nothing", "nowhere"), segment("blank", "good", text=" ")]
    supervisions += [segment("late", "good", start=0.5), segment("early", "good", start=-0.5)]

    cuts, report = check_corpus(recordings, supervisions, num_jobs=num_jobs)

    (cut,) = cuts
    assert (cut.id, cut.supervisions[0].text, cut.duration) == ("good", "ONE", 1.0)
    assert report.num_kept == 1
    left_out = {(entry.item, entry.reason) for entry in report.left_out}
    assert left_out == {
        *((str(tmp_path / f"{name}.wav"), reason) for name, reason in reasons.items()),
        (str(tmp_path / "alone.wav"), "audio with no transcript"),
        ("good", "two recordings with one id"),
        ("good", "two utterances with one id"),
        ("nothing", "transcript with no audio"),
        ("blank", "empty transcript"),
        ("late", "transcript times outside the audio"),
        ("early", "transcript times outside the audio"),
    }
    assert len(report.left_out) == len(left_out)
    assert report.summary().startswith(f"kept 1, left out {len(left_out)}: 2 transcript times outside")
    details = {entry.reason: entry.detail for entry in report.left_out}
    assert "8000 Hz, need 16000; use recording.resample(16000) for the manifest, or sox" in details["wrong sample rate"]
    assert "2 channels; take the first with: sox" in details["not mono"]
    assert "[1 transcript lost with it]" in details["no such file"]


def test_audio_that_lhotse_resamples(tmp_path: Path) -> None:
    """Its file is read at its own rate, so that it is checked in full, and its cuts load audio at 16 kHz."""
    recordings = []
    for name, rate_hz in (("cd", 44100), ("film", 48000), ("phone", 8000), ("short", 44100)):
        soundfile.write(tmp_path / f"{name}.wav", np.resize(tone(1.0), int(1.001 * rate_hz)), rate_hz)
        recordings.append(Recording.from_file(tmp_path / f"{name}.wav").resample(16000))
    whole = (tmp_path / "short.wav").read_bytes()
    (tmp_path / "short.wav").write_bytes(whole[:-9000])
    soundfile.write(tmp_path / "odd.wav", tone(1.0), 48000)
    recordings.append(Recording.from_file(tmp_path / "odd.wav").resample(22050))
    cuts, report = check_corpus(recordings, [segment(recording.id) for recording in recordings])
    assert [(cut.id, cut.load_audio().shape[1]) for cut in cuts] == [("cd", 16000), ("film", 16000), ("phone", 16000)]
    assert [entry.reason for entry in report.left_out] == ["truncated audio", "wrong sample rate"]
    soundfile.write(tmp_path / "film.wav", np.resize(tone(1.0), 30000), 48000)
    _, report = check_corpus(recordings[:3], [])
    assert "length differs from manifest\t10000 samples, not 16016" in list(report.lines())[1]


def test_several_transcripts_of_one_recording(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "talk.wav", tone(3.0), 16000)
    talk = Recording.from_file(tmp_path / "talk.wav")
    cuts, report = check_corpus([talk], [segment("a", "talk"), segment("b", "talk", start=2.005)])
    assert [(cut.id, cut.start, round(cut.duration, 3)) for cut in cuts] == [
        ("a", 0.0, 1.0),
        ("b", 2.005, 0.995),
    ]
    assert not report.left_out and report.summary() == "kept 2, left out 0"
    assert [len(cut.load_audio()[0]) for cut in cuts] == [16000, 15920]


def broken_librispeech(root: Path) -> None:
    """Writes a chapter with five good utterances and one with each fault."""
    chapter = root / "LibriSpeech" / "train-clean-5" / "7" / "1"
    chapter.mkdir(parents=True)
    for k in range(10):
        soundfile.write(chapter / f"7-1-{k:04d}.flac", tone(1.0, k), 16000)
    whole = (chapter / "7-1-0005.flac").read_bytes()
    (chapter / "7-1-0005.flac").write_bytes(whole[:8000])
    (chapter / "7-1-0006.flac").write_bytes(b"")
    soundfile.write(chapter / "7-1-0007.flac", 0 * tone(1.0), 16000)
    lines = [f"7-1-{k:04d} ONE TWO" for k in range(8)]
    lines += ["7-1-0008", "7-1-0000 THREE", "7-1-0099 FOUR", ""]
    (chapter / "7-1.trans.txt").write_text("\n".join(lines))


def test_broken_librispeech_goes_through(tmp_path: Path) -> None:
    broken_librispeech(tmp_path)
    done = run(MANIFESTS, "--corpus", tmp_path, "--out", tmp_path / "manifests")
    assert done.returncode == 0, done.stderr
    assert "train (train-clean-5): kept 7, left out 5: " in done.stdout
    left_out = (tmp_path / "manifests" / "train.left_out.tsv").read_text()
    for reason in ("empty audio", "empty transcript", "two utterances with one id"):
        assert left_out.count(f"\t{reason}") == 1
    assert "7-1-0099\ttranscript with no audio" in left_out
    assert "7-1-0009.flac\taudio with no transcript" in left_out

    check = ("ssm_asr.prepare", "check", "--manifests", tmp_path / "manifests", "--jobs", 1)
    done = run(*check, "--out", tmp_path / "checked")
    assert done.returncode == 0, done.stderr
    assert "train: kept 5, left out 2: " in done.stdout
    assert "7-1-0005.flac\ttruncated" in done.stdout and "7-1-0007.flac\tall samples are zero" in done.stdout
    cuts = CutSet.from_file(tmp_path / "checked" / "cuts_train.jsonl.gz")
    assert [cut.id for cut in cuts] == [f"7-1-{k:04d}" for k in range(5)]


def test_directory_without_the_expected_parts_is_refused(tmp_path: Path) -> None:
    (tmp_path / "LibriSpeech" / "train-clean-999").mkdir(parents=True)
    done = run(MANIFESTS, "--corpus", tmp_path, "--out", tmp_path / "out")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert f"{tmp_path}: no LibriSpeech here; expected" in done.stderr
    assert "train-clean-5" in done.stderr and "trans.txt" in done.stderr
    assert not (tmp_path / "out").exists()

    (tmp_path / "LibriSpeech" / "test-clean").mkdir()
    done = run(MANIFESTS, "--corpus", tmp_path, "--out", tmp_path / "out")
    assert done.returncode == 1 and "no usable utterance" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["check", "--manifests", "{}", "--out", "{}/out"], "no manifests here, expected NAME_recordings"),
        (["check", "--manifests", "{}/gone", "--out", "{}/out"], "gone: no such file or directory"),
        (["features", "--cuts", "{}/none.jsonl.gz", "--out", "{}/out"], "no cuts in this manifest"),
        (["features", "--cuts", "{}/none.jsonl.gz", "--out", "{}"], "would be overwritten"),
        (["features", "--cuts", "{}/text.jsonl.gz", "--out", "{}/out"], "text.jsonl.gz: no cut manifest"),
        (["features", "--cuts", "{}/recordings.jsonl.gz", "--out", "{}/out"], "a manifest of Recordings, not of cuts"),
        (["features", "--cuts", "{}/bad.jsonl.gz", "--out", "{}/out"], "x: audio cannot be read"),
        (
            ["features", "--cuts", "{}/half.jsonl.gz", "--out", "{}/out"],
            "half.jsonl.gz: damaged (Compressed file ended",
        ),
        (
            ["tokens", "--cuts", "{}/bad.jsonl.gz", "--out", "{}/out", "--vocab-size", "500"],
            "largest possible",
        ),
        (
            ["features", "--cuts", "{}/bad.jsonl.gz", "--out", "{}/out", "--backend", "kaldifeat"],
            "features backend kaldifeat: cannot be imported (",
        ),
        (
            ["features", "--cuts", "{}/bad.jsonl.gz", "--out", "{}/out", "--backend", "kaldifeat", "--on-the-fly"],
            "--on-the-fly: training computes features by torch, not by kaldifeat; give one of the two",
        ),
        (["noise", "--musan", "{}", "--out", "{}/out"], "no MUSAN here, expected music/, speech/ and noise/"),
    ],
)
def test_one_line_for_each_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    (tmp_path / "none.jsonl.gz").write_bytes(gzip.compress(b""))
    (tmp_path / "text.jsonl.gz").write_text("ONE TWO")
    source = {"type": "file", "channels": [0], "source": str(tmp_path / "gone.wav")}
    recording = {
        "id": "x",
        "sources": [source],
        "sampling_rate": 16000,
        "num_samples": 16000,
        "duration": 1.0,
    }
    supervision = {"id": "x", "recording_id": "x", "start": 0.0, "duration": 1.0, "channel": 0, "text": "ONE"}
    cut = {"id": "x", "start": 0.0, "duration": 1.0, "channel": 0, "type": "MonoCut"}
    cut |= {"supervisions": [supervision], "recording": {**recording, "channel_ids": [0]}}
    (tmp_path / "recordings.jsonl.gz").write_bytes(gzip.compress(json.dumps(cut["recording"]).encode() + b"\n"))
    (tmp_path / "bad.jsonl.gz").write_bytes(gzip.compress(json.dumps(cut).encode() + b"\n"))
    lines = b"".join(json.dumps(cut | {"id": str(n)}).encode() + b"\n" for n in range(5000))
    (tmp_path / "half.jsonl.gz").write_bytes(gzip.compress(lines)[:-100])
    monkeypatch.setattr("sys.argv", ["prepare", *(argument.format(tmp_path) for argument in arguments)])
    monkeypatch.setitem(sys.modules, "kaldifeat", None)  # so that no import finds it
    with pytest.raises(SystemExit) as caught:
        prepare.main()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
