"""lhotse cuts -> batches of padded features and tokens.

Shapes: B utterances, T feature frames (10 ms), F mel bins, U tokens.

A batch is a function of (cuts, config, tokenizer, seed, epoch, rank, world size, index) alone: which cuts
it holds is decided by the sampler in the calling process, and its augmentation draws from a generator seeded
with that key. So neither the number of workers nor what was loaded before can change it, and training resumes
with exactly the batches that an uninterrupted run would have seen.
"""

import atexit
import math
import multiprocessing
import os
import signal
import warnings
from bisect import bisect_left
from collections.abc import Iterator
from functools import lru_cache
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from lhotse import CutSet
from lhotse.cut import Cut
from lhotse.dataset import DynamicBucketingSampler, DynamicCutSampler
from lhotse.dataset.sampling.dynamic_bucketing import FixedBucketBatchSizeConstraint, estimate_duration_buckets
from lhotse.features import FeatureExtractor
from torch.nn.utils.rnn import pad_sequence

import ssm_asr.data.shar  # noqa: F401  workers read features by the reader that it registers
from ssm_asr.data.augment import add_noise, draw_groups, join_utterances, spec_augment
from ssm_asr.data.config import DataConfig
from ssm_asr.data.features import make_fbank, reading
from ssm_asr.data.filtering import text_of
from ssm_asr.data.tokens import Tokenizer
from ssm_asr.units import ENCODER_FRAME_MS, FRAME_SHIFT_MS, LOG_MEL_SILENCE, feature_frames

CUTS_TO_ESTIMATE_BUCKETS = 10000
# Fixed shapes have a multiple of so many encoder frames (50 Hz), which GPUs multiply faster than odd numbers.
SHAPE_FRAMES = 16
SHAPE_OUTPUTS = 16  # and, for the same reason, of so many outputs of the predictor, which are one more than tokens


