"""One experiment, whole: model, tokens, data, optimiser, training and decoding, as dataclasses.

A YAML file names only what differs from the defaults, or from the file that it calls its `base`; `--set a.b=value`
changes single fields; the result is saved in the experiment directory and in every checkpoint.
"""

import contextlib
import dataclasses
import difflib
import sys
import types
import typing
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ssm_asr.data.config import DataConfig
from ssm_asr.transducer.model import ModelConfig


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the field, the value and the remedy."""


POSITIVE = (
    *("tokens.vocab_size", "data.max_duration_s", "data.num_buckets", "data.join_most"),
    *("data.spec_augment.freq_mask_bins", "data.spec_augment.time_mask_frames"),
    *("optim.base_lr", "optim.lr_batches", "optim.lr_epochs"),
    *("train.num_epochs", "train.schedule_speed", "train.average_period", "train.log_every"),
    *("train.validate_every", "train.checkpoint_every", "train.keep_checkpoints"),
    *("decode.average_epochs", "decode.beam"),
)
NOT_NEGATIVE = (
    *("data.num_workers", "data.join_pause_s", "train.seed", "data.spec_augment.time_warp_frames"),
    *("data.spec_augment.num_freq_masks", "data.spec_augment.num_time_masks"),
)
SHARES = (
    *("data.noise_probability", "data.join_probability"),
    *("data.spec_augment.probability", "data.spec_augment.max_time_masked"),
)
TYPE_NAMES = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}


@dataclass
class TokensConfig:
    """The token inventory, trained from the training transcripts."""

    kind: str = "bpe"  # bpe, unigram, word (sentencepiece) or char
    vocab_size: int = 500  # of bpe and unigram; word and char take all there are


@dataclass
class OptimConfig:
    """ScaledAdam and Eden."""

    base_lr: float = 0.045
    lr_batches: float = 7500.0
    lr_epochs: float = 3.5
    warmup_batches: int = 500
    clipping_scale: float = 2.0
    ssm_lr_scale: float = 0.1  # of the few parameters that set the dynamics of state-space models


@dataclass
class WeightNoiseConfig:
    """How much noise, from when on, and on which weights. Common: 0.075 on the predictor, once training is stable."""

    deviation: float = 0.0  # of the noise, the same for all weights; 0: off
    from_batch: int = 0  # batches trained before it begins
    # Whose weights: the parts of the model, or any beginnings of parameter names. The predictor is named "decoder".
    parts: tuple[str, ...] = ("decoder",)

    def __post_init__(self) -> None:
        for name, value in (("deviation", self.deviation), ("from_batch", self.from_batch)):
            if value < 0:
                raise ValueError(f"train.weight_noise.{name} is {value}; give 0 or more")

    def deviation_at(self, batch: int) -> float:
        """That of the next batch, after so many."""
        return self.deviation if batch >= self.from_batch else 0.0


@dataclass
class TrainConfig:
    """The training loop."""

    num_epochs: int = 30
    seed: int = 42
    precision: str = "float32"  # float32, bf16 or fp16 (autocast)
    # On a GPU: capture the passes of encoder and losses once for every shape of batch, which wants data.fixed_shapes.
    cuda_graphs: bool = False
    # The regularisers' schedules are in batches of 600 s. A short run goes through them faster by this factor.
    schedule_speed: float = 1.0
    loss_warmup_batches: int = 2000  # over which simple_scale goes 1 -> simple_scale and the pruned scale .1 -> 1
    simple_scale: float = 0.5
    ctc_scale: float = 0.2  # with model.ctc
    weight_noise: WeightNoiseConfig = field(default_factory=WeightNoiseConfig)
    average_period: int = 200  # batches between updates of the running mean of the weights
    log_every: int = 50  # batches
    validate_every: int = 3000  # batches; also at the end of every epoch
    checkpoint_every: int = 4000  # batches
    keep_checkpoints: int = 5


@dataclass
class DecodeConfig:
    """Which epochs are averaged, and how the result is decoded by default."""

    average_epochs: int = 10  # the last so many epochs
    chunk_frames: int = 32  # of 20 ms
    left_context_frames: int = 128
    method: str = "greedy"  # greedy or beam
    beam: int = 4


@dataclass
class Experiment:
    """A configuration file."""

    model: ModelConfig = field(default_factory=ModelConfig)
    tokens: TokensConfig = field(default_factory=TokensConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    decode: DecodeConfig = field(default_factory=DecodeConfig)

    def __post_init__(self) -> None:
        for name, value, choices in (
            ("tokens.kind", self.tokens.kind, ("bpe", "unigram", "word", "char")),
            ("train.precision", self.train.precision, ("float32", "bf16", "fp16")),
            ("decode.method", self.decode.method, ("greedy", "beam")),
            ("model.rnnt_type", self.model.rnnt_type, ("regular", "modified", "constrained")),
        ):
            if value not in choices:
                raise ConfigError(f"{name} is {value!r}; give one of {', '.join(choices)}")
        checks: tuple[tuple[tuple[str, ...], float, float, str], ...] = (
            (POSITIVE, sys.float_info.min, sys.float_info.max, "a positive number"),
            (NOT_NEGATIVE, 0.0, sys.float_info.max, "0 or more"),
            (SHARES, 0.0, 1.0, "a number from 0 to 1"),
        )
        for names, least, most, remedy in checks:
            for name in names:
                number: Any = self
                for part in name.split("."):
                    number = getattr(number, part)
                if not least <= number <= most:  # NaN is not, either
                    raise ConfigError(f"{name} is {number}; give {remedy}")


def load_experiment(path: str | Path, overrides: typing.Sequence[str] = ()) -> Experiment:
    """Reads a YAML file and applies `a.b=value` overrides (values in YAML).

    Raises:
        ConfigError: for a missing file, an unknown field or a value of the wrong type.
    """
    tree = _read(Path(path), ())
    for override in overrides:
        _override(tree, override)
    try:
        return from_dict(tree)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def _read(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    """The tree of a file, laid over that of its base, whose path is relative to the file."""
    if path.resolve() in seen:
        raise ConfigError(f"{path}: is its own base")
    try:
        tree = _parse(path.read_text(encoding="utf-8"), str(path)) or {}
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such configuration file") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not a text file in UTF-8") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: a mapping of sections is expected, such as 'model:' and 'train:'")
    base = tree.pop("base", None)
    if base is None:
        return tree
    if not isinstance(base, str):
        raise ConfigError(f"{path}: base is {base!r}; give the name of a configuration file")
    return _overlay(_read(path.parent / base, (*seen, path.resolve())), tree)


def _overlay(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`under` with what `over` says, section by section; a section of another kind shares no fields, and replaces."""
    if "kind" in over and over["kind"] != under.get("kind"):
        return over
    merged = dict(under)
    for key, value in over.items():
        below = under.get(key)
        merged[key] = _overlay(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged


def from_dict(tree: dict[str, Any]) -> Experiment:
    """An experiment from nested dictionaries, as in YAML or in a checkpoint."""
    return _build(Experiment, tree, "")


def to_dict(experiment: Experiment) -> dict[str, Any]:
    """Nested dictionaries of plain values; the inverse of from_dict."""
    return _plain(dataclasses.asdict(experiment))


def to_yaml(experiment: Experiment) -> str:
    """The whole experiment, every default written out."""
    return yaml.safe_dump(to_dict(experiment), sort_keys=False, default_flow_style=None, width=110)


def _override(tree: dict[str, Any], override: str) -> None:
    name, equals, value = override.partition("=")
    if not equals:
        raise ConfigError(f"--set {override}: give name=value, for example train.num_epochs=10")
    *sections, last = name.strip().split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"--set {override}: {section} is a value, not a section")
    tree[last] = _parse(value, f"--set {override}")


