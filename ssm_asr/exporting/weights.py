"""Writes weights under the names that icefall gives them, so that icefall or any other program can load them."""

from pathlib import Path

import safetensors.torch

from ssm_asr.checkpoint import Loaded
from ssm_asr.encoder.zipformer import ZipformerConfig
from ssm_asr.transducer.model import ModelConfig


def export_weights(loaded: Loaded, out: Path) -> None:
    """Writes model.safetensors into a directory.

    The weights of a Zipformer with nonlin attention have the names and shapes of icefall's; `icefall_options` gives the
    options with which icefall builds this model. Other encoders have parameters that icefall does not know.

    Args:
        loaded: an opened checkpoint.
        out: an existing directory.
    """
    weights = {name: value.contiguous() for name, value in loaded.model.state_dict().items()}
    path = out / "model.safetensors"
    # Files that safetensors.torch.save_file makes can only be read by their owner.
    path.write_bytes(safetensors.torch.save(weights, metadata={"format": "pt"}))


def icefall_options(config: ModelConfig) -> list[str]:
    """Returns the options with which icefall's zipformer programs (train, decode, export) build this model.

    Raises:
        ValueError: if icefall cannot build this model.
    """
    encoder = config.encoder
    if not isinstance(encoder, ZipformerConfig) or encoder.long_range != "nonlin_attention":
        raise ValueError("icefall has no such encoder; only a Zipformer with nonlin attention can be loaded there")
    if encoder.embed_channels != ZipformerConfig.embed_channels:
        raise ValueError(
            f"icefall's front end has {ZipformerConfig.embed_channels} channels, not encoder.embed_channels"
        )
    options: dict[str, int | tuple[int, ...]] = {
        "num-encoder-layers": encoder.layers,
        "downsampling-factor": encoder.downsampling,
        "encoder-dim": encoder.dim,
        "encoder-unmasked-dim": encoder.unmasked_dim,
        "feedforward-dim": encoder.feedforward_dim,
        "num-heads": encoder.heads,
        "cnn-module-kernel": encoder.conv_kernel,
        "query-head-dim": encoder.query_head_dim,
        "value-head-dim": encoder.value_head_dim,
        "pos-head-dim": encoder.pos_head_dim,
        "pos-dim": encoder.pos_dim,
        "decoder-dim": config.predictor_dim,
        "joiner-dim": config.joiner_dim,
        "context-size": config.context_size,
        "causal": int(encoder.causal),
        "use-ctc": int(config.ctc),
    }
    values = {name: ",".join(map(str, v)) if isinstance(v, tuple) else str(v) for name, v in options.items()}
    return [part for name, value in values.items() for part in (f"--{name}", value)]
