"""Every kind of bad input is reported with its file and reason, counted, and left out; nothing crashes."""

import gzip
import json
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import soundfile
from lhotse import CutSet, MonoCut, MultiCut, Recording, SupervisionSegment
from lhotse.audio import AudioSource
from lhotse.utils import fastcopy
from script import run
from tones import tone

from ssm_asr.cli import prepare
from ssm_asr.data.checks import check_corpus
from ssm_asr.data.errors import AudioError, CutError
from ssm_asr.data.features import cut_samples, cut_source, read_audio
from ssm_asr.data.loading import load_features

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


def two_sides(directory: Path) -> Recording:
    """Returns a telephone call: one recording of two files, a channel each."""
    for name, seed in (("A", 1), ("B", 2)):
        soundfile.write(directory / f"call-{name}.wav", tone(1.0, seed=seed), 16000)
    sources = [AudioSource("file", [i], str(directory / f"call-{name}.wav")) for i, name in enumerate("AB")]
    return Recording("call", sources, 16000, 16000, 1.0)


def test_each_side_of_a_call_has_its_own_audio(tmp_path: Path) -> None:
    call = two_sides(tmp_path)
    sides = [SupervisionSegment(f"call-{i}", "call", 0.0, 1.0, channel=i, text="ONE") for i in (0, 1)]
    both = SupervisionSegment("both", "call", 0.0, 1.0, channel=[0, 1], text="ONE")
    cuts, report = check_corpus(
        [call], [*sides, both, SupervisionSegment("none", "call", 0.0, 1.0, channel=2, text="A")]
    )
    assert [(cut.id, cut.channel) for cut in cuts] == [("call-0", 0), ("call-1", 1)]
    for cut, name in zip(cuts, "AB", strict=True):
        expected_S, _ = soundfile.read(tmp_path / f"call-{name}.wav", dtype="float32")
        assert np.array_equal(cut_samples(cut), expected_S)
    assert [(entry.item, entry.reason) for entry in report.left_out] == [
        ("both", "transcript not of one channel"),
        ("none", "transcript not of one channel"),
    ]


def test_a_cut_of_several_channels_is_refused(tmp_path: Path) -> None:
    call = two_sides(tmp_path)
    with pytest.raises(CutError, match="cut both: 2 channels, where one is needed"):
        cut_samples(MultiCut("both", 0.0, 1.0, [0, 1], supervisions=[], recording=call))


@pytest.mark.parametrize("change", [-300, -2, 2, 300])
def test_lengths_off_by_a_few_samples(tmp_path: Path, change: int) -> None:
    """As those of manifests that come from Kaldi."""
    soundfile.write(tmp_path / "a.wav", tone(1.0), 16000)
    near = Recording(
        "a", [AudioSource("file", [0], str(tmp_path / "a.wav"))], 16000, 16000 + change, 1 + change / 16000
    )
    cuts, report = check_corpus([near], [SupervisionSegment("a", "a", 0.0, near.duration, text="ONE")])
    assert len(cuts) == 1 and not report.left_out
    assert len(cut_samples(cuts[0])) == pytest.approx(16000 + change, abs=1)


def test_audio_that_lhotse_changes(tmp_path: Path) -> None:
    """It is read as the manifest says: with another speed or volume, and from memory."""
    soundfile.write(tmp_path / "a.wav", tone(1.0), 16000)
    plain = Recording.from_file(tmp_path / "a.wav")
    recordings = [plain.perturb_speed(1.1), plain.perturb_volume(0.5), plain.move_to_memory(format="wav")]
    recordings = [fastcopy(recording, id=str(i)) for i, recording in enumerate(recordings)]
    segments = [SupervisionSegment(r.id, r.id, 0.0, r.duration, text="ONE") for r in recordings]
    cuts, report = check_corpus(recordings, segments)
    assert not report.left_out and [len(cut_samples(cut)) for cut in cuts] == [14545, 16000, 16000]
    loud = fastcopy(plain.perturb_volume(1e6), id="loud")
    _, report = check_corpus([loud], [SupervisionSegment("loud", "loud", 0.0, 1.0, text="ONE")])
    assert report.left_out[0].reason.startswith("samples up to ")


@pytest.mark.parametrize(
    "value, fault", [(np.nan, "NaN or infinite"), (np.inf, "NaN or infinite"), (3e4, "samples up to 30000")]
)
def test_absurd_samples_are_refused_everywhere(tmp_path: Path, value: float, fault: str) -> None:
    samples_S = tone(1.0).astype(np.float32)
    samples_S[5000] = value
    path = tmp_path / "a.wav"
    soundfile.write(path, samples_S, 16000, subtype="FLOAT")
    recording = Recording.from_file(path)
    cut = MonoCut("a", 0.0, 1.0, 0, recording=recording, supervisions=[segment("a")])
    with pytest.raises(AudioError, match=f"^{path}: {fault}"):
        read_audio(path)
    for read in (cut_samples, cut_source, load_features):
        with pytest.raises(CutError, match=f"^cut a: {fault}"):
            read(cut)
    with pytest.raises(CutError, match=f"^cut a_sp1.1: {fault}"):
        cut_source(cut.perturb_speed(1.1))
    _, report = check_corpus([recording], [segment("a")])
    assert report.left_out[0].reason.startswith(fault)