class _Loader(yaml.SafeLoader):
    """Refuses what is there twice, of which the last would count."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        twice = next((key for key, count in keys.items() if count > 1), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(None, None, f"{twice!r} is there twice", node.start_mark)
        return super().construct_mapping(node, deep)


def _parse(text: str, source: str) -> Any:
    try:
        return yaml.load(text, _Loader)  # makes plain values only, as its base does
    except yaml.YAMLError as error:
        raise ConfigError(f"{source}: not YAML: {' '.join(str(error).split())}") from None


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def _build(cls: Any, tree: Any, name: str) -> Any:
    if not isinstance(tree, dict):
        raise ConfigError(f"{name} is {tree!r}; a section with fields is expected")
    hints = typing.get_type_hints(cls)
    values = {}
    for key, value in tree.items():
        full = f"{name}.{key}" if name else str(key)
        if key not in hints:
            near = difflib.get_close_matches(str(key), list(hints), 1)
            raise ConfigError(f"{full}: no such field" + (f"; did you mean {near[0]}?" if near else ""))
        values[key] = _convert(hints[key], value, full)
    try:
        return cls(**values)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _of_kind(classes: tuple[Any, ...], tree: Any, name: str) -> Any:
    """The dataclass whose `kind` a section names, by default the first."""
    kinds = {cls.kind: cls for cls in classes}
    kind = tree.get("kind", classes[0].kind) if isinstance(tree, dict) else classes[0].kind
    if kind not in kinds:
        raise ConfigError(f"{name}.kind is {kind!r}; give one of {', '.join(kinds)}")
    return kinds[kind]


def _convert(hint: Any, value: Any, name: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return _build(_of_kind(arguments, value, name), value, name)
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, name)
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{name} is {value!r}; give a list")
        if arguments[-1] is not Ellipsis and len(value) != len(arguments):
            raise ConfigError(f"{name} has {len(value)} entries; give {len(arguments)}")
        return tuple(_convert(arguments[0], item, f"{name}[{i}]") for i, item in enumerate(value))
    if hint is float and type(value) in (int, str):  # a number without a point, such as 1e-3, is a text in YAML
        with contextlib.suppress(ValueError):
            return float(value)
    if type(value) is not hint:
        raise ConfigError(f"{name} is {value!r}; give {TYPE_NAMES[hint]}")
    return value
