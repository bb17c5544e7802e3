"""An experiment is described whole, by dataclasses: model, tokens, data, losses, optimiser, training and decoding.

A YAML file names only what differs from the defaults, or from the file that it calls its `base`; `--set a.b=value`
changes single fields. The whole configuration is saved in the experiment directory and in every checkpoint.
"""

import contextlib
import dataclasses
import difflib
import typing
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ssm_asr.data.config import DataConfig
from ssm_asr.encoder.contract import MOST_CHUNK_FRAMES, MOST_LEFT_CONTEXT_FRAMES, EncoderConfig
from ssm_asr.encoder.registry import encoder_kind
from ssm_asr.fields import ConfigError, Section, field_types, setting, shown
from ssm_asr.transducer.model import ModelConfig

__all__ = ["ConfigError", "Experiment", "from_dict", "load_experiment", "to_dict", "to_yaml"]

MOST_BATCHES = 10**12
MOST_EPOCHS = 1_000_000
# Fields of version 0.1 that have other names now. Files are refused rather than read as if nothing had changed, since
# who wrote `cuda_graphs: false` meant it; old checkpoints, which hold every field, are converted (checkpoint.py).
REPLACED = {"train.cuda_graphs": "train.fast (auto or off); auto captures graphs where data.fixed_shapes is true"}


@dataclass
class TokensConfig(Section, name="tokens"):
    """The tokens are trained from the training transcripts, as these settings say."""

    # bpe, unigram and word are sentencepiece's models.
    kind: str = setting("bpe", choices=("bpe", "unigram", "word", "char"))
    # bpe and unigram make so many tokens; word and char take all there are.
    vocab_size: int = setting(500, least=1, most=1_000_000)


@dataclass
class LossConfig(Section, name="loss"):
    """These settings say how the transducer's losses are computed."""

    # torch is this project's own computation. k2 is the package of that name, which must be installed.
    backend: str = setting("torch", choices=("torch", "k2"))


@dataclass
class OptimConfig(Section, name="optim"):
    """The optimiser is ScaledAdam, and its learning rate follows Eden's schedule."""

    base_lr: float = setting(0.045, above=0, most=10)
    # The learning rate decays as so many batches and so many epochs have passed.
    lr_batches: float = setting(7500.0, above=0, most=MOST_BATCHES)
    lr_epochs: float = setting(3.5, above=0, most=MOST_EPOCHS)
    warmup_batches: int = setting(500, least=0, most=MOST_BATCHES)
    # Gradients are clipped at this multiple of their median norm.
    clipping_scale: float = setting(2.0, above=0, most=1_000_000)
    # The few parameters that set the dynamics of state-space models learn at this multiple of the rate.
    ssm_lr_scale: float = setting(0.1, least=0, most=100)


@dataclass
class WeightNoiseConfig(Section, name="train.weight_noise"):
    """Noise can be put on weights in training; these settings say how much, from when on, and on which.

    A common choice is 0.075 on the predictor, once training is stable.
    """

    # The standard deviation of the noise is the same for all weights; 0 switches it off.
    deviation: float = setting(0.0, least=0, most=10)
    # It begins after so many batches.
    from_batch: int = setting(0, least=0, most=MOST_BATCHES)
    # It is put on the weights of these parts of the model, or whose names begin so. The predictor is named "decoder".
    parts: tuple[str, ...] = ("decoder",)

    def deviation_at(self, batch: int) -> float:
        """Gives the deviation in the batch that follows after so many."""
        return self.deviation if batch >= self.from_batch else 0.0


@dataclass
class TrainConfig(Section, name="train"):
    """These settings are of the training loop."""

    num_epochs: int = setting(30, least=1, most=MOST_EPOCHS)
    seed: int = setting(42, least=0, most=2**63 - 1)
    # bf16 and fp16 are trained with autocast.
    precision: str = setting("float32", choices=("float32", "bf16", "fp16"))
    # On a GPU, auto uses kernels wherever it can. If data.fixed_shapes is set, it also captures the passes of encoder
    # and losses as a graph for every shape of batch. off computes everything plainly.
    fast: str = setting("auto", choices=("auto", "off"))
    # The regularisers' schedules are in batches of 600 s. A short run goes through them faster by this factor.
    schedule_speed: float = setting(1.0, above=0, most=1_000_000)
    # Over so many batches the simple loss's scale goes from 1 to simple_scale, and the pruned loss's from 0.1 to 1.
    loss_warmup_batches: int = setting(2000, least=0, most=MOST_BATCHES)
    simple_scale: float = setting(0.5, least=0, most=1000)
    # The CTC loss of model.ctc has this scale.
    ctc_scale: float = setting(0.2, least=0, most=1000)
    weight_noise: WeightNoiseConfig = field(default_factory=WeightNoiseConfig)
    # After every so many batches, the running mean of the weights is updated, losses are logged, the model is validated
    # (at the end of every epoch, too), and a checkpoint is saved.
    average_period: int = setting(200, least=1, most=MOST_BATCHES)
    log_every: int = setting(50, least=1, most=MOST_BATCHES)
    validate_every: int = setting(3000, least=1, most=MOST_BATCHES)
    checkpoint_every: int = setting(4000, least=1, most=MOST_BATCHES)
    # The last so many checkpoints are kept to resume from.
    keep_checkpoints: int = setting(5, least=1, most=1_000_000)


