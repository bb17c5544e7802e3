"""A toy task for the tests: strings of tones, one pitch a word, and a model that trains on them in seconds."""

from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from lhotse import CutSet, MonoCut, Recording, SupervisionSegment

from ssm_asr import checkpoint
from ssm_asr.config import Experiment, from_dict, to_yaml
from ssm_asr.data.features import make_fbank
from ssm_asr.data.store import prepare_cuts
from ssm_asr.data.tokens import Tokenizer, train_tokenizer
from ssm_asr.transducer.model import Transducer
from ssm_asr.units import SAMPLE_RATE_HZ

PITCH_HZ = {"LOW": 300, "MID": 900, "HIGH": 2400}

EXPERIMENT = {
    "model": {
        "predictor_dim": 32,
        "joiner_dim": 32,
        "ctc": True,
        "encoder": {
            "layers": [1, 1],
            "downsampling": [1, 2],
            "dim": [32, 32],
            "unmasked_dim": [32, 32],
            "feedforward_dim": [32, 32],
            "heads": [2, 2],
            "conv_kernel": [7, 7],
            "query_head_dim": 8,
            "embed_channels": [4, 4, 8],
            "chunk_frames": [16, -1],
            "left_context_frames": [64, -1],
        },
    },
    "tokens": {"kind": "word"},
    "data": {"max_duration_s": 4.0, "num_buckets": 2, "noise_probability": 0.0, "num_workers": 0},
    "optim": {"warmup_batches": 10},
    "train": {
        "num_epochs": 2,
        "schedule_speed": 100.0,
        "loss_warmup_batches": 10,
        "average_period": 2,
        "log_every": 4,
        "validate_every": 3,
        "checkpoint_every": 4,
    },
    "decode": {"average_epochs": 1, "chunk_frames": 16, "left_context_frames": 64},
}


def experiment(**sections: dict) -> Experiment:
    """The toy experiment, with fields of its sections changed: experiment(train={"seed": 1})."""
    tree = {name: {**fields, **sections.get(name, {})} for name, fields in EXPERIMENT.items()}
    return from_dict(tree)


def tones(text: str, seed: int = 0) -> np.ndarray:
    """samples_S of a string of words: 0.25 s of its tone for each, and pauses of 0.1 s, in faint noise."""
    time_s = np.arange(SAMPLE_RATE_HZ // 4) / SAMPLE_RATE_HZ
    pause = np.zeros(SAMPLE_RATE_HZ // 10)
    parts = [pause]
    for word in text.split():
        parts += [0.3 * np.sin(2 * np.pi * PITCH_HZ[word] * time_s), pause]
    sound = np.concatenate(parts)
    return (sound + 0.003 * np.random.default_rng(seed).standard_normal(len(sound))).astype(np.float32)


def write_cuts(directory: Path, name: str, count: int, seed: int = 0) -> Path:
    """A manifest cuts_NAME.jsonl.gz of `count` utterances of 1 to 3 words, with stored features."""
    rng = np.random.default_rng(seed)
    audio = directory / "audio"
    audio.mkdir(parents=True, exist_ok=True)
    cuts = []
    for k in range(count):
        text = " ".join(rng.choice(list(PITCH_HZ), size=1 + k % 3))
        path = audio / f"{name}{k:02d}.wav"
        soundfile.write(path, tones(text, seed + k), SAMPLE_RATE_HZ)
        recording = Recording.from_file(path, recording_id=path.stem)
        segment = SupervisionSegment(path.stem, path.stem, 0.0, recording.duration, text=text)
        cuts.append(MonoCut(path.stem, 0.0, recording.duration, 0, supervisions=[segment], recording=recording))
    CutSet.from_cuts(cuts).to_file(audio / f"cuts_{name}.jsonl.gz")
    options = {"speed_perturb": False, "shuffle": False, "on_the_fly": False, "num_jobs": 1}
    return prepare_cuts(audio / f"cuts_{name}.jsonl.gz", directory, **options)


def spoil(cuts_file: Path, ids: list[str]) -> None:
    """Writes NaN into stored features."""
    for cut in CutSet.from_file(cuts_file):
        if cut.id in ids:
            path = Path(cut.features.storage_path) / cut.features.storage_key
            features = np.load(path)
            features[5] = np.nan
            np.save(path, features)


def write_tokens(directory: Path) -> Tokenizer:
    """A tokenizer of the words, saved in the directory."""
    tokenizer = train_tokenizer(list(PITCH_HZ), "word")
    tokenizer.save(directory)
    return tokenizer


def vary_output(model: Transducer) -> None:
    """Makes an untrained model emit all tokens, blank included, and depend on what it remembers of earlier chunks."""
    features_TF = torch.from_numpy(make_fbank().extract(tones("LOW MID HIGH LOW HIGH MID"), SAMPLE_RATE_HZ))
    projection = model.eval().joiner.encoder_proj
    with torch.no_grad():
        for name, p in model.encoder.named_parameters():
            if name.endswith("out_proj.weight"):  # of attention and convolutions: small at the start of training
                p.mul_(4)
        out_BTD, _ = model.encode(features_TF[None], torch.tensor([len(features_TF)]))
        out_TJ = out_BTD[0] @ projection.weight.T
        projection.weight.div_(out_TJ.std(dim=0)[:, None])
        projection.bias.copy_(-out_TJ.mean(dim=0) / out_TJ.std(dim=0))
        model.joiner.output_linear.weight.mul_(5)
        model.joiner.output_linear.bias.zero_()


def write_checkpoint(path: Path, **sections: dict) -> checkpoint.Loaded:
    """An untrained model in a checkpoint."""
    torch.manual_seed(1)
    tokenizer = train_tokenizer(list(PITCH_HZ), "word")
    chosen = experiment(**sections)
    model = Transducer(chosen.model, tokenizer.vocab_size)
    vary_output(model)
    checkpoint.save(checkpoint.pack(chosen, tokenizer, model.state_dict(), {"batch": 0}), path)
    return checkpoint.load_model(path)


def differing(one: Any, other: Any, name: str = "") -> list[str]:
    """The names of the leaves in which two trees of tensors and values differ."""
    if isinstance(one, dict) and one.keys() == other.keys():
        pairs = {key: (one[key], other[key]) for key in one}
    elif isinstance(one, list) and len(one) == len(other):
        pairs = dict(enumerate(zip(one, other, strict=True)))
    elif isinstance(one, torch.Tensor):
        return [] if torch.equal(one, other) and one.dtype == other.dtype else [name]
    else:
        return [] if one == other else [name]
    return [leaf for key, pair in pairs.items() for leaf in differing(*pair, f"{name}.{key}")]


class Corpus:
    """A toy corpus on disk, and the command line of train for it."""

    def __init__(self, directory: Path, num_train: int = 24, num_valid: int = 4) -> None:
        self.directory = directory
        self.train_cuts = write_cuts(directory, "train", num_train)
        self.valid_cuts = write_cuts(directory, "valid", num_valid, seed=100)
        self.tokens = directory / "tokens"
        self.tokenizer = write_tokens(self.tokens)

    def arguments(self, exp_dir: Path, **sections: dict) -> list[str]:
        """Arguments of train for the toy experiment, written beside the data."""
        config = self.directory / f"{exp_dir.name}.yaml"
        config.write_text(to_yaml(experiment(**sections)), encoding="utf-8")
        return [
            *("--config", str(config), "--tokens", str(self.tokens), "--exp-dir", str(exp_dir), "--device", "cpu"),
            *("--train-cuts", str(self.train_cuts), "--valid-cuts", str(self.valid_cuts)),
        ]
