"""The made CSJ: what lhotse insists on is there, test sentences are unseen, and it is the same every time."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile
from csj_corpus import run
from lhotse.recipes.csj import prepare_csj
from transcripts import transcribe

pytest.importorskip("pyopenjtalk")

import make_corpus
from make_corpus import make_channel, plan, volume


@pytest.fixture(scope="module", autouse=True)
def few_utterances() -> Iterator[None]:
    """All talks say half as much as usual, for speech takes its time: two utterances and the pause between them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(make_corpus, "UTTERANCES", {"dev": 1, "test": 2, "excluded": 1})
        yield


def make(out: Path, *options: object) -> str:
    done = run("make_corpus.py", "--out", out, "--minutes", 1.5, "--jobs", 1, *options)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def corpus(few_utterances: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("corpus")
    make(out)
    return out / "CSJ"


@pytest.fixture(scope="module")
def manifests(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """What lhotse's own recipe makes of it."""
    return prepare_csj(corpus, tmp_path_factory.mktemp("transcripts"), nj=1)


def test_lhotse_takes_it_for_csj(corpus: Path, manifests: dict) -> None:
    counts = {part: len(content["recordings"]) for part, content in manifests.items()}
    assert [counts[f"eval{k}"] for k in (1, 2, 3)] == [10, 10, 10]
    assert counts["valid"] == 39 + 1 and counts["excluded"] == 6 + 4  # dialogues count twice
    assert counts["core"] + counts["noncore"] == 24
    assert sum(len(manifests[f"eval{k}"]["supervisions"]) for k in (1, 2, 3)) == 60


def test_tags(corpus: Path) -> None:
    text = "".join(path.read_bytes().decode("shift_jis") for path in corpus.glob("MORPH/SDB/*/*.sdb"))
    patterns = [
        "F [ァ-ヺぁ-ゖー]+",
        "D [ぁ-ゖ]+",
        "D2 が",
        "A [一-十百]+;[０-９]+",
        r"A \w+;ＤＶＤ",
        r"W \w+;\w+",
        "R ××",
    ]
    for pattern in patterns:
        assert re.search(rf"\({pattern}\)", text), pattern
    row = next(row.split("\t") for row in text.splitlines() if "\t写真\t" in row)
    assert len(row) == 17 and (row[5], row[9], row[10], row[11]) == ("写真", "写真", "シャシン", "名詞")


def test_sound(corpus: Path) -> None:
    assert "synthetic" in (corpus / "README.txt").read_text()
    wavs = sorted(corpus.glob("WAV/*/*.wav"))
    assert len(wavs) == 75 + 5 + 24
    for path in wavs[::7]:
        samples_S, rate_hz = soundfile.read(path)
        assert rate_hz == 16000 and samples_S.ndim == 1 and soundfile.info(path).subtype == "PCM_16"
        assert np.sqrt(np.mean(samples_S**2)) > 0.003 and np.abs(samples_S).max() < 0.99
        assert 1e-5 < np.sqrt(np.mean(samples_S[:4000] ** 2)) < 0.01  # quiet, but never digital silence


def test_transcripts_fit_the_sound(corpus: Path, manifests: dict) -> None:
    """Speech within the times of a segment, none between them."""
    for segment in list(manifests["eval1"]["supervisions"])[::4]:
        recording = manifests["eval1"]["recordings"][segment.recording_id]
        inside = recording.load_audio(offset=segment.start, duration=segment.duration)
        after = recording.load_audio(offset=segment.end + 0.02, duration=0.15)
        assert np.sqrt(np.mean(inside**2)) > 20 * np.sqrt(np.mean(after**2))
        assert 0.08 < segment.duration / len(segment.text) < 0.5


def test_test_sentences_are_unseen(manifests: dict) -> None:
    def sentences(*parts: str) -> set[str]:
        """What was meant."""
        raw = [segment.custom["raw"] for part in parts for segment in manifests[part]["supervisions"]]
        return {transcribe(text)["fluent"] for text in raw if "×" not in text}

    train, dev = sentences("core", "noncore"), sentences("valid")
    test = sentences("eval1", "eval2", "eval3")
    assert not test & train and not test & dev and not dev & train and len(test) > 40


def test_same_again_and_skipped_when_complete(corpus: Path, tmp_path: Path) -> None:
    settings = json.loads((corpus / ".complete.json").read_text())
    assert settings.pop("program") and settings == {"minutes": 1.5, "seed": 1}
    assert "nothing to do" in make(corpus.parent)
    channels = [channel for channel in plan(1.5, 1, tmp_path) if channel.talk in ("A00F2001", "D03F0058", "S00M0008")]
    for channel in channels:
        wav = Path("WAV") / volume(channel.talk) / f"{channel.talk}{channel.suffix}.wav"
        (tmp_path / wav).parent.mkdir(parents=True, exist_ok=True)
        make_channel(channel)
        assert (tmp_path / wav).read_bytes() == (corpus / wav).read_bytes()
    assert len(channels) == 4


def test_another_seed_makes_another_corpus(tmp_path: Path) -> None:
    for folder in ("core", "noncore"):
        (tmp_path / "WAV" / folder).mkdir(parents=True)
    one, other = (make_channel(plan(1.5, seed, tmp_path)[0])[1] for seed in (1, 2))
    assert one != other


def test_foreign_corpus_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "CSJ").mkdir()
    done = run("make_corpus.py", "--out", tmp_path)
    assert done.returncode == 1 and "no made corpus: choose another --out" in done.stderr
    assert "Traceback" not in done.stderr
