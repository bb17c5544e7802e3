"""Makes a tiny corpus of tones, so that tests of the data side need no speech."""

from pathlib import Path

import pytest
import soundfile
from lhotse import CutSet
from tones import NUM_UTTERANCES, WORDS, tone, utterance

from ssm_asr.data.store import prepare_cuts


@pytest.fixture(scope="session")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a manifest of cuts of 0.6 - 1.8 s without features."""
    directory = tmp_path_factory.mktemp("tones")
    cuts = []
    for k in range(NUM_UTTERANCES):
        path = directory / f"utt{k:02d}.wav"
        soundfile.write(path, tone(0.6 + 0.03 * k, seed=k), 16000)
        cuts.append(utterance(path, f"utt{k:02d}", " ".join(WORDS[(k + j) % 4] for j in range(1 + k % 3))))
    CutSet.from_cuts(cuts).to_file(directory / "cuts.jsonl.gz")
    return directory / "cuts.jsonl.gz"


@pytest.fixture(scope="session")
def stored(manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> CutSet:
    """Returns the cuts of the manifest with stored features."""
    out = tmp_path_factory.mktemp("features")
    options = {"speed_perturb": False, "shuffle": False, "on_the_fly": False, "num_jobs": 1}
    return CutSet.from_file(prepare_cuts(manifest, out, **options)).to_eager()
