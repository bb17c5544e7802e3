"""Batches resume exactly, do not depend on workers, and are padded, augmented and filtered as asked."""

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import combinations, islice
from pathlib import Path

import numpy as np
import pytest
import torch
from lhotse import CutSet, Fbank
from lhotse.features.io import MemoryRawWriter
from tones import NUM_UTTERANCES, WORDS

from ssm_asr.data.batches import Batch, _least_padding, eval_batches, largest_joined, train_batches
from ssm_asr.data.config import DataConfig, SpecAugmentConfig
from ssm_asr.data.filtering import filter_cuts
from ssm_asr.data.loading import load_features
from ssm_asr.data.store import prepare_cuts
from ssm_asr.data.tokens import Tokenizer, train_tokenizer
from ssm_asr.units import LOG_MEL_SILENCE, embed_frames, feature_frames, output_frames

CONFIG = DataConfig(max_duration_s=6.0, num_buckets=3, num_workers=0)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(WORDS, "word")


def batches(cuts: CutSet, tokenizer: Tokenizer, config: DataConfig = CONFIG, **options: int) -> list[Batch]:
    options = {"epoch": 1, "seed": 1, **options}
    return list(train_batches(cuts, config, tokenizer, noise_cuts=cuts.subset(first=5), **options))


def assert_same(first: list[Batch], second: list[Batch]) -> None:
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        assert one.ids == other.ids and one.texts == other.texts
        for name in ("features_BTF", "feature_lens_B", "tokens_BU", "token_lens_B"):
            assert torch.equal(getattr(one, name), getattr(other, name)), name


def test_exact_resume_whatever_the_workers(stored: CutSet, tokenizer: Tokenizer) -> None:
    uninterrupted = batches(stored, tokenizer)
    assert len(uninterrupted) > 6
    assert_same(batches(stored, tokenizer), uninterrupted)
    assert_same(batches(stored, tokenizer, start_batch=4), uninterrupted[4:])
    two_workers = replace(CONFIG, num_workers=2)
    assert_same(batches(stored, tokenizer, two_workers, start_batch=3), uninterrupted[3:])
    assert batches(stored, tokenizer, start_batch=len(uninterrupted)) == []


def test_workers_end_well_when_batches_are_left(stored: CutSet, tokenizer: Tokenizer) -> None:
    config = replace(CONFIG, max_duration_s=600.0, num_workers=1)
    batches = train_batches(stored.repeat(times=300), config, tokenizer, epoch=1, seed=1)
    next(batches)
    (worker,) = multiprocessing.active_children()
    del batches
    worker.join()
    assert worker.exitcode == 0


