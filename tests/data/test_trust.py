"""No manifest runs a command or fetches anything unless it is trusted, and no pipe keeps a program waiting."""

import gzip
import json
import os
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
from lhotse import CutSet, MonoCut, MultiCut, Recording, RecordingSet, SupervisionSet
from lhotse.audio import AudioSource
from lhotse.cut import MixedCut, MixTrack
from lhotse.utils import fastcopy

from ssm_asr.cli import prepare
from ssm_asr.data.errors import AudioError, CutError
from ssm_asr.data.features import cut_samples, cut_source, load_samples
from ssm_asr.data.loading import load_features
from ssm_asr.data.shar import write_shard
from ssm_asr.data.store import read_cuts
from ssm_asr.data.trust import TRUST, require_trusted


@pytest.fixture(autouse=True)
def no_trust(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TRUST, raising=False)


@pytest.fixture
def cut(manifest: Path) -> MonoCut:
    first: MonoCut = CutSet.from_file(manifest)[0]
    return first


@pytest.fixture
def ran(tmp_path: Path) -> Path:
    """A file that is there if a command was run."""
    return tmp_path / "ran"


def by_command(cut: MonoCut, ran: Path, kind: str = "command") -> MonoCut:
    """Returns a cut whose audio comes from a command that leaves a trace."""
    path = cut.recording.sources[0].source
    command = f"touch {shlex.quote(str(ran))}; cat {shlex.quote(str(path))}"
    source = AudioSource("command", [0], command) if kind == "command" else AudioSource("file", [0], f"pipe:{command}")
    return fastcopy(cut, recording=fastcopy(cut.recording, sources=[source]))


def stored_by_command(cut: MonoCut, ran: Path, storage: str) -> MonoCut:
    """Returns a cut whose features come from a command."""
    features = {
        "type": "kaldi-fbank", "num_frames": 60, "num_features": 80, "frame_shift": 0.01, "sampling_rate": 16000,
        "start": 0, "duration": cut.duration, "storage_type": storage, "storage_key": "0", "channels": 0,
        "storage_path": f"touch {ran} |" if storage == "kaldiio" else f"pipe:touch {ran}",
    }  # fmt: skip
    made: MonoCut = MonoCut.from_dict({**cut.to_dict(), "features": features})
    return made


def manifest_of(cut: Any, directory: Path) -> Path:
    CutSet.from_cuts([cut]).to_file(directory / "cuts.jsonl.gz")
    return directory / "cuts.jsonl.gz"


def reverberant(cut: MonoCut, ran: Path) -> MonoCut:
    """Returns a cut whose room's impulse response comes from a command."""
    room = by_command(cut, ran).recording.to_dict()
    transforms = [{"name": "ReverbWithImpulseResponse", "kwargs": {"rir": room, "rir_channels": [0]}}]
    return fastcopy(cut, recording=fastcopy(cut.recording, transforms=transforms))


def several_channels(cut: MonoCut, ran: Path) -> MultiCut:
    return MultiCut(cut.id, 0, cut.duration, [0], recording=by_command(cut, ran).recording, supervisions=[])


def mixed(cut: MonoCut, ran: Path) -> MixedCut:
    return MixedCut("mixed", [MixTrack(cut), MixTrack(by_command(cut, ran))])


def with_another_recording(cut: MonoCut, ran: Path) -> MonoCut:
    return fastcopy(cut, custom={"target_recording": by_command(cut, ran).recording})


COMMANDS = [
    by_command,
    lambda cut, ran: by_command(cut, ran, "pipe"),
    lambda cut, ran: stored_by_command(cut, ran, "kaldiio"),
    lambda cut, ran: stored_by_command(cut, ran, "lilcom_files"),
    reverberant,
    several_channels,
    mixed,
    with_another_recording,
]


@pytest.mark.parametrize("make", COMMANDS)
def test_no_manifest_runs_a_command(cut: MonoCut, ran: Path, tmp_path: Path, make: Any) -> None:
    path = manifest_of(make(cut, ran), tmp_path)
    with pytest.raises(ValueError, match=f"^{path}: .*would run the command .*--trust-commands.*{TRUST}=commands"):
        read_cuts(path)
    assert not ran.exists()


@pytest.mark.parametrize(
    "source", [("url", "https://example.org/a.wav"), ("file", "s3://bucket/a.wav"), ("url", "file:///etc/passwd")]
)
def test_no_manifest_fetches_anything(cut: MonoCut, tmp_path: Path, source: tuple[str, str]) -> None:
    kind, place = source
    there = fastcopy(cut, recording=fastcopy(cut.recording, sources=[AudioSource(kind, [0], place)]))
    path = manifest_of(there, tmp_path)
    with pytest.raises(ValueError, match=f"{cut.id}: reading this would fetch '{place}'; give --trust-urls"):
        read_cuts(path)


