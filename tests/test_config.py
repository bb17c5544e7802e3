"""Configurations: YAML to dataclasses and back, overrides, and a message for every mistake."""

import dataclasses
import math
import re
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from ssm_asr.config import ConfigError, Experiment, OptimConfig, from_dict, load_experiment, to_dict, to_yaml
from ssm_asr.data.config import DataConfig
from ssm_asr.encoder.conformer import ConformerConfig
from ssm_asr.encoder.contract import EncoderConfig
from ssm_asr.encoder.registry import ENCODERS
from ssm_asr.encoder.zipformer import ZipformerConfig
from ssm_asr.fields import Bounds, field_types

RECIPES = Path(__file__).parent.parent / "egs"


def load(directory: Path, text: str, *overrides: str) -> Experiment:
    path = directory / "experiment.yaml"
    path.write_text(text, encoding="utf-8")
    return load_experiment(path, overrides)


def refusal(directory: Path, text: str, *overrides: str) -> str:
    """The message for a file that cannot be used: one line, which names the file."""
    with pytest.raises(ConfigError) as caught:
        load(directory, text, *overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message.removeprefix(f"{directory / 'experiment.yaml'}: ")


def test_defaults(tmp_path: Path) -> None:
    assert load(tmp_path, "") == Experiment()
    assert load(tmp_path, "model: {}\n# nothing else") == Experiment()


def test_round_trip(tmp_path: Path) -> None:
    text = """
model: {ctc: true, encoder: {layers: [1, 1], downsampling: [1, 2], dim: [8, 8], unmasked_dim: [8, 8],
        feedforward_dim: [8, 8], heads: [2, 2], conv_kernel: [7, 7], embed_channels: [1, 2, 3]}}
data: {noise_snr_db: [5, 10.5], spec_augment: {probability: 0.5}}
optim: {base_lr: 0.00001}
"""
    experiment = load(tmp_path, text)
    assert experiment.model.encoder.embed_channels == (1, 2, 3)
    assert experiment.data.noise_snr_db == (5.0, 10.5) and type(experiment.data.noise_snr_db[0]) is float
    assert experiment.data.spec_augment.probability == 0.5
    assert load(tmp_path, to_yaml(experiment)) == experiment
    assert from_dict(to_dict(experiment)) == experiment
    plain = yaml.safe_load(to_yaml(experiment))
    assert plain == to_dict(experiment)
    assert plain["train"]["seed"] == 42  # defaults are written out, too


def test_overrides(tmp_path: Path) -> None:
    text = "train: {num_epochs: 3}"
    changed = load(
        tmp_path,
        text,
        "train.num_epochs=5",
        "model.encoder.causal=false",
        "data.noise_snr_db=[1, 2]",
        "optim.base_lr=1",
    )
    assert changed.train.num_epochs == 5
    assert changed.model.encoder.causal is False
    assert changed.data.noise_snr_db == (1.0, 2.0)
    assert changed.optim.base_lr == 1.0 and type(changed.optim.base_lr) is float
    assert load(tmp_path, text, " train.seed =7").train.seed == 7
    # YAML takes a number without a point for a text.
    assert load(tmp_path, "optim: {base_lr: 1e-3}", "optim.lr_batches=5e3").optim.base_lr == 1e-3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("trian: {num_epochs: 3}", "trian: no such field; did you mean train?"),
        ("train: {num_epoch: 3}", "train.num_epoch: no such field; did you mean num_epochs?"),
        ("model: {encoder: {lairs: [1]}}", "model.encoder.lairs: no such field; did you mean layers?"),
        ("model: {xyzzy: 1}", "model.xyzzy: no such field"),
        ("train: {1: 2}", "train.1: no such field"),
        ("train: {num_epochs: many}", "train.num_epochs is 'many'; give a whole number from 1 to 1000000"),
        ("train: {num_epochs: 3.5}", "train.num_epochs is 3.5; give a whole number from 1 to 1000000"),
        ("train: {num_epochs: true}", "train.num_epochs is True; give a whole number from 1 to 1000000"),
        ("optim: {base_lr: fast}", "optim.base_lr is 'fast'; give a number above 0, at most 10"),
        ("optim: {base_lr: true}", "optim.base_lr is True; give a number above 0, at most 10"),
        ("model: {ctc: 1}", "model.ctc is 1; give true or false"),
        ("tokens: {kind: 5}", "tokens.kind is 5; give one of bpe, unigram, word, char"),
        ("train: 5", "train is 5; a section with fields is expected"),
        ("train:", "train is None; a section with fields is expected"),
        ("tokens: {kind: bpm}", "tokens.kind is 'bpm'; give one of bpe, unigram, word, char"),
        ("train: {precision: fp8}", "train.precision is 'fp8'; give one of float32, bf16, fp16"),
        ("decode: {method: best}", "decode.method is 'best'; give one of greedy, beam"),
        ("model: {rnnt_type: odd}", "model.rnnt_type is 'odd'; give one of regular, modified, constrained"),
        ("train: {log_every: 0}", "train.log_every is 0; give a whole number from 1 to 1000000000000"),
        ("optim: {base_lr: -0.1}", "optim.base_lr is -0.1; give a number above 0, at most 10"),
        ("model: {encoder: {layers: 2}}", "model.encoder.layers is 2; give a list"),
        ("model: {encoder: {layers: [2, x]}}", "model.encoder.layers[1] is 'x'; give a whole number from 1 to 1000"),
        ("model: {encoder: {embed_channels: [1, 2]}}", "model.encoder.embed_channels is [1, 2]; give a list of 3"),
        ("data: {noise_snr_db: [1, 2, 3]}", "data.noise_snr_db is [1.0, 2.0, 3.0]; give a list of 2"),
        (
            "model: {encoder: {layers: [1, 1]}}",
            "model.encoder.downsampling is [1, 2, 4, 8, 4, 2]; give 2 entries, as many as model.encoder.layers has",
        ),
        (
            "model: {encoder: {heads: [0, 4, 4, 8, 4, 4]}}",
            "model.encoder.heads[0] is 0; give a whole number from 1 to 1024",
        ),
        (
            "model: {encoder: {query_head_dim: 0}}",
            "model.encoder.query_head_dim is 0; give a whole number from 1 to 65536",
        ),
        (
            "model: {encoder: {chunk_frames: []}}",
            "model.encoder.chunk_frames is []; give multiples of 8, or -1 for all",
        ),
        (
            "model: {encoder: {chunk_frames: [16, 20]}}",
            "model.encoder.chunk_frames is [16, 20]; give multiples of 8, or -1 for all",
        ),
        (
            "model: {encoder: {left_context_frames: [-3]}}",
            "model.encoder.left_context_frames[0] is -3; give a whole number from 0 to 1000000, or -1 for all",
        ),
        (
            "model: {encoder: {unmasked_dim: [192, 192, 999, 256, 256, 192]}}",
            "model.encoder.unmasked_dim is [192, 192, 999, 256, 256, 192]; give at most model.encoder.dim each",
        ),
        (
            "model: {encoder: {kind: conformer, chunk_frames: [15]}}",
            "model.encoder.chunk_frames is [15]; give multiples of 2, or -1 for all",
        ),
        ("model: {predictor_dim: 30}", "model.predictor_dim is 30; give a multiple of 4 from 4 to 65536"),
        ("model: {context_size: 0}", "model.context_size is 0; give a whole number from 1 to 100"),
        ("optim: {base_lr: .nan}", "optim.base_lr is nan; give a number above 0, at most 10"),
        ("data: {num_workers: -1}", "data.num_workers is -1; give a whole number from 0 to 1000"),
        ("data: {spec_augment: {probability: 90}}", "data.spec_augment.probability is 90.0; give a number from 0 to 1"),
        (
            "data: {spec_augment: {time_mask_frames: 0}}",
            "data.spec_augment.time_mask_frames is 0; give a whole number from 1 to 100000",
        ),
        ("model: {prune_range: 0}", "model.prune_range is 0; give a whole number from 1 to 1000"),
        ("optim: {clipping_scale: .nan}", "optim.clipping_scale is nan; give a number above 0, at most 1000000"),
        ("optim: {base_lr: 1e99}", "optim.base_lr is 1e+99; give a number above 0, at most 10"),
        ("optim: {base_lr: .inf}", "optim.base_lr is inf; give a number above 0, at most 10"),
        ("data: {num_workers: 100000000}", "data.num_workers is 100000000; give a whole number from 0 to 1000"),
        (
            "model: {encoder: {kind: conformer, layers: 1000000000}}",
            "model.encoder.layers is 1000000000; give a whole number from 1 to 1000",
        ),
        (
            f"model: {{joiner_dim: {'9' * 1000}}}",
            f"model.joiner_dim is {'9' * 100}…; give a whole number from 1 to 65536",
        ),
        ("data: {min_utterance_s: 30}", "data.min_utterance_s is 30.0; give at most data.max_utterance_s, 20.0"),
        ("model: {lm_scale: 0.75, am_scale: 0.5}", "model.am_scale is 0.5; give at most 1 - model.lm_scale"),
        ("model: {encoder: {pos_dim: 47}}", "model.encoder.pos_dim is 47; give a multiple of 2 from 2 to 65536"),
        ("loss: {backend: auto}", "loss.backend is 'auto'; give one of torch, k2"),
        ("train: {fast: true}", "train.fast is True; give one of auto, off"),
        ("train: {weight_noise: {parts: [3]}}", "train.weight_noise.parts[0] is 3; give a text"),
        (
            "train: {cuda_graphs: false}",
            "train.cuda_graphs is now train.fast (auto or off); auto captures graphs where data.fixed_shapes is true",
        ),
        ("- a\n- b", "a mapping of sections is expected, such as 'model:' and 'train:'"),
    ],
)
def test_mistakes(tmp_path: Path, text: str, message: str) -> None:
    assert refusal(tmp_path, text) == message


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.num_epochs", "--set train.num_epochs: give name=value, for example train.num_epochs=10"),
        ("train.num_epochs.x=1", "--set train.num_epochs.x=1: num_epochs is a value, not a section"),
        ("train.seed=[1", "--set train.seed=[1: not YAML: while parsing a flow sequence"),
        ("train.sed=1", "train.sed: no such field; did you mean seed?"),
        ("train.seed=2001-99-99", "--set train.seed=2001-99-99: not YAML: month must be in 1..12"),
        ("train.cuda_graphs=true", "train.cuda_graphs is now train.fast (auto or off); auto captures graphs where"),
    ],
)
def test_wrong_overrides(tmp_path: Path, override: str, message: str) -> None:
    assert refusal(tmp_path, "train: {num_epochs: 3}", override).startswith(message)


