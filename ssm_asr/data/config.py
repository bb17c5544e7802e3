"""The sections `data` and `data.spec_augment` of an experiment's configuration."""

from dataclasses import dataclass, field

from ssm_asr.fields import Section, setting

MOST_FRAMES = 100_000  # of features, more than a quarter of an hour


@dataclass(frozen=True)
class SpecAugmentConfig(Section, name="data.spec_augment"):
    """SpecAugment (Park et al. 2019, arXiv 1904.08779) warps time, and masks frequencies and stretches of time."""

    # An utterance is augmented with this probability; 0 switches all of it off.
    probability: float = setting(0.9, least=0, most=1)
    # Warping shifts a frame by at most so many, and spares utterances up to twice as long; 0 switches it off.
    time_warp_frames: int = setting(80, least=0, most=MOST_FRAMES)
    num_freq_masks: int = setting(2, least=0, most=1000)
    # A frequency mask is at most so wide.
    freq_mask_bins: int = setting(27, least=1, most=1000)
    num_time_masks: int = setting(10, least=0, most=1000)
    # A time mask is at most so long.
    time_mask_frames: int = setting(100, least=1, most=MOST_FRAMES)
    # The time masks of an utterance cover at most this share of it.
    max_time_masked: float = setting(0.15, least=0, most=1)


@dataclass(frozen=True)
class DataConfig(Section, name="data"):
    """These settings say how training batches are made.

    Whether features are stored or computed on the fly, and whether there are speed-perturbed copies, is a
    property of the cuts (`python -m ssm_asr.prepare features`), so it is no setting here.
    """

    # A batch holds so much speech on each device.
    max_duration_s: float = setting(600.0, above=0, most=100_000)
    # The utterances of a batch have similar durations: they come from one of so many buckets.
    num_buckets: int = setting(30, least=1, most=10_000)
    # All batches of a bucket get one shape: they hold as many utterances as fit if all were the longest, and are padded
    # to its length; tokens are padded to one less than a multiple of 16. Captured graphs need this (train.fast).
    fixed_shapes: bool = False
    # Shorter and longer utterances are left out.
    min_utterance_s: float = setting(0.3, least=0, most=100_000)
    max_utterance_s: float = setting(20.0, above=0, most=100_000)
    spec_augment: SpecAugmentConfig = field(default_factory=SpecAugmentConfig)
    # Where noise cuts are given, noise is mixed into an utterance with this probability, at a ratio from this range.
    noise_probability: float = setting(0.5, least=0, most=1)
    noise_snr_db: tuple[float, float] = setting((10.0, 20.0), least=-100, most=100)
    # A model that carries its state for hours must have seen more than single utterances. With this probability, the
    # utterances of a batch are joined end to end, a random number of them at a time. The pauses between them are of the
    # first one's quietest sound and last up to join_pause_s.
    join_probability: float = setting(0.0, least=0, most=1)
    join_most: int = setting(10, least=1, most=10_000)
    join_pause_s: float = setting(2.0, least=0, most=3600)
    # So many processes load batches; with 0, the training process loads them itself.
    num_workers: int = setting(2, least=0, most=1000)

    def __post_init__(self) -> None:
        super().__post_init__()
        in_order = self.min_utterance_s <= self.max_utterance_s
        self.require(in_order, "min_utterance_s", f"at most data.max_utterance_s, {self.max_utterance_s}")