KILLED = """
import multiprocessing, os, signal, sys
from pathlib import Path
from lhotse import CutSet
from ssm_asr.data.batches import train_batches
from ssm_asr.data.config import DataConfig
from ssm_asr.data.tokens import Tokenizer

if __name__ == "__main__":
    cuts = CutSet.from_file(sys.argv[1]).to_eager()
    config = DataConfig(max_duration_s=2.0, num_buckets=2, num_workers=2)
    batches = train_batches(cuts, config, Tokenizer.load(Path(sys.argv[2])), epoch=1, seed=1)
    next(batches)
    print(*(process.pid for process in multiprocessing.active_children()), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_workers_end_when_their_run_is_killed(manifest: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    tokenizer.save(tmp_path / "tokens")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, str(script), str(manifest), str(tmp_path / "tokens")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
    workers = [int(pid) for pid in done.stdout.split()]
    assert done.returncode == -signal.SIGKILL and len(workers) == 2, done.stderr
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)


def test_skipped_batches_are_not_loaded(stored: CutSet, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = []
    monkeypatch.setattr("ssm_asr.data.loading.load_features", lambda cut: loaded.append(cut.id) or load_features(cut))
    config = replace(CONFIG, noise_probability=0.0)
    rest = batches(stored, tokenizer, config, start_batch=5)
    assert sorted(loaded) == sorted(i for batch in rest for i in batch.ids)


def test_every_epoch_and_seed_differs_and_holds_every_cut(stored: CutSet, tokenizer: Tokenizer) -> None:
    orders = []
    for options in ({}, {"epoch": 2}, {"seed": 5}):
        ids = [i for batch in batches(stored, tokenizer, **options) for i in batch.ids]
        assert sorted(ids) == sorted(stored.ids)
        orders.append(tuple(ids))
    assert len(set(orders)) == 3


def test_ranks_share_the_cuts(stored: CutSet, tokenizer: Tokenizer) -> None:
    ranks = [batches(stored, tokenizer, rank=rank, world_size=2) for rank in (0, 1)]
    assert len(ranks[0]) == len(ranks[1])
    assert_same(batches(stored, tokenizer, rank=1, world_size=2, start_batch=2), ranks[1][2:])
    # Some cuts may be used twice, as ID_dupN, so that no rank waits for another at the end.
    seen = {i.split("_dup")[0] for rank in ranks for batch in rank for i in batch.ids}
    assert seen == set(stored.ids)
    assert not set(ranks[0][0].ids) & set(ranks[1][0].ids)


def test_fixed_shapes(stored: CutSet, tokenizer: Tokenizer) -> None:
    config = replace(CONFIG, fixed_shapes=True)
    fixed = batches(stored, tokenizer, config)
    assert sorted(i for batch in fixed for i in batch.ids) == sorted(stored.ids)
    shapes: dict[int, list[int]] = {}
    for batch in fixed:
        B, T, _ = batch.features_BTF.shape
        shapes.setdefault(T, []).append(B)
        assert embed_frames(T) % 16 == 0 and feature_frames(embed_frames(T)) == T
        most_tokens = int(batch.token_lens_B.max())
        assert most_tokens <= batch.tokens_BU.shape[1] < most_tokens + 16 and batch.tokens_BU.shape[1] % 16 == 15
        for features_TF, frames in zip(batch.features_BTF, batch.feature_lens_B, strict=True):
            assert (features_TF[frames:] == LOG_MEL_SILENCE).all()
    assert 1 < len(shapes) <= CONFIG.num_buckets
    for sizes in shapes.values():  # only the last batch of a bucket may be smaller
        assert sum(size < max(sizes) for size in sizes) <= 1
    assert_same(batches(stored, tokenizer, config, start_batch=2), fixed[2:])


@pytest.mark.parametrize("num_buckets", [1, 2, 3, 4])
def test_buckets_of_fixed_shapes_waste_least(num_buckets: int) -> None:
    """Against all ways to choose the bounds."""
    durations_s = np.random.default_rng(1).gamma(3.0, 0.4, 40).tolist()
    steps = np.ceil(np.array(durations_s) / 0.32)

    def padded(bounds: tuple[float, ...]) -> float:
        ends = np.array([*bounds, steps.max()])
        return float(ends[np.searchsorted(ends, steps)].sum())

    found = _least_padding(durations_s, num_buckets)
    assert len(found) == num_buckets - 1 and found == sorted(set(found))
    best = min(padded(bounds) for bounds in combinations(np.unique(steps)[:-1], num_buckets - 1))
    assert padded(tuple(np.round(np.array(found) / 0.32))) == best


def test_global_generators_are_left_alone(stored: CutSet, tokenizer: Tokenizer) -> None:
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = random.random(), np.random.rand(), torch.rand(1)
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    batches(stored, tokenizer)
    assert (random.random(), np.random.rand(), torch.rand(1)) == expected


def test_shapes_padding_and_tokens(stored: CutSet, tokenizer: Tokenizer) -> None:
    durations = {cut.id: cut.duration for cut in stored}
    texts = {cut.id: cut.supervisions[0].text for cut in stored}
    for batch in batches(stored, tokenizer):
        assert batch.features_BTF.dtype == torch.float32 and batch.tokens_BU.dtype == torch.int64
        assert sum(durations[i] for i in batch.ids) <= CONFIG.max_duration_s + 1e-6
        assert int(batch.feature_lens_B.max()) == batch.features_BTF.shape[1]
        for k, name in enumerate(batch.ids):
            num_frames, num_tokens = int(batch.feature_lens_B[k]), int(batch.token_lens_B[k])
            assert abs(num_frames - durations[name] * 100) <= 1
            assert (batch.features_BTF[k, num_frames:] == LOG_MEL_SILENCE).all()
            assert batch.texts[k] == texts[name]
            assert batch.tokens_BU[k, :num_tokens].tolist() == tokenizer.encode(texts[name])
            assert (batch.tokens_BU[k, num_tokens:] == 0).all()
    moved = batch.to("meta")
    assert moved.tokens_BU.is_meta and moved.features_BTF.is_meta and moved.ids == batch.ids


def test_eval_batches_are_plain_features(stored: CutSet, manifest: Path, tokenizer: Tokenizer) -> None:
    on_the_fly = CutSet.from_file(manifest)
    stored_batches = list(eval_batches(stored, tokenizer, max_duration_s=10.0))
    assert_same(stored_batches, list(eval_batches(on_the_fly, tokenizer, max_duration_s=10.0)))
    assert sorted(i for batch in stored_batches for i in batch.ids) == sorted(stored.ids)
    first = stored_batches[0]
    features_TF = load_features(stored[first.ids[0]])
    assert torch.equal(first.features_BTF[0, : len(features_TF)], features_TF)


def test_a_single_cut_makes_a_batch(stored: CutSet, tokenizer: Tokenizer) -> None:
    (batch,) = batches(stored.subset(first=1), tokenizer)
    assert batch.ids == ["utt00"]


def test_features_are_computed_as_they_are_stored(stored: CutSet, manifest: Path, tokenizer: Tokenizer) -> None:
    """Batches from audio, with changed speeds, hold what batches from stored features do, but for rounding."""
    audio = CutSet.from_file(manifest).to_eager()
    faster = CutSet.from_cuts(cut.perturb_speed(factor) for cut in audio for factor in (0.9, 1.0, 1.1))
    features = CutSet.from_cuts(cut.compute_and_store_features(Fbank(), MemoryRawWriter()) for cut in faster)
    joining = replace(CONFIG, join_probability=0.5, noise_probability=1.0)
    pairs = list(zip(batches(faster, tokenizer, joining), batches(features, tokenizer, joining), strict=True))
    assert len(pairs) > 20
    for one, other in pairs:
        assert one.ids == other.ids and torch.equal(one.feature_lens_B, other.feature_lens_B)
        assert torch.allclose(one.features_BTF, other.features_BTF, atol=2e-3)


def test_noise_reaches_the_batches(stored: CutSet, tokenizer: Tokenizer) -> None:
    quiet = replace(CONFIG, spec_augment=SpecAugmentConfig(probability=0.0))
    changed = 0
    for batch in batches(stored, tokenizer, replace(quiet, noise_probability=0.5)):
        for k, name in enumerate(batch.ids):
            plain_TF = load_features(stored[name])
            changed += not torch.equal(batch.features_BTF[k, : len(plain_TF)], plain_TF)
    assert 0.25 * NUM_UTTERANCES < changed < 0.75 * NUM_UTTERANCES


def test_output_frames() -> None:
    assert [output_frames(t) for t in (0, 6, 7, 8, 9, 12, 13, 100)] == [0, 0, 0, 0, 1, 1, 2, 23]


def test_filter_reports_every_cut_it_drops(stored: CutSet, tokenizer: Tokenizer) -> None:
    cuts = {cut.id: cut for cut in stored}
    for name, text in (("utt03", ""), ("utt04", "ONE TEN"), ("utt05", "ONE " * 20)):
        cuts[name].supervisions[0].text = text
    config = replace(CONFIG, min_utterance_s=0.65, max_utterance_s=1.7)
    kept, report = filter_cuts(CutSet.from_cuts(cuts.values()), tokenizer, config)
    dropped = {entry.item: entry.reason for entry in report.left_out}
    expected = {
        "utt03": "empty transcript",
        "utt04": "token outside the vocabulary",
        "utt05": "fewer frames than tokens",
    }
    assert dropped == {**dict.fromkeys(("utt00", "utt01"), "too short"), **expected, **{
        name: "too long" for name in ("utt37", "utt38", "utt39")
    }}  # fmt: skip
    assert set(kept.ids) == set(stored.ids) - set(dropped)
    assert report.num_kept == len(kept)
    assert "kept 32, left out 8: 3 too long (e.g. utt37), 2 too short (e.g. utt00)" in report.summary()
    with pytest.raises(ValueError, match="no utterance left for training: kept 0, left out 40: 40 too short"):
        filter_cuts(stored, tokenizer, replace(CONFIG, min_utterance_s=60.0, max_utterance_s=90.0))


def test_features_resume_and_follow_their_inputs(
    manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ssm_asr.data.store.CUTS_PER_PART", 15)
    options = {"speed_perturb": True, "shuffle": True, "on_the_fly": False, "num_jobs": 1}
    original = tmp_path / "original.jsonl.gz"
    original.write_bytes(manifest.read_bytes())
    real_part, done = prepare_cuts.__globals__["_do_part"], []

    def stop_at_the_third(part: tuple) -> None:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(part)
        real_part(part)

    monkeypatch.setattr("ssm_asr.data.store._do_part", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        prepare_cuts(original, tmp_path / "out", **options)
    assert not (tmp_path / "out" / "original.jsonl.gz").exists()
    finished = sorted((tmp_path / "out").rglob("*.npy"))
    assert len(finished) == 90
    monkeypatch.setattr("ssm_asr.data.store._do_part", real_part)
    cuts = CutSet.from_file(prepare_cuts(original, tmp_path / "out", **options)).to_eager()
    assert set(finished) < set((tmp_path / "out").rglob("*.npy"))
    names = {f"utt{k:02d}{suffix}" for k in range(NUM_UTTERANCES) for suffix in ("", "_sp0.9", "_sp1.1")}
    assert set(cuts.ids) == names and list(cuts.ids) != sorted(names)
    assert len(load_features(cuts["utt10_sp0.9"])) == pytest.approx(90 / 0.9, abs=1)
    written = (tmp_path / "out" / "original.jsonl.gz").stat().st_mtime_ns
    inputs = json.loads((tmp_path / "out" / "original.inputs.json").read_text())
    assert inputs.keys() == {"sha256", "speed_perturb", "shuffle", "on_the_fly"}  # as version 0.1 wrote it
    again = prepare_cuts(original, tmp_path / "out", **options)
    assert again.stat().st_mtime_ns == written
    CutSet.from_file(manifest).subset(first=20).to_file(original)
    changed = CutSet.from_file(prepare_cuts(original, tmp_path / "out", **options))
    assert len(list(changed)) == 60
    assert len(list((tmp_path / "out").rglob("*.npy"))) == 60


def test_a_plain_manifest_becomes_a_compressed_one(manifest: Path, tmp_path: Path) -> None:
    CutSet.from_file(manifest).subset(first=3).to_file(tmp_path / "plain.jsonl")
    options = {"speed_perturb": False, "shuffle": False, "on_the_fly": True, "num_jobs": 1}
    made = prepare_cuts(tmp_path / "plain.jsonl", tmp_path / "out", **options)
    assert made == tmp_path / "out" / "plain.jsonl.gz" and len(list(CutSet.from_file(made))) == 3


def test_first_batches_come_before_the_epoch_is_planned(stored: CutSet, tokenizer: Tokenizer) -> None:
    lazy = train_batches(stored, CONFIG, tokenizer, epoch=1, seed=1)
    assert len(list(islice(lazy, 2))) == 2


def test_lazy_cuts_stay_lazy_when_filtered(manifest: Path, tokenizer: Tokenizer) -> None:
    config = replace(CONFIG, max_utterance_s=1.0)
    kept, report = filter_cuts(CutSet.from_jsonl_lazy(manifest), tokenizer, config)
    assert kept.is_lazy and report.num_kept == 14
    ids = [i for batch in train_batches(kept, config, tokenizer, epoch=1, seed=1) for i in batch.ids]
    assert sorted(ids) == [f"utt{k:02d}" for k in range(14)]


def test_joined_batches_hold_all_speech_and_all_tokens(stored: CutSet, tokenizer: Tokenizer) -> None:
    plain = replace(CONFIG, spec_augment=SpecAugmentConfig(probability=0.0))
    joined = replace(plain, join_probability=1.0, join_most=3, join_pause_s=0.5)
    some_joined = False
    for one, other in zip(batches(stored, tokenizer, plain), batches(stored, tokenizer, joined), strict=True):
        assert [name for group in other.ids for name in group.split("+")] == one.ids
        assert " ".join(other.texts) == " ".join(one.texts)
        assert other.token_lens_B.sum() == one.token_lens_B.sum()
        joints = len(one.ids) - len(other.ids)
        some_joined |= joints > 0
        assert 0 <= other.feature_lens_B.sum() - one.feature_lens_B.sum() <= 50 * joints
    assert some_joined


def test_no_joined_batch_is_larger_than_the_one_that_is_tried(stored: CutSet, tokenizer: Tokenizer) -> None:
    config = replace(CONFIG, join_probability=1.0, join_most=3, join_pause_s=0.5)
    longest = next(eval_batches(stored, tokenizer, max_duration_s=config.max_duration_s))
    tried = largest_joined(longest, config)
    seen = [batch for epoch in range(1, 11) for batch in batches(stored, tokenizer, config, epoch=epoch)]

    def size(batch: Batch) -> int:  # attention keeps about this many weights
        return len(batch.ids) * batch.features_BTF.shape[1] ** 2

    assert max(batch.features_BTF.shape[1] for batch in seen) <= tried.features_BTF.shape[1]
    assert max(map(size, seen)) <= size(tried)
