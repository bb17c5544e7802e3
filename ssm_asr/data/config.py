"""Settings of the data side; part of an experiment's configuration."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class SpecAugmentConfig:
    """SpecAugment (Park et al. 2019, arXiv 1904.08779): time warping, frequency masks and time masks."""

    probability: float = 0.9  # of augmenting an utterance; 0 switches all of it off
    time_warp_frames: int = 80  # largest shift; utterances up to twice as long are not warped; 0: off
    num_freq_masks: int = 2
    freq_mask_bins: int = 27  # widest frequency mask
    num_time_masks: int = 10
    time_mask_frames: int = 100  # longest time mask
    max_time_masked: float = 0.15  # largest part of an utterance that its time masks may cover


@dataclass(frozen=True)
class DataConfig:
    """How training batches are made.

    Whether features are stored or computed on the fly, and whether there are speed-perturbed copies, is a
    property of the cuts (`python -m ssm_asr.prepare features`), so it is no setting here.
    """

    max_duration_s: float = 600.0  # speech per batch and device
    num_buckets: int = 30  # batches hold utterances of similar duration, from one of so many buckets
    # All batches of a bucket have one shape: as many utterances as fit if all were the longest, padded to its length;
    # tokens are padded to one less than a multiple of 16.
    fixed_shapes: bool = False
    min_utterance_s: float = 0.3  # shorter utterances are left out
    max_utterance_s: float = 20.0  # longer utterances are left out
    spec_augment: SpecAugmentConfig = field(default_factory=SpecAugmentConfig)
    noise_probability: float = 0.5  # of mixing noise into an utterance, where noise cuts are given
    noise_snr_db: tuple[float, float] = (10.0, 20.0)  # drawn evenly from this range
    # Models that carry their state for hours must have seen more than single utterances: in some batches, random
    # numbers of utterances are joined end to end, with pauses of the first one's quietest sound between them.
    join_probability: float = 0.0  # of a batch to be joined
    join_most: int = 10  # utterances in one
    join_pause_s: float = 2.0  # longest pause; drawn evenly from 0 to it
    num_workers: int = 2  # processes that load batches; 0: the training process loads them itself