def test_trusted_commands_are_run(cut: MonoCut, ran: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the option of a program; urls are still refused then."""
    path = manifest_of(by_command(cut, ran), tmp_path)
    arguments = ["features", "--cuts", str(path), "--out", str(tmp_path / "out"), "--jobs", "1"]
    monkeypatch.setattr(sys, "argv", ["prepare", *arguments])
    with pytest.raises(SystemExit, match="--trust-commands"):
        prepare.main()
    assert not ran.exists()
    monkeypatch.setenv(TRUST, "")  # so that what the option sets is taken back
    monkeypatch.setattr(sys, "argv", ["prepare", *arguments, "--trust-commands"])
    prepare.main()
    assert ran.exists() and os.environ[TRUST] == "commands"
    (made,) = CutSet.from_file(tmp_path / "out" / "cuts.jsonl.gz")
    assert made.has_features
    away = fastcopy(cut, recording=fastcopy(cut.recording, sources=[AudioSource("url", [0], "https://example.org")]))
    (tmp_path / "away").mkdir()
    with pytest.raises(ValueError, match="--trust-urls"):
        read_cuts(manifest_of(away, tmp_path / "away"))


def test_a_check_runs_nothing(cut: MonoCut, ran: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recording = by_command(cut, ran).recording
    RecordingSet.from_recordings([recording]).to_file(tmp_path / "train_recordings.jsonl.gz")
    SupervisionSet.from_segments(cut.supervisions).to_file(tmp_path / "train_supervisions.jsonl.gz")
    monkeypatch.setattr(sys, "argv", ["x", "check", "--manifests", str(tmp_path), "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match=f"train_recordings.jsonl.gz: {recording.id}: .*--trust-commands"):
        prepare.main()
    assert not ran.exists()


def test_shards_run_nothing(stored: CutSet, ran: Path, tmp_path: Path) -> None:
    shard = tmp_path / "cuts.000000.jsonl.gz"
    write_shard([stored[0]], shard)
    (kept,) = CutSet.from_jsonl_lazy(shard)
    spoilt = {**kept.to_dict(), "recording": by_command(stored[0], ran).recording.to_dict()}
    with gzip.open(shard, "wt") as file:
        file.write(json.dumps(spoilt) + "\n")
    with pytest.raises(ValueError, match="--trust-commands"):
        read_cuts(tmp_path)
    assert not ran.exists()


def test_plain_manifests_need_no_trust(manifest: Path, stored: CutSet, tmp_path: Path) -> None:
    assert len(read_cuts(manifest)) == len(stored)
    in_memory = fastcopy(stored[0].drop_features(), recording=stored[0].recording.move_to_memory(format="wav"))
    require_trusted("cuts", [in_memory])
    assert cut_samples(in_memory).shape == cut_samples(stored[0]).shape
    slower = stored[0].drop_features().perturb_speed(0.9)
    assert len(read_cuts(manifest_of(slower, tmp_path))) == 1


def test_pipes_keep_nobody_waiting(cut: MonoCut, stored: CutSet, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.wav"
    os.mkfifo(pipe)
    piped = fastcopy(cut, recording=fastcopy(cut.recording, sources=[AudioSource("file", [0], str(pipe))]))
    for read in (cut_samples, cut_source, load_features):
        with pytest.raises(CutError, match=f"{pipe}: a pipe or a device, where a file is needed"):
            read(piped)
    with pytest.raises(CutError, match="a pipe or a device"):
        cut_samples(mixed_with(piped, cut))
    kept = fastcopy(stored[0], features=fastcopy(stored[0].features, storage_path=str(pipe)))
    with pytest.raises(CutError, match="a pipe or a device"):
        load_features(kept)
    with pytest.raises(AudioError, match="no regular file"):
        load_samples(pipe)


def mixed_with(one: MonoCut, other: MonoCut) -> MixedCut:
    return MixedCut("mixed", [MixTrack(one), MixTrack(other)])


def test_recordings_of_several_kinds(cut: MonoCut, ran: Path, tmp_path: Path) -> None:
    """One source that needs trust among others that do not."""
    sources = [cut.recording.sources[0], AudioSource("command", [1], f"touch {ran}")]
    both = Recording("both", sources, 16000, cut.recording.num_samples, cut.recording.duration)
    with pytest.raises(ValueError, match="--trust-commands"):
        read_cuts(manifest_of(fastcopy(cut, recording=both), tmp_path))
