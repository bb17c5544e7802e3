"""Weights under the names that icefall gives them, to be loaded there or anywhere else."""

from pathlib import Path

import safetensors.torch

from ssm_asr.checkpoint import Loaded
from ssm_asr.encoder.zipformer import ZipformerConfig
from ssm_asr.transducer.model import ModelConfig


def export_weights(loaded: Loaded, out: Path) -> None:
    """Writes model.safetensors into a directory.

    A Zipformer with nonlin attention has all the names and shapes of icefall's own; `icefall_options` says how that
    program must be started to take them. Other encoders have parameters that icefall does not know.
    """
    weights = {name: value.contiguous() for name, value in loaded.model.state_dict().items()}
    path = out / "model.safetensors"
    path.write_bytes(safetensors.torch.save(weights, metadata={"format": "pt"}))  # save_file lets nobody else read it


def icefall_options(config: ModelConfig) -> list[str]:
    """The options of icefall's zipformer programs (train, decode, export) that describe this model.

    Raises:
        ValueError: if the model is none of icefall's.
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
