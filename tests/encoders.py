"""Toy encoders of every kind, each with the left context it streams with, in frames of 20 ms."""

from typing import Any

import toy

ZIPFORMER: dict[str, Any] = toy.EXPERIMENT["model"]["encoder"]  # type: ignore[index]
SAMMO = ZIPFORMER | {"long_range": "mamba2", "mamba_heads": 4, "mamba_groups": 2, "left_context_frames": [0]}
CONFORMER = {
    "kind": "conformer",
    "layers": 2,
    "dim": 32,
    "heads": 2,
    "feedforward_dim": 64,
    "embed_dim": 32,
    "embed_channels": [4, 4, 8],
    "conv_kernel": 4,
    "rep_length": 8,
    "chunk_frames": [16, -1],
    "left_context_frames": [64, -1],
}
SSMFORMERS = {
    f"{mixer}_{kind}": CONFORMER | {"mixer": mixer, "ssm_param": kind}
    for mixer in ("dir", "com", "rep")
    for kind in ("real", "lin")
}

ENCODERS: dict[str, tuple[dict[str, Any], int]] = {
    "zipformer": (ZIPFORMER, 64),
    "zipformer_left0": (ZIPFORMER, 0),
    "sammo": (SAMMO, 0),
    "sammo_left64": (SAMMO, 64),
    "conformer": (CONFORMER, 64),
    "conformer_left0": (CONFORMER, 0),
    "conformer_none": (CONFORMER | {"mixer": "none"}, 64),
    **{name: (encoder, 64) for name, encoder in SSMFORMERS.items()},
}
