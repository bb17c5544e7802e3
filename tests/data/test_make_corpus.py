"""The made corpus has LibriSpeech's layout, unseen test speakers and texts, and is made equally every time."""

import importlib
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import script
import soundfile

ROOT = Path(__file__).parent.parent.parent
LOCAL = ROOT / "egs" / "librispeech" / "local"

pytest.importorskip("hibari")


def make(out: Path, *options: object) -> script.Done:
    return script.run(LOCAL / "make_corpus.py", "--out", out, "--minutes", 0.3, "--jobs", 1, *options)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("corpus")
    done = make(out)
    assert done.returncode == 0, done.stderr
    return out / "LibriSpeech"


def transcripts(corpus: Path, part: str) -> dict[str, str]:
    lines = [line for file in (corpus / part).rglob("*.trans.txt") for line in file.read_text().splitlines()]
    return dict(line.split(" ", 1) for line in lines)


PARTS = ("train-clean-5", "dev-clean-2", "test-clean")


def test_layout_and_sound(corpus: Path) -> None:
    assert "synthetic" in (corpus / "README.txt").read_text()
    for part in PARTS:
        texts = transcripts(corpus, part)
        audio = sorted((corpus / part).glob("*/*/*.flac"))
        assert texts.keys() == {path.stem for path in audio}
        for path in audio:
            speaker, chapter, _ = path.stem.split("-")
            assert path.parent == corpus / part / speaker / chapter
            samples_S, rate_hz = soundfile.read(path)
            assert rate_hz == 16000 and samples_S.ndim == 1
            seconds, words = len(samples_S) / rate_hz, len(texts[path.stem].split())
            assert 0.15 < seconds / words < 0.8
            assert 0.005 < np.sqrt(np.mean(samples_S**2)) < 0.3 and np.abs(samples_S).max() < 0.99
            edge = samples_S[: rate_hz // 20]
            assert 1e-5 < np.sqrt(np.mean(edge**2)) < 0.01  # it is quiet, but no digital silence
    assert not list(corpus.parent.glob(".making-*"))


def test_speakers_and_texts_of_the_parts_are_disjoint(corpus: Path) -> None:
    texts = [set(transcripts(corpus, part).values()) for part in PARTS]
    speakers = [{path.name for path in (corpus / part).iterdir()} for part in PARTS]
    assert [len(names) for names in speakers] == [20, 3, 5]
    for groups in (texts, speakers):
        assert all(groups)
        assert sum(map(len, groups)) == len(set.union(*groups))


def test_same_again_and_skipped_when_complete(corpus: Path, tmp_path: Path) -> None:
    marker = corpus / "README.txt"
    before = marker.stat().st_mtime_ns
    done = make(corpus.parent)
    assert done.returncode == 0 and "nothing to do" in done.stdout
    assert marker.stat().st_mtime_ns == before
    # In processes, so that nothing which this one has in memory counts.
    command = [sys.executable, LOCAL / "make_corpus.py", "--out", tmp_path, "--minutes", 0.3, "--jobs", 2]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run(list(map(str, command)), env=environment, check=True)
    files = {path.relative_to(corpus): path.read_bytes() for path in corpus.rglob("*.*") if path.is_file()}
    again = tmp_path / "LibriSpeech"
    assert files == {p.relative_to(again): p.read_bytes() for p in again.rglob("*.*") if p.is_file()}


def test_other_settings_make_another_corpus(tmp_path: Path) -> None:
    texts = []
    for options in (["--minutes", 0.05], ["--minutes", 0.05, "--seed", 2]):
        done = make(tmp_path, *options)
        assert done.returncode == 0, done.stderr
        texts.append(transcripts(tmp_path / "LibriSpeech", "train-clean-5"))
    assert texts[0] != texts[1]


def test_foreign_corpus_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "LibriSpeech").mkdir()
    done = make(tmp_path)
    assert done.returncode == 1 and "no made corpus: choose another --out" in done.stderr
    assert "Traceback" not in done.stderr


def test_sentences(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = make(tmp_path, "--size", "sentences", "--minutes", 0.05)
    assert done.returncode == 0, done.stderr
    settings = json.loads((tmp_path / "LibriSpeech" / ".complete.json").read_text())
    assert settings == {"size": "sentences", "minutes": 0.05, "seed": 1}
    monkeypatch.syspath_prepend(LOCAL)
    texts = importlib.import_module("texts")
    rng = random.Random(1)
    words = {word for _ in range(4000) for word in texts.sentence(rng).split()}
    assert len(words) > 350
    assert all(word.replace("'", "").isalpha() and word.islower() for word in words)