def test_files_that_are_no_configuration(tmp_path: Path) -> None:
    assert refusal(tmp_path, "train: {a: [1, 2").startswith("not YAML: while parsing a flow")
    assert refusal(tmp_path, "train: " + 5000 * "[").startswith("not YAML: maximum recursion depth exceeded")
    assert refusal(tmp_path, "train: {seed: 1}\ntrain: {seed: 2}").startswith("not YAML: 'train' is there twice")
    for path, message in (
        (tmp_path / "none.yaml", "no such configuration file"),
        (tmp_path, "cannot be read: Is a directory"),
    ):
        with pytest.raises(ConfigError) as caught:
            load_experiment(path)
        assert str(caught.value) == f"{path}: {message}"
    binary = tmp_path / "model.pt"
    binary.write_bytes(b"PK\x03\x04\xff\xfe")
    with pytest.raises(ConfigError, match=r"model.pt: not a text file in UTF-8"):
        load_experiment(binary)


def sections(cls: Any = Experiment) -> Iterator[tuple[Any, str, Any, Any]]:
    """The class, name, type and bounds of every field that is no section, of all sections and all encoders."""
    for field in dataclasses.fields(cls):
        hint = field_types(cls)[field.name]
        if hint is EncoderConfig:
            for kind in ENCODERS.values():
                yield from sections(kind.config)
        elif dataclasses.is_dataclass(hint):
            yield from sections(hint)
        else:
            yield cls, field.name, hint, field.metadata.get("bounds", Bounds())


