"""Times one streaming chunk of encoders in PyTorch on the CPU, beside the PyPI package zipformer.

    python benchmarks/bench_chunk.py --config egs/librispeech/conf/zipformer_m.yaml egs/librispeech/conf/sammo_m.yaml

One stream on one thread, front end and encoder, random weights, torch.inference_mode. The peer is a Zipformer of the
sizes of the first configuration with its weights, and what it gives is compared with ours before anything is timed; it
comes as it is ("peer"), with its activations compiled, and with them plain ("peer, plain"). Each round times a chunk of
every side, one right after the other, and times are those of the processor, since the machine may be busy with other
things: the medians over all rounds count, and a ratio is the median of the ratios within rounds. Configurations without
left context (decode.left_context_frames: 0) keep theirs; all others, and the peer, have --left-context.
"""

import argparse
import importlib
import importlib.util
import os
import statistics
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock, patch

import torch
from torch import Tensor
from tqdm import tqdm

from ssm_asr import units
from ssm_asr.cli.arguments import frames
from ssm_asr.cli.program import positive, run
from ssm_asr.config import ConfigError, load_experiment
from ssm_asr.encoder.subsampling import CHUNK_OVERLAP
from ssm_asr.encoder.zipformer import ZipformerConfig
from ssm_asr.transducer.model import ModelConfig, Transducer

VOCAB_SIZE = 500
CHUNKS_COMPARED = 4
TOLERANCE = 1e-4

# Features of a chunk (1, 2C + 13, F) -> output frames (1, C/2, D); keeps its state from call to call.
Stream = Callable[[Tensor], Tensor]


def our_stream(model: Transducer, left_context: int) -> Stream:
    """A new stream of one of the project's models."""
    state = model.init_state(1, left_context)

    def next_chunk(features_1TF: Tensor) -> Tensor:
        nonlocal state
        out_1SD, state = model.stream(features_1TF, state)
        return out_1SD

    return next_chunk


def peer_module(name: str) -> Any:
    """A module of the package zipformer without running its __init__.py, which imports all of training.

    Raises:
        ValueError: if the package is not installed.
    """
    found = importlib.util.find_spec("zipformer")
    if found is None:
        raise ValueError("zipformer: not installed; pip install --no-deps zipformer, or give --no-peer")
    package: Any = types.ModuleType("zipformer")
    package.__path__, package.__spec__ = found.submodule_search_locations, found
    sys.modules["zipformer"] = package
    sys.modules.setdefault("atdataset", MagicMock())  # reads data
    return importlib.import_module(f"zipformer.{name}")


def peer_stream(config: ZipformerConfig, weights: dict[str, Tensor], chunk: int, left_context: int) -> Stream:
    """A new stream of the peer's encoder, with the weights of one of ours."""
    modules = peer_module("modules.model")
    embed = modules.Conv2dSubsampling(units.NUM_MELS, config.embed_dim, *config.embed_channels)
    encoder = modules.Zipformer(
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
        causal=True,
        chunk_size=(chunk,),
        left_context_frames=(left_context,),
    )
    streaming = modules.StreamingEncoderWrapper(encoder, embed).eval()
    streaming.load_state_dict({name: x for name, x in weights.items() if name.startswith("encoder")})
    states = streaming.get_init_states(1)
    lens_1 = torch.tensor([2 * chunk + CHUNK_OVERLAP])

    def next_chunk(features_1TF: Tensor) -> Tensor:
        nonlocal states
        out_1SD, _, states = streaming(features_1TF, lens_1, states)
        return out_1SD

    return next_chunk


def make_sides(options: argparse.Namespace, chunk: int) -> dict[str, Stream]:
    """All that is to be timed, new streams; the first configuration first, then the peer."""
    sides: dict[str, Stream] = {}
    for path in options.config:
        experiment = load_experiment(path)
        torch.manual_seed(0)
        model = Transducer(experiment.model, VOCAB_SIZE).eval()
        left_context = options.left_context if experiment.decode.left_context_frames else 0
        sides[path.stem] = our_stream(model, left_context)
        if path == options.config[0] and not options.no_peer:
            add_peers(sides, path, experiment.model, model.state_dict(), chunk, options.left_context)
    return sides


