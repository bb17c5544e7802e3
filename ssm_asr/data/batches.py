"""Makes batches of padded features and tokens from lhotse cuts, on the device that uses them.

Shapes: B utterances, G groups of joined utterances, T feature frames (10 ms), F mel bins, U tokens.

Workers read samples, or stored features, and draw what augmentation does to them; the device computes features and
augments them, many utterances at once. Where the device is the CPU, workers do that, too.

A batch is a function of (cuts, config, tokenizer, seed, epoch, rank, world size, index) alone: the sampler in the
calling process decides which cuts it holds, and its augmentation is drawn from a generator that is seeded with these
numbers. So neither the number of workers nor what was loaded before can change it, and training resumes with
exactly the batches that an uninterrupted run would have seen.
"""

import atexit
import math
import multiprocessing
import os
import signal
import threading
import warnings
from bisect import bisect_left
from collections.abc import Callable, Generator, Iterable, Iterator
from functools import lru_cache
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from lhotse import CutSet
from lhotse.cut import Cut
from lhotse.dataset import DynamicBucketingSampler, DynamicCutSampler
from lhotse.dataset.sampling.dynamic_bucketing import FixedBucketBatchSizeConstraint, estimate_duration_buckets

from ssm_asr.data.augment import augment, within
from ssm_asr.data.config import DataConfig
from ssm_asr.data.errors import CutError
from ssm_asr.data.loading import Audio, Job, Loader, NoiseDraw, RawBatch, audio_features, map_parts
from ssm_asr.data.parallel import forking
from ssm_asr.data.tokens import Tokenizer
from ssm_asr.units import ENCODER_FRAME_MS, FRAME_SHIFT_MS, LOG_MEL_SILENCE, feature_frames

CUTS_TO_ESTIMATE_BUCKETS = 10000
# Fixed shapes have a multiple of this many encoder frames (50 Hz) and of this many predictor outputs (one more than
# there are tokens), since GPUs multiply matrices of these sizes faster than others.
SHAPE_FRAMES = 16
SHAPE_OUTPUTS = 16
CPU = torch.device("cpu")


class Batch(NamedTuple):
    """A batch holds utterances, padded at their ends.

    Attributes:
        features_BTF: float32, padded with LOG_MEL_SILENCE.
        feature_lens_B: int64, in frames; on the CPU, where the losses need it.
        tokens_BU: int64, padded with 0.
        token_lens_B: int64, on the CPU.
        ids, texts: the ids and the transcripts of the utterances.
    """

    features_BTF: torch.Tensor
    feature_lens_B: torch.Tensor
    tokens_BU: torch.Tensor
    token_lens_B: torch.Tensor
    ids: list[str]
    texts: list[str]

    def to(self, device: torch.device | str) -> "Batch":
        """Returns the batch with features and tokens on a device; pinned memory is copied in the background."""
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


def shape_frames(seconds: float) -> int:
    """Returns the feature frames of the fixed shape that holds utterances of up to this many seconds."""
    encoder_frames = math.ceil(seconds * 1000 / ENCODER_FRAME_MS)
    return feature_frames(math.ceil(encoder_frames / SHAPE_FRAMES) * SHAPE_FRAMES)


def shape_tokens(tokens: int) -> int:
    """Returns the number of tokens of the fixed shape that holds transcripts of up to this many."""
    return math.ceil((tokens + 1) / SHAPE_OUTPUTS) * SHAPE_OUTPUTS - 1


