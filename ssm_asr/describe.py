"""Describe a model: python -m ssm_asr.describe --config FILE --vocab-size V [--chunk C --left L] [--json]

Prints parameters by part, the streaming state that each stream costs, frame rates and look-ahead. No weights are made.
With --yaml instead of --vocab-size, prints the whole configuration: every field, also those that have their defaults.
"""

import argparse
import json
import sys
from typing import Any

import torch

from ssm_asr import units
from ssm_asr.config import Experiment, load_experiment, to_yaml
from ssm_asr.encoder.state import state_sizes
from ssm_asr.encoder.subsampling import CHUNK_OVERLAP
from ssm_asr.program import run
from ssm_asr.search.recognizer import streaming_context
from ssm_asr.transducer.model import Transducer

FLOAT_BYTES = 4


def describe(experiment: Experiment, vocab_size: int, chunk: int, left_context: int) -> dict[str, Any]:
    """Sizes and rates of a model; chunk and left context in frames of 20 ms.

    Returns:
        parameters, parameters_by_part; for a causal model also state_floats, state_bytes (in float32),
        state_floats_by_kind and the times of a chunk.

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
        "state_bytes": FLOAT_BYTES * sum(sizes.values()),
        "state_floats_by_kind": sizes,
    }


def as_text(facts: dict[str, Any]) -> str:
    """The same for a reader."""
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


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="YAML file of the experiment")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=VALUE", help="change one field")
    asked = parser.add_mutually_exclusive_group(required=True)
    asked.add_argument("--vocab-size", type=int, help="tokens, blank included")
    asked.add_argument("--yaml", action="store_true", help="print the whole configuration, and nothing of the model")
    parser.add_argument("--chunk", type=int, help="frames of 20 ms: 16 is 320 ms (default: decode.chunk_frames)")
    parser.add_argument("--left", type=int, help="left context, frames of 20 ms (default: decode.left_context_frames)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(arguments)
    try:
        experiment = load_experiment(options.config, options.set)
        if options.yaml:
            print(to_yaml(experiment), end="")
            return 0
        if options.vocab_size < 1:
            raise ValueError(f"--vocab-size {options.vocab_size}: give 1 or more")
        chunk = experiment.decode.chunk_frames if options.chunk is None else options.chunk
        left = experiment.decode.left_context_frames if options.left is None else options.left
        facts = describe(experiment, options.vocab_size, chunk, left)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    print(json.dumps(facts, indent=2) if options.json else as_text(facts))
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