def test_every_number_has_two_bounds_and_every_text_its_choices() -> None:
    texts_without_choices = []
    for cls, name, hint, bounds in sections():
        kind = (typing.get_args(hint) or [hint])[0]
        if kind in (int, float):
            assert (bounds.above is None) != (bounds.least is None), f"{cls.__name__}.{name}"
            assert bounds.most is not None and math.isfinite(bounds.most), f"{cls.__name__}.{name}"
        elif kind is str and not bounds.choices:
            texts_without_choices.append(f"{cls.__name__}.{name}")
    assert texts_without_choices == ["ZipformerConfig.kind", "ConformerConfig.kind", "WeightNoiseConfig.parts"]


def test_bounds_hold_in_python_too() -> None:
    for make, message in (
        (lambda: OptimConfig(base_lr=math.nan), "optim.base_lr is nan; give a number above 0, at most 10"),
        (lambda: DataConfig(num_workers="2"), "data.num_workers is '2'; give a whole number from 0 to 1000"),
        (lambda: ZipformerConfig(kind="lstm"), "model.encoder.kind is 'lstm'; give zipformer, the kind of Zipf"),
        (lambda: Experiment(tokens=DataConfig()), "tokens is DataConfig("),
    ):
        with pytest.raises(ConfigError, match=re.escape(message)):
            make()
    assert OptimConfig(base_lr=1).base_lr == 1, "a whole number is a number"