@torch.no_grad()
def finish(raw: RawBatch, device: torch.device) -> Batch:
    """Computes the features of a batch and augments them, on the device; the host does not wait for it."""
    on_device: RawBatch = map_parts(
        raw, lambda value: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
    )
    sound = on_device.sound
    features_BTF = audio_features(sound) if isinstance(sound, Audio) else sound
    lens_B, on_device_lens_B = raw.frames_B, on_device.frames_B
    if raw.augmentation is not None and on_device.augmentation is not None:
        features_BTF, on_device_lens_B = augment(features_BTF, on_device_lens_B, on_device.augmentation)
        if raw.augmentation.joining is not None:
            lens_B = raw.augmentation.joining.frames_G
    longest = max(int(lens_B.max()), raw.least_frames, feature_frames(1))
    features_BTF = torch.nn.functional.pad(features_BTF, (0, 0, 0, longest - features_BTF.shape[1]))
    outside_BT1 = ~within(on_device_lens_B, longest)[:, :, None]
    tokens_BU = on_device.tokens_BU
    extra = shape_tokens(tokens_BU.shape[1]) - tokens_BU.shape[1] if raw.least_frames else 0
    return Batch(
        features_BTF.masked_fill(outside_BT1, LOG_MEL_SILENCE),
        lens_B,
        torch.nn.functional.pad(tokens_BU, (0, extra)),
        raw.token_lens_B,
        raw.ids,
        raw.texts,
    )


