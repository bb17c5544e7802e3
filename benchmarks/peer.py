"""Loads the PyPI package zipformer 0.1.3, the Zipformer of its authors, beside which this project is tested and timed.

The package's front page imports all of its programs, and they import libraries for data and tokens that a model does
not need. So the front page is not run here, and libraries that are not installed are replaced by mocks.

Shapes: B streams, T feature frames (100 Hz), S output frames (25 Hz), F mel bins, D encoder width.
"""

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock, patch

import torch
from torch import Tensor, nn

from ssm_asr import units
from ssm_asr.encoder.subsampling import CHUNK_OVERLAP
from ssm_asr.encoder.zipformer import ZipformerConfig
from ssm_asr.transducer.model import EncoderConfig

INSTALL = "pip install --no-deps zipformer==0.1.3"
WITHOUT_FRONT_PAGE = ("zipformer", "zipformer.bin")
NOT_NEEDED = ("atdataset", "ssentencepiece", "kaldialign")

# A stream takes features of a chunk (B, 2C + 13, F), returns output frames (B, C/2, D), and keeps its state.
Stream = Callable[[Tensor], Tensor]


class PeerMissing(ValueError):
    """This error means that the package cannot be found; its message is one line."""


def register(folder: Path | None = None) -> None:
    """Makes the modules of the package importable.

    Args:
        folder: the folder `zipformer` of the unpacked wheel; None finds the installed package.

    Raises:
        PeerMissing: if it is not there.
    """
    if folder is None:
        spec = importlib.util.find_spec("zipformer")
        folder = next((Path(path) for path in (spec and spec.submodule_search_locations) or ()), None)
        if folder is None:
            raise PeerMissing(f"the package zipformer is not installed; {INSTALL}")
    if not folder.is_dir():
        raise PeerMissing(f"{folder}: no such folder; {INSTALL}")
    for name in WITHOUT_FRONT_PAGE:
        path = [str(folder.joinpath(*name.split(".")[1:]))]
        if name in sys.modules and list(sys.modules[name].__path__) == path:
            continue  # modules that were imported from this folder stay
        spec = ModuleSpec(name, None, is_package=True)
        spec.submodule_search_locations = path
        module = ModuleType(name)
        module.__path__, module.__spec__ = path, spec
        sys.modules[name] = module
    for name in NOT_NEEDED:
        if name not in sys.modules and importlib.util.find_spec(name) is None:
            sys.modules[name] = MagicMock()


def load(name: str) -> Any:
    """Returns a module of the package, such as modules.model.

    Raises:
        PeerMissing: as `register` does, which need not be called before.
    """
    if any(package not in sys.modules for package in WITHOUT_FRONT_PAGE):
        register()
    return importlib.import_module(f"zipformer.{name}")


@contextmanager
def activations_compiled(compiled: bool) -> Iterator[None]:
    """Decides whether the activations of a model that is made within it are compiled, which they are by default."""
    with patch.dict(os.environ, K2_ONNX_EXPORT="0" if compiled else "1"):  # the package looks at this variable
        yield


def make_encoder(config: EncoderConfig, chunk: int, left_context: int) -> tuple[Any, Any]:
    """Returns the package's front end and encoder in the size of one of this project's configurations.

    Both have the parameter names of this project's, below encoder_embed and encoder.

    Args:
        chunk, left_context: the masking, in frames of 20 ms.

    Raises:
        ValueError: if the package has no encoder of this kind.
    """
    if not isinstance(config, ZipformerConfig) or config.long_range != "nonlin_attention":
        raise ValueError("not the peer's encoder; give a Zipformer")
    dropout = load("modules.scaling").ScheduledFloat((0.0, 0.3), (20000.0, 0.1))
    embed = load("modules.subsampling").Conv2dSubsampling(
        units.NUM_MELS, config.embed_dim, *config.embed_channels, dropout=dropout
    )
    encoder = load("modules.zipformer").Zipformer(
        output_downsampling_factor=units.OUTPUT_SUBSAMPLING,
        downsampling_factor=config.downsampling,
        num_encoder_layers=config.layers,
        encoder_dim=config.dim,
        encoder_unmasked_dim=config.unmasked_dim,
        num_heads=config.heads,
        query_head_dim=(config.query_head_dim,),
        pos_head_dim=(config.pos_head_dim,),
        value_head_dim=(config.value_head_dim,),
        feedforward_dim=config.feedforward_dim,
        cnn_module_kernel=config.conv_kernel,
        pos_dim=config.pos_dim,
        dropout=dropout,
        causal=config.causal,
        chunk_size=(chunk,),
        left_context_frames=(left_context,),
    )
    return embed, encoder


def open_streams(embed: nn.Module, encoder: nn.Module, batch_size: int = 1) -> Stream:
    """Opens new streams of the package's encoder, which take chunks of its first `chunk_size`."""
    streaming = load("modules.model").StreamingEncoderWrapper(encoder, embed)
    states = streaming.get_init_states(batch_size)
    lens_B = torch.full((batch_size,), 2 * streaming.chunk_size + CHUNK_OVERLAP)

    def next_chunk(features_BTF: Tensor) -> Tensor:
        nonlocal states
        out_BSD: Tensor
        out_BSD, _, states = streaming(features_BTF, lens_B, states)
        return out_BSD

    return next_chunk