class Batch(NamedTuple):
    """Utterances, padded at their ends."""

    features_BTF: torch.Tensor  # float32, padded with LOG_MEL_SILENCE
    feature_lens_B: torch.Tensor  # int64
    tokens_BU: torch.Tensor  # int64, padded with 0
    token_lens_B: torch.Tensor  # int64
    ids: list[str]
    texts: list[str]

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch with features and tokens on a device (copied in the background where memory is pinned).

        The lengths stay on the CPU, where the losses look at them.
        """
        return self._replace(
            features_BTF=self.features_BTF.to(device, non_blocking=True),
            tokens_BU=self.tokens_BU.to(device, non_blocking=True),
        )

    def __reduce__(self) -> tuple[Any, ...]:
        """What is small travels in the message of a worker: for each tensor, the receiver would open a connection."""
        features_BTF, *others = self
        return _batch_of, (features_BTF, *(x.numpy() if isinstance(x, torch.Tensor) else x for x in others))


def _batch_of(features_BTF: torch.Tensor, *others: Any) -> Batch:
    parts: list[Any] = [torch.from_numpy(x) if isinstance(x, np.ndarray) else x for x in others]
    return Batch(features_BTF, *parts)


class _Noise(NamedTuple):
    """A noise to be mixed into one utterance."""

    cut: Cut
    snr_db: float


class _Job(NamedTuple):
    """All that a worker needs to make one batch."""

    cuts: list[Cut]
    noises: list[_Noise | None]  # one per cut
    key: tuple[int, ...]  # seeds the augmentation
    least_frames: int = 0  # of features, to which the batch is padded


def load_features(cut: Cut) -> torch.Tensor:
    """features_TF of a cut: the stored ones, else computed from its audio.

    Raises:
        CutError: if they cannot be read.
    """
    with reading(cut):
        if cut.has_features:
            return torch.from_numpy(np.ascontiguousarray(cut.load_features(), dtype=np.float32))
        return torch.from_numpy(cut.compute_features(extractor=_fbank()))


@lru_cache(maxsize=1)
def _fbank() -> FeatureExtractor:
    return make_fbank()


def shape_frames(seconds: float) -> int:
    """Feature frames of a fixed shape for utterances of at most so many seconds."""
    encoder_frames = math.ceil(seconds * 1000 / ENCODER_FRAME_MS)
    return feature_frames(math.ceil(encoder_frames / SHAPE_FRAMES) * SHAPE_FRAMES)


def shape_tokens(tokens: int) -> int:
    """Tokens of a fixed shape for transcripts of at most so many."""
    return math.ceil((tokens + 1) / SHAPE_OUTPUTS) * SHAPE_OUTPUTS - 1


class _BatchMaker(torch.utils.data.Dataset):
    """Turns a job into a Batch; runs in the workers."""

    def __init__(self, tokenizer: Tokenizer, config: DataConfig | None) -> None:
        """Without a configuration, nothing is augmented."""
        self._tokenizer = tokenizer
        self._config = config

    def __getitem__(self, job: _Job) -> Batch:
        rng = np.random.default_rng(job.key)
        features = [self._features(*item, rng) for item in zip(job.cuts, job.noises, strict=True)]
        texts, ids = [text_of(cut) for cut in job.cuts], [cut.id for cut in job.cuts]
        if self._config is not None and rng.random() < self._config.join_probability:
            groups = draw_groups(len(ids), self._config.join_most, rng)
            pause = round(self._config.join_pause_s * 1000 / FRAME_SHIFT_MS)
            features = [join_utterances([features[i] for i in group], pause, rng) for group in groups]
            texts = [" ".join(texts[i] for i in group) for group in groups]
            ids = ["+".join(ids[i] for i in group) for group in groups]
        tokens = [torch.tensor(self._tokenizer.encode(text), dtype=torch.int64) for text in texts]
        tokens_BU = pad_sequence(tokens, batch_first=True, padding_value=0)
        extra = shape_tokens(tokens_BU.shape[1]) - tokens_BU.shape[1] if job.least_frames else 0
        features_BTF = pad_sequence(features, batch_first=True, padding_value=LOG_MEL_SILENCE)
        missing = max(0, max(job.least_frames, feature_frames(1)) - features_BTF.shape[1])
        return Batch(
            torch.nn.functional.pad(features_BTF, (0, 0, 0, missing), value=LOG_MEL_SILENCE),
            torch.tensor([len(features_TF) for features_TF in features]),
            torch.nn.functional.pad(tokens_BU, (0, extra)),
            torch.tensor([len(tokens_U) for tokens_U in tokens]),
            ids,
            texts,
        )

    def _features(self, cut: Cut, noise: _Noise | None, rng: np.random.Generator) -> torch.Tensor:
        features_TF = load_features(cut)
        if noise is not None:
            features_TF = add_noise(features_TF, load_features(noise.cut), noise.snr_db, rng)
        if self._config is not None:
            features_TF = spec_augment(features_TF, self._config.spec_augment, rng)
        return features_TF


class _TrainingJobs(torch.utils.data.Sampler):
    """The jobs of one epoch on one rank, from `start_batch` on; the earlier ones only cost their sampling."""

    def __init__(
        self,
        sampler: DynamicBucketingSampler,
        config: DataConfig,
        noise_cuts: CutSet | None,
        key: tuple[int, ...],
        start_batch: int,
        bounds_s: list[float],
    ) -> None:
        self._sampler = sampler
        self._bounds_s = bounds_s
        self._config = config
        self._noises = list(noise_cuts) if noise_cuts is not None else []
        self._key = key
        self._start_batch = start_batch

    def __iter__(self) -> Iterator[_Job]:
        for index, cuts in enumerate(self._sampler):
            if index < self._start_batch:
                continue
            rng = np.random.default_rng((*self._key, index, 0))
            noises = [self._draw_noise(rng) for _ in cuts]
            yield _Job(list(cuts), noises, (*self._key, index, 1), self._least_frames(list(cuts)))

    def _least_frames(self, cuts: list[Cut]) -> int:
        if not self._config.fixed_shapes:
            return 0
        longest_s = self._bounds_s[bisect_left(self._bounds_s, max(cut.duration for cut in cuts))]
        return shape_frames(longest_s)

    def _draw_noise(self, rng: np.random.Generator) -> _Noise | None:
        if not self._noises or rng.random() >= self._config.noise_probability:
            return None
        return _Noise(self._noises[rng.integers(len(self._noises))], rng.uniform(*self._config.noise_snr_db))


def train_batches(
    cuts: CutSet,
    config: DataConfig,
    tokenizer: Tokenizer,
    *,
    epoch: int,
    seed: int,
    start_batch: int = 0,
    rank: int = 0,
    world_size: int = 1,
    noise_cuts: CutSet | None = None,
) -> Iterator[Batch]:
    """The batches of one epoch, shuffled, bucketed by duration and augmented.

    Args:
        cuts: training cuts, best after `filter_cuts`; the same ones in the same order on every rank.
        config: batch size, buckets, augmentation, workers.
        tokenizer: makes the tokens.
        epoch, seed: another value of either gives another order and other augmentation; the order is that of their sum.
        start_batch: number of this rank's batches already used; they are skipped without being loaded.
        rank, world_size: every rank gets the same number of batches.
        noise_cuts: noises to mix in; none means no noise.

    Returns:
        An iterator. It does not touch the global random generators.
    """
    bins_s = _duration_bins(cuts, config.num_buckets)
    bounds_s: list[float] = []
    limit: dict[str, Any] = {"max_duration": config.max_duration_s}
    if config.fixed_shapes:
        bounds_s = [*bins_s, max(cut.duration for cut in cuts)]
        sizes = [max(1, int(config.max_duration_s / bound_s)) for bound_s in bounds_s]
        limit = {"constraint": FixedBucketBatchSizeConstraint(bounds_s, sizes)}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="You are using DynamicBucketingSampler with an eagerly")
        sampler = DynamicBucketingSampler(
            cuts,
            **limit,
            duration_bins=bins_s,
            shuffle=True,
            seed=seed,
            rank=rank,
            world_size=world_size,
        )
    sampler.set_epoch(epoch)
    jobs = _TrainingJobs(sampler, config, noise_cuts, (seed, epoch, rank), start_batch, bounds_s)
    return iter(_loader(jobs, _BatchMaker(tokenizer, config), config.num_workers))


def eval_batches(cuts: CutSet, tokenizer: Tokenizer, *, max_duration_s: float, num_workers: int = 0) -> Iterator[Batch]:
    """Every cut once, long ones first, in batches of at most `max_duration_s`.

    Nothing is random and nothing is left out: what the vocabulary lacks is encoded as `<unk>`, and an empty
    transcript gives no tokens.
    """
    ordered = cuts.to_eager().sort_by_duration(ascending=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="You are using DynamicCutSampler with an eagerly")
        sampler = DynamicCutSampler(ordered, max_duration=max_duration_s, shuffle=False, rank=0, world_size=1)
    jobs = [_Job(list(batch), [None] * len(batch), (0,)) for batch in sampler]
    return iter(_loader(jobs, _BatchMaker(tokenizer, None), num_workers))


def largest_joined(batch: Batch, config: DataConfig) -> Batch:
    """A batch of the longest utterances, joined to one that hardly any of training is larger than.

    Groups have sizes drawn evenly from 1 to M = `join_most`; all are padded to the longest, which is taken for a full
    one. Of B utterances there are 2B / (M + 1) groups on average, and three standard deviations more are taken.
    """
    pauses = round((config.join_most - 1) * config.join_pause_s * 1000 / FRAME_SHIFT_MS)
    count, mean = len(batch.ids), (config.join_most + 1) / 2
    spread = math.sqrt(count * (config.join_most**2 - 1) / 12 / mean**3)  # of a renewal process
    groups = min(count, math.ceil(count / mean + 3 * spread))
    features_GTF = batch.features_BTF[:groups].repeat(1, config.join_most, 1)
    return batch._replace(
        features_BTF=torch.nn.functional.pad(features_GTF, (0, 0, 0, pauses), value=LOG_MEL_SILENCE),
        feature_lens_B=batch.feature_lens_B[:groups] * config.join_most + pauses,
        tokens_BU=batch.tokens_BU[:groups].repeat(1, config.join_most),
        token_lens_B=batch.token_lens_B[:groups] * config.join_most,
        ids=batch.ids[:groups],
        texts=batch.texts[:groups],
    )


def _duration_bins(cuts: CutSet, num_buckets: int) -> list[float]:
    """Durations in s that separate the buckets; fewer than asked for where there are few cuts."""
    sample = list(islice(cuts, CUTS_TO_ESTIMATE_BUCKETS))
    num_buckets = min(num_buckets, len(sample))
    bins = estimate_duration_buckets(sample, num_buckets) if num_buckets > 1 else []
    return bins or [sample[0].duration]


def _start_worker(worker: int) -> None:
    """Leaves it to the training process to stop its workers: Ctrl-C reaches them, too, while it still needs them."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    # Python would end the thread that still sends a batch that nobody wants, which aborts the process with a message.
    atexit.register(os._exit, 0)


@lru_cache(maxsize=1)
def _end_workers_at_exit() -> None:
    """After an exception, Python waits at exit for daemon processes that it has sent SIGTERM, which workers ignore."""

    def end() -> None:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch would complain of workers that are killed
        for process in multiprocessing.active_children():
            process.kill()

    atexit.register(end)


def _loader(jobs: _TrainingJobs | list[_Job], maker: _BatchMaker, num_workers: int) -> torch.utils.data.DataLoader:
    if num_workers:
        _end_workers_at_exit()
    return torch.utils.data.DataLoader(
        maker,
        sampler=jobs,
        batch_size=None,
        num_workers=num_workers,
        multiprocessing_context="spawn" if num_workers else None,
        worker_init_fn=_start_worker,
        pin_memory=torch.cuda.is_available(),
        # Else the loader draws from the global generator, and training would not resume exactly.
        generator=torch.Generator(),
    )
