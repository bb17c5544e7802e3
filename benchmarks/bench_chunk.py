"""Times one streaming chunk of encoders in PyTorch on the CPU, beside the PyPI package zipformer.

    python benchmarks/bench_chunk.py --config egs/librispeech/conf/zipformer_m.yaml egs/librispeech/conf/sammo_m.yaml

One stream runs on one thread through front end and encoder, with random weights and features, in torch.inference_mode.
The peer is the package's Zipformer in the sizes of the first configuration and with its weights. Before anything is
timed, its outputs are compared with ours. It is timed as it comes ("peer"), which compiles its activations, and with
plain ones ("peer, plain").

Each round times a chunk of every side, one right after the other. Times are processor times, since other programs may
run. The table has the median and the least over all rounds; a ratio is the median of the ratios within rounds.
Configurations without left context (decode.left_context_frames: 0) keep theirs; all others, and the peer, have
--left-context.

Shapes: C frames of a chunk (20 ms), S output frames (40 ms), T feature frames (10 ms), F mel bins, D encoder width.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that `benchmarks` is found when this file is run by its path

from benchmarks import peer
from ssm_asr import units
from ssm_asr.cli.arguments import frames
from ssm_asr.cli.program import positive, run
from ssm_asr.config import ConfigError, load_experiment
from ssm_asr.encoder.subsampling import CHUNK_OVERLAP
from ssm_asr.transducer.model import ModelConfig, Transducer

VOCAB_SIZE = 500
CHUNKS_COMPARED = 4
WARM_UP_ROUNDS = 3
TOLERANCE = 1e-4


def our_stream(model: Transducer, left_context: int) -> peer.Stream:
    """Opens a new stream of one of the project's models."""
    state = model.init_state(1, left_context)

    def next_chunk(features_1TF: Tensor) -> Tensor:
        nonlocal state
        out_1SD, state = model.stream(features_1TF, state)
        return out_1SD

    return next_chunk


def peer_stream(config: ModelConfig, weights: dict[str, Tensor], chunk: int, left_context: int) -> peer.Stream:
    """Opens a new stream of the peer's encoder, which gets the weights of one of ours."""
    embed, encoder = peer.make_encoder(config.encoder, chunk, left_context)
    for part, name in ((embed, "encoder_embed."), (encoder, "encoder.")):
        part.load_state_dict({key.removeprefix(name): x for key, x in weights.items() if key.startswith(name)})
    return peer.open_streams(embed.eval(), encoder.eval())


def make_sides(options: argparse.Namespace, chunk: int) -> dict[str, peer.Stream]:
    """Opens new streams of all that is to be timed: the first configuration, the peer, the other configurations."""
    sides: dict[str, peer.Stream] = {}
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
    sides: dict[str, peer.Stream],
    path: Path,
    config: ModelConfig,
    weights: dict[str, Tensor],
    chunk: int,
    left_context: int,
) -> None:
    """Adds the peer in both forms after comparing them with the side of this configuration.

    Raises:
        ValueError: if the outputs differ, the package is not installed, or it has no encoder of this kind.
    """
    for name, compiled in (("peer", True), ("peer, plain", False)):
        try:
            with peer.activations_compiled(compiled):
                sides[name] = peer_stream(config, weights, chunk, left_context)
        except ValueError as reason:
            raise ValueError(f"{path}: {reason}, or --no-peer") from None
    for features_1TF in random_chunks(chunk, CHUNKS_COMPARED):
        ours, *peers = (sides[name](features_1TF) for name in (path.stem, "peer", "peer, plain"))
        for theirs in peers:
            error = float((theirs - ours).abs().max() / ours.abs().max())
            if not error < TOLERANCE:
                raise ValueError(f"{path}: the peer's output differs by {error:.1e} of the largest; nothing is timed")


def random_chunks(chunk: int, count: int) -> Tensor:
    """Returns random features of chunks, (count, 1, 2C + 13, F)."""
    return torch.randn(count, 1, 2 * chunk + CHUNK_OVERLAP, units.NUM_MELS)


def measure(sides: dict[str, peer.Stream], chunk: int, rounds: int) -> dict[str, list[float]]:
    """Returns the milliseconds of each side's chunk by round; every other round takes the sides in reverse order."""
    times_ms: dict[str, list[float]] = {name: [] for name in sides}
    for number in tqdm(range(-WARM_UP_ROUNDS, rounds), desc=f"chunk {chunk}", leave=False, disable=None):
        (features_1TF,) = random_chunks(chunk, 1)
        for name in list(sides)[:: 1 if number % 2 else -1]:
            start = time.process_time()
            sides[name](features_1TF)
            if number >= 0:
                times_ms[name].append((time.process_time() - start) * 1000)
    return times_ms


def print_rows(chunk: int, times_ms: dict[str, list[float]]) -> None:
    """Prints a row for each side of one chunk width."""
    for name, side_ms in times_ms.items():
        median_ms = statistics.median(side_ms)
        row = f"{units.chunk_ms(chunk)} ms".ljust(10) + f"{name:<24}{median_ms:8.1f}{min(side_ms):8.1f}"
        row += f"{units.chunk_ms(chunk) / median_ms:13.1f}"
        for other in ("peer", "peer, plain"):
            if other in times_ms:
                ratios = [a / b for a, b in zip(side_ms, times_ms[other], strict=True)]
                row += f"{statistics.median(ratios):9.2f}"
        print(row)


def main() -> int:
    """Runs the program."""
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
    parser.add_argument("--no-peer", action="store_true", help="time our models only, without the package zipformer")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, 1 thread, left context {options.left_context}")
    print(f"{'chunk':<10}{'side':<24}{'ms':>8}{'least':>8}{'x real time':>13}{'of peer':>9}{'of plain':>9}")
    try:
        for chunk in options.chunk_frames:
            with torch.inference_mode():
                print_rows(chunk, measure(make_sides(options, chunk), chunk, options.rounds))
    except (ConfigError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
