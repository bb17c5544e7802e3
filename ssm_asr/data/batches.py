"""Makes batches of padded features and tokens from lhotse cuts.

Shapes: B utterances, G groups of joined utterances, T feature frames (10 ms), F mel bins, U tokens.

A batch is a function of (cuts, config, tokenizer, seed, epoch, rank, world size, index) alone: the sampler in the
calling process decides which cuts it holds, and its augmentation draws from a generator that is seeded with these
numbers. So neither the number of workers nor what was loaded before can change it, and training resumes with
exactly the batches that an uninterrupted run would have seen.
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

import ssm_asr.data.shar  # noqa: F401  it registers the reader by which workers read features
from ssm_asr.data.augment import add_noise, draw_groups, join_utterances, spec_augment
from ssm_asr.data.config import DataConfig
from ssm_asr.data.features import make_fbank, reading
from ssm_asr.data.filtering import text_of
from ssm_asr.data.tokens import Tokenizer
from ssm_asr.units import ENCODER_FRAME_MS, FRAME_SHIFT_MS, LOG_MEL_SILENCE, feature_frames

CUTS_TO_ESTIMATE_BUCKETS = 10000
# Fixed shapes have a multiple of this many encoder frames (50 Hz) and of this many predictor outputs (one more than
# there are tokens), since GPUs multiply matrices of these sizes faster than others.
SHAPE_FRAMES = 16
SHAPE_OUTPUTS = 16


class Batch(NamedTuple):
    """A batch holds utterances, padded at their ends.

    Attributes:
        features_BTF: float32, padded with LOG_MEL_SILENCE.
        feature_lens_B: int64, in frames.
        tokens_BU: int64, padded with 0.
        token_lens_B: int64.
        ids, texts: the ids and the transcripts of the utterances.
    """

    features_BTF: torch.Tensor
    feature_lens_B: torch.Tensor
    tokens_BU: torch.Tensor
    token_lens_B: torch.Tensor
    ids: list[str]
    texts: list[str]

    def to(self, device: torch.device | str) -> "Batch":
        """Returns the batch with features and tokens on a device; pinned memory is copied in the background.

        The lengths stay on the CPU, where the losses need them.
        """
        return self._replace(
            features_BTF=self.features_BTF.to(device, non_blocking=True),
            tokens_BU=self.tokens_BU.to(device, non_blocking=True),
        )

    def __reduce__(self) -> tuple[Any, ...]:
        """Sends all but the features as numpy arrays, since the receiver opens a connection for each tensor."""
        features_BTF, *others = self
        return _batch_of, (features_BTF, *(x.numpy() if isinstance(x, torch.Tensor) else x for x in others))


def _batch_of(features_BTF: torch.Tensor, *others: Any) -> Batch:
    parts: list[Any] = [torch.from_numpy(x) if isinstance(x, np.ndarray) else x for x in others]
    return Batch(features_BTF, *parts)


class _Noise(NamedTuple):
    """This noise is to be mixed into one utterance."""

    cut: Cut
    snr_db: float


class _Job(NamedTuple):
    """A job holds all that a worker needs to make one batch.

    Attributes:
        cuts: the utterances.
        noises: one for each cut.
        key: the seed of the augmentation.
        least_frames: the batch is padded to at least this many feature frames.
    """

    cuts: list[Cut]
    noises: list[_Noise | None]
    key: tuple[int, ...]
    least_frames: int = 0


def load_features(cut: Cut) -> torch.Tensor:
    """Returns features_TF of a cut: the stored ones if there are any, else they are computed from its audio.

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
    """Returns the feature frames of the fixed shape that holds utterances of up to this many seconds."""
    encoder_frames = math.ceil(seconds * 1000 / ENCODER_FRAME_MS)
    return feature_frames(math.ceil(encoder_frames / SHAPE_FRAMES) * SHAPE_FRAMES)


def shape_tokens(tokens: int) -> int:
    """Returns the number of tokens of the fixed shape that holds transcripts of up to this many."""
    return math.ceil((tokens + 1) / SHAPE_OUTPUTS) * SHAPE_OUTPUTS - 1


class _BatchMaker(torch.utils.data.Dataset):
    """Turns jobs into batches; it runs in the workers. Without a configuration, it augments nothing."""

    def __init__(self, tokenizer: Tokenizer, config: DataConfig | None) -> None:
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
    """Gives the jobs of one epoch on one rank, from `start_batch` on; earlier ones are sampled but not made."""

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
    """Yields the batches of one epoch, shuffled, bucketed by duration and augmented.

    The global random generators are not used.

    Args:
        cuts: training cuts, best after `filter_cuts`; equal and in equal order on every rank.
        config: batch size, buckets, augmentation and workers.
        tokenizer: makes the tokens.
        epoch, seed: another value of either gives other augmentation; the order of the cuts depends on their sum.
        start_batch: number of this rank's batches that were used before; they are skipped without being loaded.
        rank, world_size: which process of how many this is; each gets an equal number of batches.
        noise_cuts: noises to mix in; without them, no noise is mixed in.
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
    """Yields every cut once, long ones first, in batches of at most `max_duration_s` seconds of audio.

    Nothing is random and nothing is left out: what the vocabulary lacks is encoded as `<unk>`, and an empty
    transcript has no tokens.
    """
    ordered = cuts.to_eager().sort_by_duration(ascending=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="You are using DynamicCutSampler with an eagerly")
        sampler = DynamicCutSampler(ordered, max_duration=max_duration_s, shuffle=False, rank=0, world_size=1)
    jobs = [_Job(list(batch), [None] * len(batch), (0,)) for batch in sampler]
    return iter(_loader(jobs, _BatchMaker(tokenizer, None), num_workers))


def largest_joined(batch: Batch, config: DataConfig) -> Batch:
    """Returns a joined batch that is larger than nearly all of training, from a batch of the longest utterances.

    Groups have sizes drawn evenly from 1 to M = `join_most`, and all are padded to the longest, which is assumed to
    be a group of M. B utterances make 2B / (M + 1) groups on average; the batch has three standard deviations more.
    """
    pauses = round((config.join_most - 1) * config.join_pause_s * 1000 / FRAME_SHIFT_MS)
    count, mean = len(batch.ids), (config.join_most + 1) / 2
    # Group sizes are the intervals of a renewal process, whose count has this standard deviation.
    spread = math.sqrt(count * (config.join_most**2 - 1) / 12 / mean**3)
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
    """Returns the durations in s that separate the buckets; few cuts have fewer buckets than asked for."""
    sample = list(islice(cuts, CUTS_TO_ESTIMATE_BUCKETS))
    num_buckets = min(num_buckets, len(sample))
    bins = estimate_duration_buckets(sample, num_buckets) if num_buckets > 1 else []
    return bins or [sample[0].duration]


def _start_worker(worker: int) -> None:
    """Lets a worker ignore signals: Ctrl-C reaches it too, while the training process, which stops it, needs it."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    # Python would end a thread that is still sending a batch, which aborts the process with a message.
    atexit.register(os._exit, 0)


@lru_cache(maxsize=1)
def _end_workers_at_exit() -> None:
    """Kills the workers at exit: after an exception, Python sends them SIGTERM, which they ignore, and waits."""

    def end() -> None:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # else PyTorch complains of workers that are killed
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
        # Without it the loader draws from the global generator, and training would not resume exactly.
        generator=torch.Generator(),
    )
