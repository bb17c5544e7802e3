"""Makes small models of the PyPI package `zipformer` for tests, which skip where it is not installed."""

import argparse
from collections.abc import Sequence
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from torch import Tensor, nn

from benchmarks import peer

SMALL = {
    "num_encoder_layers": "1,2,1",
    "downsampling_factor": "1,4,2",
    "encoder_dim": "64,96,80",
    "encoder_unmasked_dim": "64,96,80",
    "feedforward_dim": "96,160,128",
    "num_heads": "4,6,5",
    "cnn_module_kernel": "15,7,31",
    "query_head_dim": "16",
    "value_head_dim": "8",
    "pos_head_dim": "4",
    "pos_dim": 24,
    "decoder_dim": 48,
    "joiner_dim": 40,
    "context_size": 3,
    "chunk_size": "16,32",
    "left_context_frames": "64",
}


def _load(name: str) -> Any:
    try:
        return peer.load(name)
    except peer.PeerMissing as missing:
        pytest.skip(str(missing))


def peer_model(seed: int = 1, **options: object) -> nn.Module:
    """Returns a small model in evaluation mode, none of whose weights is so near to zero that it hides a mistake."""
    torch.manual_seed(seed)
    module = _load("modules.model")
    with peer.activations_compiled(False):
        model = module.AsrModel(**{**SMALL, "vocab_size": 30, **options})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("out_proj.weight"):
                parameter.mul_(4)
            elif name.endswith(("chunkwise_conv_scale", "downsample.bias", "downsample_output.bias", "bypass_scale")):
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def peer_model_by_options(options: Sequence[str], vocab_size: int) -> nn.Module:
    """Returns the model that the package's programs make when they are started with these options."""
    train = _load("bin.train")
    parser = argparse.ArgumentParser()
    train.add_model_arguments(parser)
    parameters = vars(parser.parse_args(options)) | {"vocab_size": vocab_size, "blank_id": 0}
    parameters |= {"sos_id": 1, "eos_id": 1, "ignore_id": -1, "label_smoothing": 0.0}
    with peer.activations_compiled(False):
        return train.get_model(MagicMock(**parameters)).eval()


def peer_encode(model: nn.Module, features_BTF: Tensor, lens_B: Tensor, chunk: int, left: int) -> Tensor:
    """Returns (B, S, D), masked to chunks; chunk and left context are in frames of 20 ms, and -1 hides nothing."""
    model.encoder.chunk_size, model.encoder.left_context_frames = (chunk,), (left,)
    return model.forward_encoder(features_BTF, lens_B)[0]


def peer_stream(model: nn.Module, chunks: Sequence[Tensor], chunk: int, left: int) -> Tensor:
    """Returns (B, S, D) for feature chunks (B, 2 · chunk + 13, F) that are fed one after the other."""
    model.encoder.chunk_size, model.encoder.left_context_frames = (chunk,), (left,)
    next_chunk = peer.open_streams(model.encoder_embed, model.encoder, len(chunks[0]))
    return torch.cat([next_chunk(features_BTF) for features_BTF in chunks], dim=1)
