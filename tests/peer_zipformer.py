"""The PyPI package `zipformer`, which nobody here wrote, for tests; what it needs to train is not installed."""

import argparse
import importlib.machinery
import importlib.util
import os
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from unittest.mock import MagicMock, patch

import pytest
import torch
from torch import Tensor, nn

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


def _module(name: str) -> types.ModuleType:
    """A module of the package. Its __init__.py files, which import all programs and what they need, are not run."""
    found = importlib.util.find_spec("zipformer")
    if found is None:
        pytest.skip("the PyPI package zipformer is not installed")
    for package, folder in (("zipformer", ""), ("zipformer.bin", "bin")):
        if package not in sys.modules:
            sys.modules[package] = stub = types.ModuleType(package)
            stub.__path__ = [str(Path(path, folder)) for path in found.submodule_search_locations or ()]
            stub.__spec__ = importlib.machinery.ModuleSpec(package, None, is_package=True)
            stub.__spec__.submodule_search_locations = stub.__path__
    for unneeded in ("atdataset", "ssentencepiece"):  # reading data, and tokens
        sys.modules.setdefault(unneeded, MagicMock())
    return importlib.import_module(f"zipformer.{name}")


def peer_model(seed: int = 1, **options: object) -> nn.Module:
    """A small model in evaluation mode, in which no weight is so near to zero that a mistake could hide."""
    torch.manual_seed(seed)
    module = _module("modules.model")
    with patch.dict(os.environ, K2_ONNX_EXPORT="1"):  # else every activation is compiled
        model = module.AsrModel(**{**SMALL, "vocab_size": 30, **options})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("out_proj.weight"):
                parameter.mul_(4)
            elif name.endswith(("chunkwise_conv_scale", "downsample.bias", "downsample_output.bias", "bypass_scale")):
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def peer_model_by_options(options: Sequence[str], vocab_size: int) -> nn.Module:
    """The model that the package's programs make when they are started with these options."""
    train = _module("bin.train")
    parser = argparse.ArgumentParser()
    train.add_model_arguments(parser)
    parameters = vars(parser.parse_args(options)) | {"vocab_size": vocab_size, "blank_id": 0}
    parameters |= {"sos_id": 1, "eos_id": 1, "ignore_id": -1, "label_smoothing": 0.0}
    with patch.dict(os.environ, K2_ONNX_EXPORT="1"):
        return train.get_model(MagicMock(**parameters)).eval()


def peer_encode(model: nn.Module, features_BTF: Tensor, lens_B: Tensor, chunk: int, left: int) -> Tensor:
    """(B, S, D), masked to chunks; in frames of 20 ms, -1 for all there is."""
    model.encoder.chunk_size, model.encoder.left_context_frames = (chunk,), (left,)
    return model.forward_encoder(features_BTF, lens_B)[0]


def peer_stream(model: nn.Module, chunks: Sequence[Tensor], chunk: int, left: int) -> Tensor:
    """(B, S, D) of feature chunks (B, 2 · chunk + 13, F), one after the other."""
    model.encoder.chunk_size, model.encoder.left_context_frames = (chunk,), (left,)
    streaming = _module("modules.model").StreamingEncoderWrapper(model.encoder, model.encoder_embed)
    states = streaming.get_init_states(len(chunks[0]))
    outputs = []
    for features_BTF in chunks:
        lens_B = torch.full((len(features_BTF),), features_BTF.shape[1])
        out_BSD, _, states = streaming(features_BTF, lens_B, states)
        outputs.append(out_BSD)
    return torch.cat(outputs, dim=1)
