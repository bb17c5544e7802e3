"""The tiny models of the golden files, for the tests."""

import json
from pathlib import Path

import numpy as np
import torch

from ssm_asr.encoder.zipformer import ZipformerConfig
from ssm_asr.transducer.model import ModelConfig, Transducer

GOLDEN = Path(__file__).parent / "golden"


def load(name: str) -> dict[str, torch.Tensor | str]:
    """Arrays of a golden file as tensors, strings as strings."""
    with np.load(GOLDEN / name) as arrays:
        return {k: str(arrays[k]) if arrays[k].dtype.kind == "U" else torch.from_numpy(arrays[k]) for k in arrays}


def golden_model(name: str) -> tuple[Transducer, dict]:
    """The model of a golden file with its weights, in evaluation mode, and the arrays."""
    golden = load(f"zipformer_tiny_{name}.npz")
    config = json.loads(golden["config"])

    def ints(key: str) -> tuple[int, ...]:
        return tuple(int(n) for n in config[key].split(","))

    encoder = ZipformerConfig(
        layers=ints("num_encoder_layers"),
        downsampling=ints("downsampling_factor"),
        dim=ints("encoder_dim"),
        unmasked_dim=ints("encoder_unmasked_dim"),
        feedforward_dim=ints("feedforward_dim"),
        heads=ints("num_heads"),
        conv_kernel=ints("cnn_module_kernel"),
        query_head_dim=ints("query_head_dim")[0],
        value_head_dim=ints("value_head_dim")[0],
        pos_head_dim=ints("pos_head_dim")[0],
        pos_dim=config["pos_dim"],
        causal=config["causal"],
    )
    model = Transducer(
        ModelConfig(encoder, predictor_dim=config["decoder_dim"], joiner_dim=config["joiner_dim"]),
        config["vocab_size"],
    )
    weights = {key.removeprefix("param/"): value for key, value in golden.items() if key.startswith("param/")}
    model.load_state_dict(weights, strict=True)
    return model.eval(), golden
