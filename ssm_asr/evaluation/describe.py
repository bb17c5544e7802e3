"""What a model costs: parameters, streaming state, frame rates and look-ahead. Its weights are not made."""

from typing import Any

import torch

from ssm_asr import units
from ssm_asr.config import Experiment
from ssm_asr.encoder.state import state_sizes
from ssm_asr.encoder.subsampling import CHUNK_OVERLAP
from ssm_asr.search.encoding import streaming_context
from ssm_asr.transducer.model import Transducer

FLOAT_BYTES = 4


def state_bytes(state: Any) -> int:
    """Returns the bytes that a stream's state takes in float32."""
    return FLOAT_BYTES * sum(state_sizes(state).values())


def describe(experiment: Experiment, vocab_size: int, chunk: int, left_context: int) -> dict[str, Any]:
    """Computes the sizes and rates of a model.

    Args:
        vocab_size: the number of tokens, blank included.
        chunk, left_context: in frames of 20 ms.

    Returns:
        parameters and parameters_by_part; for a causal model also state_floats, state_bytes (in float32),
        state_floats_by_kind, and the times of a chunk.

    Raises:
        ValueError: if the model cannot stream with this chunk or left context.
    """
    encoder = experiment.model.encoder
    with torch.device("meta"):
        model = Transducer(experiment.model, vocab_size)
        left_context = streaming_context(encoder, chunk, left_context) if encoder.causal else left_context
        state = model.init_state(1, left_context) if encoder.causal else None
    by_part = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    result: dict[str, Any] = {
        "parameters": sum(by_part.values()),
        "parameters_by_part": by_part,
        "vocab_size": vocab_size,
        "frame_rates_hz": [1000 / units.ENCODER_FRAME_MS / factor for factor in encoder.downsampling],
        "output_rate_hz": 1000 / units.OUTPUT_FRAME_MS,
    }
    if state is None:
        return result
    sizes = state_sizes(state)
    look_ahead_ms = CHUNK_OVERLAP * units.FRAME_SHIFT_MS
    return result | {
        "chunk_frames": chunk,
        "chunk_ms": units.chunk_ms(chunk),
        "left_context_frames": left_context,
        "left_context_ms": units.chunk_ms(left_context),
        "look_ahead_ms": look_ahead_ms,
        "largest_delay_ms": units.chunk_ms(chunk) + look_ahead_ms,
        "state_floats": sum(sizes.values()),
        "state_bytes": state_bytes(state),
        "state_floats_by_kind": sizes,
    }


def as_text(facts: dict[str, Any]) -> str:
    """Says for a reader what `describe` returned."""
    lines = [f"parameters {facts['parameters']:>14,}   (vocabulary of {facts['vocab_size']})"]
    lines += [f"  {name:<22} {count:>12,}" for name, count in facts["parameters_by_part"].items()]
    rates = ", ".join(f"{rate:g}" for rate in facts["frame_rates_hz"])
    lines.append(f"frame rates: stacks {rates} Hz, output {facts['output_rate_hz']:g} Hz")
    if "state_floats" not in facts:
        return "\n".join([*lines, "no streaming: encoder.causal is false"])
    lines.append(
        f"chunk {facts['chunk_frames']} frames = {facts['chunk_ms']} ms, left context "
        f"{facts['left_context_frames']} frames = {facts['left_context_ms']} ms, look-ahead "
        f"{facts['look_ahead_ms']} ms; delay of a frame at most {facts['largest_delay_ms']} ms and the computation"
    )
    lines.append(f"streaming state {facts['state_floats']:>12,} floats, {facts['state_bytes']:,} bytes a stream")
    for name, count in facts["state_floats_by_kind"].items():
        lines.append(f"  {name:<16} {count:>10,} floats {FLOAT_BYTES * count:>12,} bytes")
    return "\n".join(lines)
