"""The long-form measurement joins all utterances, with the pauses that it says."""

from pathlib import Path

import numpy as np
import pytest
from lhotse import CutSet, MonoCut, Recording, SupervisionSegment
from lhotse.utils import fastcopy

from ssm_asr.cli import long_form
from ssm_asr.evaluation.long_form import joined

RATE_HZ = 16000


class Tone(MonoCut):
    """A cut whose audio needs no file: its own number, again and again."""

    def load_audio(self, *args: object, **kwargs: object) -> np.ndarray:
        return np.full((1, round(self.duration * RATE_HZ)), float(self.id), dtype=np.float32)


@pytest.fixture
def cuts() -> CutSet:
    def tone(k: int) -> Tone:
        recording = Recording(str(k), [], RATE_HZ, RATE_HZ, 1.0)
        segment = SupervisionSegment(str(k), str(k), 0.0, 1.0, text=f"WORD{k}")
        return Tone(str(k), 0.0, 1.0, 0, supervisions=[fastcopy(segment)], recording=recording)

    return CutSet.from_cuts(tone(k) for k in range(1, 8))


@pytest.mark.parametrize("count, pause_s", [(1, 0.0), (3, 0.0), (4, 2.0), (30, 2.0)])
def test_joined_audio_holds_every_utterance_once(cuts: CutSet, count: int, pause_s: float) -> None:
    groups = list(joined(cuts, count, pause_s))
    words = " ".join(text for _, _, text in groups).split()
    assert sorted(words) == [f"WORD{k}" for k in range(1, 8)]
    assert len(groups) == -(-7 // count)
    for _, samples_S, text in groups:
        joints = len(text.split()) - 1
        assert len(samples_S) == RATE_HZ * (joints + 1 + pause_s * (joints // 2))
        loud = samples_S[np.abs(samples_S) > 0.5].reshape(-1, RATE_HZ)
        assert [f"WORD{round(k)}" for k in loud[:, 0]] == text.split()


def test_the_order_is_always_the_same(cuts: CutSet) -> None:
    first, second = ([name_text for *_, name_text in joined(cuts, 3, 0.0)] for _ in range(2))
    assert first == second != [text for *_, text in joined(CutSet.from_cuts(reversed(list(cuts))), 3, 0.0)]


def test_what_cannot_be_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = str(tmp_path / "none")
    CutSet.from_cuts([MonoCut("1", 0.0, 1.0, 0)]).to_file(tmp_path / "cuts.jsonl.gz")
    for cuts, message in (
        (missing, f"{missing}: no cut manifest"),
        (str(tmp_path / "cuts.jsonl.gz"), f"{missing}: no such checkpoint"),
    ):
        monkeypatch.setattr("sys.argv", ["long-form", "--checkpoint", missing, "--cuts", cuts])
        assert long_form.main() == 2
        error = capsys.readouterr().err
        assert error.startswith(message) and error.count("\n") == 1
