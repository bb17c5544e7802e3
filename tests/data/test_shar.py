"""Shards give the features and batches that a manifest gives, and training on them resumes as exactly."""

import shutil
from pathlib import Path

import pytest
import torch
from lhotse import CutSet
from tones import NUM_UTTERANCES, WORDS

from ssm_asr.data.batches import Batch, train_batches
from ssm_asr.data.config import DataConfig
from ssm_asr.data.filtering import filter_cuts
from ssm_asr.data.loading import load_features
from ssm_asr.data.store import prepare_cuts, read_cuts
from ssm_asr.data.tokens import train_tokenizer

OPTIONS = {"speed_perturb": True, "on_the_fly": False, "num_jobs": 1, "shar": True}


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ssm_asr.data.store.CUTS_PER_PART", 15)


@pytest.fixture(scope="module")
def shards(manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ssm_asr.data.store.CUTS_PER_PART", 15)
        return prepare_cuts(manifest, tmp_path_factory.mktemp("shar"), shuffle=True, **OPTIONS)


def batches(cuts: CutSet, num_workers: int = 0, start_batch: int = 0) -> list[Batch]:
    config = DataConfig(max_duration_s=20.0, num_buckets=3, num_workers=num_workers)
    tokenizer = train_tokenizer(WORDS, "word")
    kept, _ = filter_cuts(cuts, tokenizer, config)
    return list(train_batches(kept, config, tokenizer, epoch=1, seed=1, start_batch=start_batch))


def test_shards_hold_what_a_manifest_does(shards: Path, manifest: Path, tmp_path: Path) -> None:
    assert sorted(path.name for path in shards.iterdir()) == [
        *(f"cuts.{k:06d}.jsonl.gz" for k in range(3)),
        *(f"features.{k:06d}.tar" for k in range(3)),
    ]
    cuts, plain = read_cuts(shards), prepare_cuts(manifest, tmp_path, shuffle=False, **{**OPTIONS, "shar": False})
    expected = {cut.id: cut for cut in read_cuts(plain)}
    assert set(cuts.ids) == set(expected) and len(cuts) == 3 * NUM_UTTERANCES
    assert list(cuts.ids) != list(expected)  # the order is shuffled
    for cut in cuts:
        same = expected[cut.id]
        assert (cut.duration, cut.num_frames) == (same.duration, same.num_frames)
        assert cut.supervisions[0].text == same.supervisions[0].text
        assert torch.equal(load_features(cut), load_features(same))


def test_exact_resume_whatever_the_workers(shards: Path) -> None:
    uninterrupted = batches(read_cuts(shards))
    assert len(uninterrupted) > 6
    rest = batches(read_cuts(shards), num_workers=2, start_batch=3)
    assert len(rest) == len(uninterrupted) - 3
    for one, other in zip(uninterrupted[3:], rest, strict=True):
        assert one.ids == other.ids
        assert torch.equal(one.features_BTF, other.features_BTF)


def test_lhotse_reads_the_shards_in_sequence(shards: Path) -> None:
    offsets = {cut.id: cut for cut in read_cuts(shards)}
    for cut in CutSet.from_shar(in_dir=shards):
        assert torch.equal(torch.from_numpy(cut.load_features()), load_features(offsets[cut.id]))


def test_shards_can_be_moved(shards: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(shards, tmp_path / "moved")
    cut = next(iter(read_cuts(moved)))
    assert cut.features.storage_path.startswith(str(moved))
    assert cut.load_features().shape == (cut.num_frames, 80)


def test_a_stopped_run_keeps_its_shards(manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ssm_asr.data import store

    written = []

    def stop_in_the_second(cuts: object, cuts_file: Path) -> None:
        if len(written) == 1:
            raise KeyboardInterrupt
        real_write(cuts, cuts_file)
        written.append(cuts_file.name)

    real_write = store.write_shard
    monkeypatch.setattr(store, "write_shard", stop_in_the_second)
    with pytest.raises(KeyboardInterrupt):
        prepare_cuts(manifest, tmp_path, shuffle=False, **OPTIONS)
    assert not (tmp_path / "cuts.shar").exists()
    written.append("from now on none stops")
    prepare_cuts(manifest, tmp_path, shuffle=False, **OPTIONS)
    assert written == ["cuts.000000.jsonl.gz", "from now on none stops", "cuts.000001.jsonl.gz", "cuts.000002.jsonl.gz"]
    assert len(read_cuts(tmp_path / "cuts.shar")) == 3 * NUM_UTTERANCES
    # Another form of storage replaces the shards.
    prepare_cuts(manifest, tmp_path, shuffle=False, **{**OPTIONS, "shar": False})
    assert not (tmp_path / "cuts.shar").exists()


def test_unusable_shards(shards: Path, stored: CutSet, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no shards here, expected cuts\.000000"):
        read_cuts(tmp_path)
    broken = shutil.copytree(shards, tmp_path / "broken")
    (broken / "features.000001.tar").unlink()
    with pytest.raises(ValueError, match=r"features\.000001\.tar: features of this shard cannot be read"):
        read_cuts(broken)
    other = shutil.copytree(shards, tmp_path / "other")
    shutil.copy(other / "features.000002.tar", other / "features.000000.tar")
    with pytest.raises(ValueError, match=r"features\.000000\.tar: no utt.*\.npy"):
        read_cuts(other)
