"""Made noises are reproducible and of even level; MUSAN is read or refused."""

from pathlib import Path

import numpy as np
import pytest
import soundfile
from lhotse import CutSet
from tones import tone

from ssm_asr.data.noise import made_noises, musan_noises


def test_made_noises(manifest: Path, tmp_path: Path) -> None:
    speech = CutSet.from_file(manifest)
    made = [made_noises(tmp_path / name, speech, count=4, seed=seed) for name, seed in (("a", 1), ("b", 1), ("c", 2))]
    sounds = [[cut.load_audio()[0] for cut in cuts] for cuts in made]
    assert [cut.id for cut in made[0]] == ["coloured-0000", "babble-0001", "coloured-0002", "babble-0003"]
    for samples_S in sounds[0]:
        assert len(samples_S) == 160000
        # Clipping of the loudest peaks may take a little of the level.
        assert np.sqrt(np.mean(samples_S**2)) == pytest.approx(0.05, rel=0.02)
    for first, same, other in zip(*sounds, strict=True):
        np.testing.assert_array_equal(first, same)
        assert not np.array_equal(first, other)


def test_musan(tmp_path: Path) -> None:
    for part in ("music", "speech", "noise"):
        (tmp_path / part).mkdir()
    with pytest.raises(ValueError, match="no MUSAN here, expected music/"):
        musan_noises(tmp_path / "music")
    with pytest.raises(ValueError, match="no MUSAN here, there is no"):
        musan_noises(tmp_path)
    for part, seconds in (("music", 20.5), ("speech", 12.0), ("noise", 3.0)):
        soundfile.write(tmp_path / part / f"{part}-1.wav", tone(seconds), 16000)
    durations = sorted((cut.recording_id, round(cut.duration, 2)) for cut in musan_noises(tmp_path))
    expected = [("music-1", 10.0), ("music-1", 10.0), ("noise-1", 3.0), ("speech-1", 2.0), ("speech-1", 10.0)]
    assert durations == expected