class TrainingJobs:
    """Decides which utterances are in which training batch of one process.

    Args:
        cuts: training cuts, best after `filter_cuts`; equal and in equal order on every rank.
        config: batch size, buckets, augmentation.
        num_noises: number of noises to draw from.
        seed: another value gives other batches.
        rank, world_size: which process of how many this is; each gets an equal number of batches.
    """

    def __init__(
        self, cuts: CutSet, config: DataConfig, num_noises: int, *, seed: int, rank: int = 0, world_size: int = 1
    ) -> None:
        self._cuts, self._config, self._num_noises = cuts, config, num_noises
        self._seed, self._rank, self._world_size = seed, rank, world_size
        self._bins_s = _duration_bins(cuts, config.num_buckets, config.fixed_shapes)
        self._bounds_s: list[float] = []
        self._sizes: list[int] = []
        self._limit: dict[str, Any] = {"max_duration": config.max_duration_s}
        if config.fixed_shapes:
            self._bounds_s = [*self._bins_s, max(cut.duration for cut in cuts)]
            self._sizes = [max(1, int(config.max_duration_s / bound_s)) for bound_s in self._bounds_s]
            self._limit = {"constraint": FixedBucketBatchSizeConstraint(self._bounds_s, self._sizes)}

    def shapes(self) -> list[tuple[int, int]]:
        """Returns the fixed shapes, short utterances first: numbers of utterances, and of feature frames."""
        return [(size, shape_frames(bound_s)) for size, bound_s in zip(self._sizes, self._bounds_s, strict=True)]

    def largest(self) -> Job:
        """Returns a job without augmentation that hardly any other job exceeds."""
        count = self._sizes[-1] if self._sizes else math.ceil(self._config.max_duration_s)  # of at least 1 s
        longest = CutSet.from_cuts(sorted(self._cuts, key=lambda cut: cut.duration)[-count:])
        if not self._sizes:
            return eval_jobs(longest, self._config.max_duration_s)[0]
        return Job(list(longest), [None] * len(longest), (0,), False, self.shapes()[-1][1])

    def of_epoch(self, epoch: int, start_batch: int = 0) -> Iterator[Job]:
        """Yields the jobs of an epoch from `start_batch` on; earlier ones are sampled but not made."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="You are using DynamicBucketingSampler with an eagerly")
            sampler = DynamicBucketingSampler(
                self._cuts,
                **self._limit,
                duration_bins=self._bins_s,
                shuffle=True,
                seed=self._seed,
                rank=self._rank,
                world_size=self._world_size,
            )
        sampler.set_epoch(epoch)
        for index, batch in enumerate(sampler):
            if index >= start_batch:
                cuts, key = list(batch), (self._seed, epoch, self._rank, index)
                rng = np.random.default_rng((*key, 0))
                noises = [self._draw_noise(rng) for _ in cuts]
                yield Job(cuts, noises, (*key, 1), True, self._least_frames(cuts))

    def _least_frames(self, cuts: list[Cut]) -> int:
        if not self._config.fixed_shapes:
            return 0
        longest_s = self._bounds_s[bisect_left(self._bounds_s, max(cut.duration for cut in cuts))]
        return shape_frames(longest_s)

    def _draw_noise(self, rng: np.random.Generator) -> NoiseDraw | None:
        if not self._num_noises or rng.random() >= self._config.noise_probability:
            return None
        return NoiseDraw(int(rng.integers(self._num_noises)), rng.uniform(*self._config.noise_snr_db))


def eval_jobs(cuts: CutSet, max_duration_s: float) -> list[Job]:
    """Returns jobs that hold every cut once, long ones first, with at most `max_duration_s` seconds of audio each."""
    ordered = cuts.to_eager().sort_by_duration(ascending=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="You are using DynamicCutSampler with an eagerly")
        sampler = DynamicCutSampler(ordered, max_duration=max_duration_s, shuffle=False, rank=0, world_size=1)
    return [Job(list(batch), [None] * len(batch), (0,), augmented=False) for batch in sampler]


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
    device: torch.device = CPU,
) -> Iterator[Batch]:
    """Yields the batches of one epoch, shuffled, bucketed by duration and augmented.

    The global random generators are not used.

    Args:
        cuts, rank, world_size: as for `TrainingJobs`.
        config: batch size, buckets, augmentation and workers.
        tokenizer: makes the tokens.
        epoch, seed: another value of either gives other augmentation; the order of the cuts depends on their sum.
        start_batch: number of this rank's batches that were used before; they are skipped without being loaded.
        noise_cuts: noises to mix in; without them, no noise is mixed in.
        device: where features are computed and augmented, and the batches are.
    """
    noises = list(noise_cuts or ())
    jobs = TrainingJobs(cuts, config, len(noises), seed=seed, rank=rank, world_size=world_size)
    loader = Loader(tokenizer, config, noises)
    return load_batches(lambda: jobs.of_epoch(epoch, start_batch), loader, config.num_workers, device)


def eval_batches(
    cuts: CutSet,
    tokenizer: Tokenizer,
    *,
    max_duration_s: float,
    num_workers: int = 0,
    device: torch.device = CPU,
    on_fault: Callable[[str], None] | None = None,
) -> Iterator[Batch]:
    """Yields every cut once, long ones first, in batches of at most `max_duration_s` seconds of audio.

    Nothing is random and nothing is left out: what the vocabulary lacks is encoded as `<unk>`, and an empty
    transcript has no tokens.

    Args:
        on_fault: is called with what is wrong with a cut that cannot be read, and the others go on.

    Raises:
        CutError: for the first cut that cannot be read, without `on_fault`.
    """
    jobs = eval_jobs(cuts, max_duration_s)
    return load_batches(lambda: jobs, Loader(tokenizer, DataConfig(), []), num_workers, device, on_fault)


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


def _duration_bins(cuts: CutSet, num_buckets: int, fixed_shapes: bool) -> list[float]:
    """Returns the durations in s that separate the buckets; few cuts have fewer buckets than asked for."""
    sample = list(islice(cuts, CUTS_TO_ESTIMATE_BUCKETS))
    num_buckets = min(num_buckets, len(sample))
    if fixed_shapes:
        bins = _least_padding([cut.duration for cut in sample], num_buckets)
    else:
        bins = estimate_duration_buckets(sample, num_buckets) if num_buckets > 1 else []
    return bins or [sample[0].duration]


def _least_padding(durations_s: list[float], num_buckets: int) -> list[float]:
    """Returns the bounds between buckets with which padding to fixed shapes, which have the upper bounds, is least.

    Bounds are whole steps of the shapes. There are fewer of them if all durations are in fewer steps.
    """
    step_s = SHAPE_FRAMES * ENCODER_FRAME_MS / 1000
    bounds, counts = np.unique(np.ceil(np.array(durations_s) / step_s), return_counts=True)
    below_N = np.concatenate([[0], np.cumsum(counts)])  # utterances below the n-th bound
    # Steps that a bucket takes of the utterances between bounds m and n, and that the best k buckets take up to n.
    bucket_NM = np.tril((below_N[:, None] - below_N) * np.concatenate([[0], bounds])[:, None], -1)
    bucket_NM[np.triu_indices(len(below_N))] = np.inf
    best_N = np.where(np.arange(len(below_N)) == 0, 0.0, np.inf)
    starts = []  # for each number of buckets and n, the bound where the last bucket starts
    for _ in range(min(num_buckets, len(bounds))):
        starts.append((best_N + bucket_NM).argmin(axis=1))
        best_N = (best_N + bucket_NM).min(axis=1)
    bins: list[float] = []
    end = len(bounds)
    for start_N in starts[:0:-1]:
        end = start_N[end]
        bins.insert(0, float(bounds[end - 1] * step_s))
    return bins


class _Jobs(torch.utils.data.Sampler):
    """Gives jobs in the order in which a function yields them."""

    def __init__(self, make: Callable[[], Iterable[Job]]) -> None:
        self._make = make

    def __iter__(self) -> Iterator[Job]:
        return iter(self._make())


class _BatchMaker(torch.utils.data.Dataset):
    """Turns jobs into raw batches, or into finished ones if these are to be on the CPU; it runs in the workers.

    It returns None for a batch without cuts that can be read, and what is wrong with those that cannot.
    """

    def __init__(self, loader: Loader, finished: bool, spares: bool) -> None:
        self._loader, self._finished, self._spares = loader, finished, spares

    def __getitem__(self, job: Job) -> tuple[RawBatch | Batch | None, list[str]]:
        raw: RawBatch | None
        faults: list[str] = []
        try:
            raw = self._loader.load(job)
        except CutError:
            if not self._spares:
                raise
            raw, faults = self._loader.load_readable(job)
        return finish(raw, CPU) if self._finished and raw is not None else raw, faults


def load_batches(
    jobs: Callable[[], Iterable[Job]],
    loader: Loader,
    num_workers: int,
    device: torch.device,
    on_fault: Callable[[str], None] | None = None,
) -> Generator[Batch, None, None]:
    """Yields the batches of jobs, in order; workers start at once, and load ahead.

    Args:
        jobs: is called once.
        loader: is copied to each worker.
        num_workers: number of processes that load; with 0, the calling one does.
        device: where the batches are.
        on_fault: as for `eval_batches`; of jobs without augmentation only.
    """
    if num_workers:
        _end_workers_at_exit()
    loaded = torch.utils.data.DataLoader(
        _BatchMaker(loader, finished=device.type == "cpu", spares=on_fault is not None),
        sampler=_Jobs(jobs),
        batch_size=None,
        num_workers=num_workers,
        multiprocessing_context=forking(__name__) if num_workers else None,
        worker_init_fn=_start_worker,
        pin_memory=device.type == "cuda",
        # Without it the loader draws from the global generator, and training would not resume exactly.
        generator=torch.Generator(),
    )
    return _finished(iter(loaded), device, on_fault)


def _finished(
    loaded: Iterator[tuple[RawBatch | Batch | None, list[str]]],
    device: torch.device,
    on_fault: Callable[[str], None] | None,
) -> Generator[Batch, None, None]:
    for batch, faults in loaded:
        for fault in faults:
            assert on_fault is not None, "faults are spared for it only"
            on_fault(fault)
        if batch is not None:
            yield batch if isinstance(batch, Batch) else finish(batch, device)


def _start_worker(worker: int) -> None:
    """Lets a worker ignore signals: Ctrl-C reaches it too, while the training process, which stops it, needs it.

    It ends when the training process has ended in any way. PyTorch watches only the server that it was forked from,
    which goes on as long as there are workers.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # Python would end a thread that is still sending a batch, which aborts the process with a message.
    atexit.register(os._exit, 0)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


@lru_cache(maxsize=1)
def _end_workers_at_exit() -> None:
    """Kills the workers at exit: after an exception, Python sends them SIGTERM, which they ignore, and waits."""

    def end() -> None:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # else PyTorch complains of workers that are killed
        for process in multiprocessing.active_children():
            process.kill()

    atexit.register(end)