def test_fast_can_be_switched_off_by_a_word_that_yaml_takes_for_false(tmp_path: Path) -> None:
    assert load(tmp_path, "").train.fast == "auto"
    for text, overrides in (("train: {fast: off}", ()), ("", ("train.fast=off",)), ("train: {fast: 'off'}", ())):
        experiment = load(tmp_path, text, *overrides)
        assert experiment.train.fast == "off"
        assert load(tmp_path, to_yaml(experiment)) == experiment


def test_yaml_cannot_run_code(tmp_path: Path) -> None:
    witness = tmp_path / "witness"
    message = refusal(tmp_path, f"train: !!python/object/apply:os.mkdir ['{witness}']")
    assert message.startswith("not YAML: could not determine a constructor")
    assert not witness.exists()


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*/conf/*.yaml")), ids=lambda path: path.stem)
def test_configurations_of_the_recipes(path: Path) -> None:
    experiment = load_experiment(path)
    assert from_dict(to_dict(experiment)) == experiment
    assert path.read_text(encoding="utf-8").startswith("#"), "begin with a comment: purpose, command, cost, result"


def test_a_base_lies_under_what_a_file_says(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(
        "model: {ctc: true, encoder: {dropout: 0.2, kind: conformer}}\ntrain: {seed: 3}\n"
    )
    (tmp_path / "over.yaml").write_text("base: base.yaml\nmodel: {encoder: {dropout: 0.3}}\n")
    experiment = load_experiment(tmp_path / "over.yaml", ["train.num_epochs=4"])
    assert experiment.model.ctc and experiment.train.seed == 3 and experiment.train.num_epochs == 4
    assert experiment.model.encoder == ConformerConfig(dropout=0.3)
    assert from_dict(to_dict(experiment)) == experiment


def test_an_encoder_of_another_kind_replaces_that_of_the_base(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("model: {ctc: true, encoder: {downsampling: [1, 1, 1, 1, 1, 1]}}")
    (tmp_path / "over.yaml").write_text("base: base.yaml\nmodel: {encoder: {kind: conformer, dim: 96, heads: 4}}")
    model = load_experiment(tmp_path / "over.yaml").model
    assert model.ctc and model.encoder == ConformerConfig(dim=96, heads=4)


@pytest.mark.parametrize(
    "text, message",
    [
        ("base: over.yaml", "is its own base"),
        (
            "base: conf/other.yaml",
            "over.yaml: its base conf/other.yaml is no file here; give a path relative to over.yaml",
        ),
        ("base: 3", "base is 3; give the name of a configuration file"),
        ("model: {encoder: {kind: lstm}}", "model.encoder.kind is 'lstm'; give one of zipformer, conformer"),
        ("model: {encoder: {kind: conformer, downsampling: [1]}}", "model.encoder.downsampling: no such field"),
    ],
)
def test_bases_and_kinds_that_cannot_be(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "over.yaml").write_text(text)
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_experiment(tmp_path / "over.yaml")