@dataclass
class DecodeConfig(Section, name="decode"):
    """These settings say which epochs are averaged, and how the result is decoded by default."""

    # The last so many epochs are averaged.
    average_epochs: int = setting(10, least=1, most=MOST_EPOCHS)
    # Both are in frames of 20 ms.
    chunk_frames: int = setting(32, least=1, most=MOST_CHUNK_FRAMES, unlimited=-1)
    left_context_frames: int = setting(128, least=0, most=MOST_LEFT_CONTEXT_FRAMES, unlimited=-1)
    method: str = setting("greedy", choices=("greedy", "beam"))
    beam: int = setting(4, least=1, most=1000)


@dataclass
class Experiment(Section):
    """A configuration file has these sections."""

    model: ModelConfig = field(default_factory=ModelConfig)
    tokens: TokensConfig = field(default_factory=TokensConfig)
    data: DataConfig = field(default_factory=DataConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    decode: DecodeConfig = field(default_factory=DecodeConfig)


def load_experiment(path: str | Path, overrides: typing.Sequence[str] = ()) -> Experiment:
    """Reads a YAML file and applies `a.b=value` overrides, whose values are in YAML too.

    Raises:
        ConfigError: The file cannot be read or is no YAML, or a field is unknown or has a value that cannot be. The
            message names the file.
    """
    tree = _read(Path(path), ())
    for override in overrides:
        _override(tree, override)
    try:
        return from_dict(tree)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def _read(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    """Reads the tree of a file and lays it over its base's, whose path is relative to the file.

    Args:
        seen: The files of which this one is the base, directly or not.
    """
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
    under = path.parent / base
    if not under.is_file():
        raise ConfigError(f"{path}: its base {base} is no file here; give a path relative to {path.name}")
    return _overlay(_read(under, (*seen, path.resolve())), tree)


def _overlay(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Lays one tree over another, section by section. A section of another kind shares no fields, so it replaces."""
    if "kind" in over and over["kind"] != under.get("kind"):
        return over
    merged = dict(under)
    for key, value in over.items():
        below = under.get(key)
        merged[key] = _overlay(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged


def from_dict(tree: dict[str, Any]) -> Experiment:
    """Makes an experiment of nested dictionaries, as YAML files and checkpoints have them.

    Raises:
        ConfigError: A field is unknown or has a value that cannot be.
    """
    return _build(Experiment, tree, "")


def to_dict(experiment: Experiment) -> dict[str, Any]:
    """Turns an experiment into nested dictionaries of plain values, from which from_dict makes it again."""
    return _plain(dataclasses.asdict(experiment))


def to_yaml(experiment: Experiment) -> str:
    """Writes the whole experiment as YAML, with every default."""
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
    """Loads plain values only, as its base does, and refuses a key that is there twice: the last would count."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        twice = next((key for key, count in keys.items() if count > 1), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(None, None, f"{twice!r} is there twice", node.start_mark)
        return super().construct_mapping(node, deep)


def _parse(text: str, source: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    # PyYAML raises the last two for dates that are none, and for endless numbers and lists.
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{source}: not YAML: {' '.join(str(error).split())}") from None


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def _build(cls: Any, tree: Any, name: str) -> Any:
    """Makes a section of a tree. What this does not convert is left as it is, for the section itself to refuse."""
    if not isinstance(tree, dict):
        raise ConfigError(f"{name or 'the configuration'} is {shown(tree)}; a section with fields is expected")
    if cls is EncoderConfig:
        cls = (encoder_kind(tree["kind"]) if "kind" in tree else encoder_kind()).config
    types = field_types(cls)
    values = {}
    for key, value in tree.items():
        full = f"{name}.{key}" if name else str(key)
        if full in REPLACED:
            raise ConfigError(f"{full} is now {REPLACED[full]}")
        if key not in types:
            near = difflib.get_close_matches(str(key), list(types), 1)
            raise ConfigError(f"{full}: no such field" + (f"; did you mean {near[0]}?" if near else ""))
        values[key] = _convert(types[key], value, full)
    return cls(**values)


def _convert(hint: Any, value: Any, name: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, name)
    if typing.get_origin(hint) is tuple and isinstance(value, (list, tuple)):
        entry_type = typing.get_args(hint)[0]
        return tuple(_convert(entry_type, entry, f"{name}[{i}]") for i, entry in enumerate(value))
    if hint is float and type(value) in (int, str):  # YAML takes a number without a point, such as 1e-3, for a text
        with contextlib.suppress(ValueError, OverflowError):
            return float(value)
    if hint is str and value is False:  # YAML takes the word off for false
        return "off"
    return value