# What sox, arecord, ffmpeg, lhotse's issue 913, and a recorder that was killed leave where the sizes should be.
SIZES = [(0x7FFFF024, 0x7FFFF000), (0x80000024, 0x80000000), (0xFFFFFFFF, 0xFFFFFFFF), (0, 0), (36, 0)]
SIZES += [(0x7FFFFFFF, 0x7FFFFFFF - 36)]


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("subtype", ["PCM_16", "FLOAT"])
def test_files_that_were_written_to_a_pipe_are_read_whole(tmp_path: Path, sizes: tuple[int, int], subtype: str) -> None:
    path = tmp_path / "a.wav"
    soundfile.write(path, tone(1.0), 16000, subtype=subtype)
    expected_S, data = read_audio(path), bytearray(path.read_bytes())
    place = data.index(b"data") + 4
    data[4:8], data[place : place + 4] = (size.to_bytes(4, "little") for size in sizes)
    path.write_bytes(data)
    assert np.array_equal(read_audio(path), expected_S)
    path.write_bytes(data[: place + 4])
    with pytest.raises(AudioError, match="empty audio"):
        read_audio(path)


def test_a_wav_file_that_was_cut_is_refused(tmp_path: Path) -> None:
    """Unless it ends in what follows the samples; a file without samples has no others after them."""
    path = tmp_path / "a.wav"
    soundfile.write(path, tone(1.0), 16000)
    whole = path.read_bytes()
    expected_S = read_audio(path)
    path.write_bytes(whole[:-2])
    with pytest.raises(AudioError, match="truncated audio: the header announces more than the file holds"):
        read_audio(path)
    path.write_bytes(whole + b"LIST\xff\x00\x00\x00INFO")
    assert np.array_equal(read_audio(path), expected_S)
    soundfile.write(path, tone(1.0)[:0], 16000)
    path.write_bytes(path.read_bytes() + b"LIST\x04\x00\x00\x00INFO")
    with pytest.raises(AudioError, match="empty audio"):
        read_audio(path)


@pytest.mark.parametrize(
    "name, options",
    [
        ("a.aiff", {"format": "AIFF"}),
        ("a.au", {"format": "AU"}),
        ("a.w64", {"format": "W64"}),
        ("a.ogg", {"format": "OGG", "subtype": "VORBIS"}),
        ("a.opus", {"format": "OGG", "subtype": "OPUS"}),
        ("a.flac", {"format": "FLAC"}),
        ("a.wav", {"format": "WAV"}),
    ],
)
@pytest.mark.parametrize("share", [0.4, 0.9])
def test_files_of_all_kinds_that_were_cut(tmp_path: Path, name: str, options: dict[str, str], share: float) -> None:
    """A whole file is read, and what is left of it is not."""
    path = tmp_path / name
    soundfile.write(path, np.resize(tone(1.0, seed=3), 64000), 16000, **options)
    assert len(read_audio(path)) == pytest.approx(64000, abs=700)  # codecs add a few
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(AudioError, match=f"^{path}: truncated"):
        read_audio(path)


def test_headers_allocate_nothing(tmp_path: Path) -> None:
    """Neither for rates that no recorder has, nor for a number of samples that the file does not hold."""
    path = tmp_path / "a.wav"
    soundfile.write(path, tone(1.0), 16000)
    plain = path.read_bytes()
    for rate_hz in (1, 999, 2_000_000_000):
        data = bytearray(plain)
        data[24:28] = rate_hz.to_bytes(4, "little")
        path.write_bytes(data)
        with pytest.raises(AudioError, match=f"sample rate of {rate_hz} Hz"):
            read_audio(path)
    path = tmp_path / "a.flac"
    soundfile.write(path, tone(1.0), 16000)
    data = bytearray(path.read_bytes())
    data[21] |= 0x0F  # the highest of the 36 bits for the number of samples, after 8 bytes of heads and 13 more
    path.write_bytes(data)
    tracemalloc.start()
    with pytest.raises(AudioError, match="truncated"):
        read_audio(path)
    assert tracemalloc.get_traced_memory()[1] < 100e6
    tracemalloc.stop()


def test_files_that_are_no_audio_have_a_remedy(tmp_path: Path) -> None:
    (tmp_path / "a film.m4a").write_bytes(b"\x00\x00\x00\x18ftypM4A \x00\x00\x00\x00" + bytes(400))
    with pytest.raises(AudioError, match=r"truncated or no audio: .*ffmpeg -i '.*a film.m4a' OUT.wav makes one"):
        read_audio(tmp_path / "a film.m4a")
    with pytest.raises(AudioError, match="no regular file: a directory"):
        read_audio(tmp_path)
