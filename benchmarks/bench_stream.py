"""Measures what a stream costs in sherpa-onnx on one core.

    python benchmarks/bench_stream.py [--config FILE …] [--left TIME,…]

Models of the given configurations, with random weights, are exported and run by stock sherpa-onnx on one thread, with a
process for each number of concurrent streams. The audio is noise. In every round each stream gets the audio of one
chunk, and all streams are decoded together. The program prints a Markdown table with a row for each model, precision,
left context and number of streams. A latency is the time of a round, after which the last stream has its text; the
real-time factor counts the CPU time of the process.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import sherpa_onnx
import torch
from tqdm import tqdm

from ssm_asr import units
from ssm_asr.cli.arguments import frames, frames_list
from ssm_asr.cli.program import positive, positives, run
from ssm_asr.config import Experiment, load_experiment
from ssm_asr.exporting.onnx_files import PRECISIONS, convert, file_name, write_onnx
from ssm_asr.exporting.parts import decoder, joiner, packed_encoder
from ssm_asr.search.encoding import streaming_context
from ssm_asr.transducer.model import Transducer

CONF = Path(__file__).parent.parent / "egs" / "librispeech" / "conf"
CONFIGS = [CONF / "sammo_m.yaml", CONF / "zipformer_m.yaml"]
PARTS = ("encoder", "decoder", "joiner")
WARM_UP_ROUNDS = 2
LEAST_ROUNDS = 5
HEADER = (
    "| model | precision | left context ms | state MiB a stream | streams | audio s a second | resident MiB "
    "| p50 ms a chunk | p99 | rounds | real-time factor (CPU) |"
)


def export_random(
    experiment: Experiment, chunk: int, left_context: int, precision: str, vocab_size: int, out: Path
) -> float:
    """Exports a model with random weights and returns the MiB of a stream's state.

    Args:
        chunk, left_context: in frames of 20 ms.
    """
    torch.manual_seed(0)
    model = Transducer(experiment.model, vocab_size).eval()
    encoder = packed_encoder(model, chunk, left_context)
    out.mkdir()
    for part in (encoder, decoder(model), joiner(model)):
        full = out / file_name(part.name, "fp32")
        write_onnx(part, full)
        if precision != "fp32":
            convert(full, precision, out / file_name(part.name, precision))
    symbols = ["<blk>", *(f"▁{i}" for i in range(1, vocab_size))]
    (out / "tokens.txt").write_text("".join(f"{s} {i}\n" for i, s in enumerate(symbols)), encoding="utf-8")
    return int(encoder.metadata["d_model"]) * 4 / 2**20


def resident_mb() -> float:
    """Returns the MiB of this process that are in RAM."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def run_streams(directory: Path, precision: str, chunk: int, streams: int, seconds: float) -> dict[str, float]:
    """Decodes in rounds for a number of seconds; returns the times of rounds and the memory of model and streams.

    Args:
        chunk: the audio that each stream gets in a round, in frames of 20 ms.
    """
    files = {part: str(directory / file_name(part, precision)) for part in PARTS}
    before_mb = resident_mb()
    recognizer = sherpa_onnx.OnlineRecognizer.from_transducer(
        **files, tokens=str(directory / "tokens.txt"), num_threads=1
    )
    open_streams = [recognizer.create_stream() for _ in range(streams)]
    rng = np.random.default_rng(0)
    # This is the audio of one chunk, so after the first rounds every stream has exactly one chunk to decode.
    samples_S = rng.normal(0, 0.05, units.chunk_ms(chunk) * units.SAMPLE_RATE_HZ // 1000).astype(np.float32)
    times_ms: list[float] = []
    started = started_cpu = 0.0
    while len(times_ms) < WARM_UP_ROUNDS + LEAST_ROUNDS or time.perf_counter() - started < seconds:
        begin = time.perf_counter()
        for stream in open_streams:
            stream.accept_waveform(units.SAMPLE_RATE_HZ, samples_S)
        ready = [stream for stream in open_streams if recognizer.is_ready(stream)]
        if not ready:
            continue
        recognizer.decode_streams(ready)
        times_ms.append(1000 * (time.perf_counter() - begin))
        if len(times_ms) == WARM_UP_ROUNDS:
            started, started_cpu = time.perf_counter(), time.process_time()
    cpu_s = time.process_time() - started_cpu  # unlike the times of rounds, it does not include waiting
    times_ms = times_ms[WARM_UP_ROUNDS:]
    return {
        "audio_s_a_second": streams * units.chunk_ms(chunk) / float(np.mean(times_ms)),
        "resident_mb": resident_mb() - before_mb,
        "p50_ms": float(np.quantile(times_ms, 0.5)),
        "p99_ms": float(np.quantile(times_ms, 0.99)),
        "rounds": len(times_ms),
        "real_time_factor": 1000 * cpu_s / (len(times_ms) * streams * units.chunk_ms(chunk)),
    }


def measure(directory: Path, options: argparse.Namespace, precision: str, chunk: int, streams: int) -> dict[str, float]:
    """Calls `run_streams` in a process of its own, whose memory is not used by other runs."""
    arguments = ["--run", directory, "--precision", precision, "--chunk", chunk, "--streams", streams]
    command = [sys.executable, __file__, *map(str, arguments), "--seconds", str(options.seconds)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def left_contexts(experiment: Experiment, chunk: int, asked: list[int]) -> list[int]:
    """Returns the left contexts to measure; a model that is trained without left context has 0 only."""
    encoder = experiment.model.encoder
    asked = [0] if encoder.left_context_frames == (0,) else asked
    return sorted({streaming_context(encoder, chunk, left) for left in asked})


def main(arguments: list[str] | None = None) -> int:
    """Runs the program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", nargs="+", type=Path, default=CONFIGS, help="default: sammo_m and zipformer_m")
    parser.add_argument(
        "--left",
        type=frames_list,
        metavar="TIME,…",
        default="1280ms,2560ms,5120ms",
        help="left contexts, with units or in frames of 20 ms (default: %(default)s)",
    )
    parser.add_argument("--streams", type=positives, default="1,8,32,128", help="at once (default: 1,8,32,128)")
    parser.add_argument("--chunk", type=frames, metavar="TIME", default="320ms", help="likewise (default: %(default)s)")
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, default=["fp32"], help="default: fp32")
    parser.add_argument("--vocab-size", type=positive, default=500, help="tokens (default: 500)")
    parser.add_argument("--seconds", type=float, default=15.0, help="time for each row (default: 15)")
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)  # the process that measures one row
    options = parser.parse_args(arguments)
    if options.run:
        result = run_streams(options.run, options.precision[0], options.chunk, options.streams[0], options.seconds)
        print(json.dumps(result))
        return 0
    try:
        models = [(path.stem, load_experiment(path)) for path in options.config]
        cells = [
            (name, experiment, left, precision)
            for name, experiment in models
            for left in left_contexts(experiment, options.chunk, options.left)
            for precision in options.precision
        ]
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    rows = [HEADER, "|---" * HEADER.count(" |") + "|"]
    with tempfile.TemporaryDirectory() as temporary, tqdm(total=len(cells) * len(options.streams), unit="row") as bar:
        for k, (name, experiment, left, precision) in enumerate(cells):
            directory = Path(temporary) / str(k)
            state_mb = export_random(experiment, options.chunk, left, precision, options.vocab_size, directory)
            for streams in options.streams:
                bar.set_description(f"{name}, left {left}, {streams} streams")
                row = measure(directory, options, precision, options.chunk, streams)
                rows.append(
                    f"| {name} | {precision} | {units.chunk_ms(left)} | {state_mb:.2f} | {streams} "
                    f"| {row['audio_s_a_second']:.1f} | {row['resident_mb']:.0f} | {row['p50_ms']:.1f} "
                    f"| {row['p99_ms']:.1f} | {row['rounds']} | {row['real_time_factor']:.3f} |"
                )
                bar.update()
    print(f"chunk {units.chunk_ms(options.chunk)} ms, {options.vocab_size} tokens, random weights, one thread\n")
    print("\n".join(rows))
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