def add_peers(
    sides: dict[str, Stream], path: Path, config: ModelConfig, weights: dict[str, Tensor], chunk: int, left_context: int
) -> None:
    """Adds the peer in both forms, once they give what the side of this configuration gives.

    Raises:
        ValueError: if they do not, or the configuration is one that the peer does not have.
    """
    encoder = config.encoder
    if not isinstance(encoder, ZipformerConfig) or encoder.long_range != "nonlin_attention":
        raise ValueError(f"{path}: not the peer's encoder; give a Zipformer first, or --no-peer")
    for name, plain in (("peer", "0"), ("peer, plain", "1")):
        with patch.dict(os.environ, K2_ONNX_EXPORT=plain):  # what the package looks at before it compiles
            sides[name] = peer_stream(encoder, weights, chunk, left_context)
    for features_1TF in random_chunks(chunk, CHUNKS_COMPARED):
        ours, *peers = (sides[name](features_1TF) for name in (path.stem, "peer", "peer, plain"))
        for peer in peers:
            error = float((peer - ours).abs().max() / ours.abs().max())
            if not error < TOLERANCE:
                raise ValueError(f"{path}: the peer's output differs by {error:.1e} of the largest; nothing is timed")


def random_chunks(chunk: int, count: int) -> Tensor:
    """(count, 1, 2C + 13, F)"""
    return torch.randn(count, 1, 2 * chunk + CHUNK_OVERLAP, units.NUM_MELS)


def measure(sides: dict[str, Stream], chunk: int, rounds: int) -> dict[str, list[float]]:
    """The milliseconds of each side's chunk, by round; every other round goes through the sides backwards."""
    times_ms: dict[str, list[float]] = {name: [] for name in sides}
    for number in tqdm(range(-3, rounds), desc=f"chunk {chunk}", leave=False, disable=None):
        (features_1TF,) = random_chunks(chunk, 1)
        for name in list(sides)[:: 1 if number % 2 else -1]:
            start = time.process_time()
            sides[name](features_1TF)
            if number >= 0:
                times_ms[name].append((time.process_time() - start) * 1000)
    return times_ms


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", nargs="+", required=True, type=Path, help="YAML files of experiments")
    parser.add_argument(
        "--chunk-frames",
        nargs="+",
        type=frames,
        metavar="TIME",
        default=[16, 32, 64],
        help="with units, such as 320ms, or in frames of 20 ms (default: 320ms 640ms 1280ms)",
    )
    parser.add_argument(
        "--left-context", type=frames, metavar="TIME", default="2560ms", help="likewise (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=positive, default=30, help="chunks timed of each side (default: 30)")
    parser.add_argument("--no-peer", action="store_true", help="without the package zipformer")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, 1 thread, left context {options.left_context}")
    print(f"{'chunk':<10}{'side':<24}{'ms':>8}{'least':>8}{'x real time':>13}{'of peer':>9}{'of plain':>9}")
    try:
        for chunk in options.chunk_frames:
            with torch.inference_mode():
                times_ms = measure(make_sides(options, chunk), chunk, options.rounds)
            for name, side_ms in times_ms.items():
                median_ms = statistics.median(side_ms)
                row = f"{units.chunk_ms(chunk)} ms".ljust(10) + f"{name:<24}{median_ms:8.1f}{min(side_ms):8.1f}"
                row += f"{units.chunk_ms(chunk) / median_ms:13.1f}"
                for peer in ("peer", "peer, plain"):
                    if peer in times_ms:
                        ratios = [a / b for a, b in zip(side_ms, times_ms[peer], strict=True)]
                        row += f"{statistics.median(ratios):9.2f}"
                print(row)
    except (ConfigError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
