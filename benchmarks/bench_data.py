"""Times how fast batches come, in seconds of audio per second, through the sampler and loader that training uses.

    python benchmarks/bench_data.py                                       on noise, in a temporary directory
    python benchmarks/bench_data.py --cuts DATA/cuts_train.jsonl.gz --tokens DATA/tokens --config FILE

Without --cuts, utterances of noise, 5 - 15 s long in FLAC, at three speeds, are prepared in three ways: features on
the fly, stored in a file for each cut, and stored in shards. Files are read repeatedly, so they come from memory: the
speed of the disk is not measured. The report says for each source of cuts:
  processor time   what one process that does everything spends on 1000 s of audio, in ms, and on what. Other programs
                   disturb it little. From it follows how many workers keep up with --needed seconds of audio a second.
                   Features are computed and augmented on the --device, by the workers if that is the CPU
  delivered        how many seconds of audio N workers deliver in a second, and how many the training process itself can
                   take, since it draws what is in a batch and receives it, which more workers do not make faster
  once             what reading and filtering the cuts takes
  to resume        what resumed training spends on each batch that it passes over
"""

import argparse
import cProfile
import math
import pstats
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from lhotse import CutSet, MonoCut, Recording, SupervisionSegment
from tqdm import tqdm

from ssm_asr.cli.program import positive, run
from ssm_asr.config import load_experiment
from ssm_asr.data.batches import Batch, train_batches
from ssm_asr.data.config import DataConfig
from ssm_asr.data.filtering import filter_cuts
from ssm_asr.data.store import prepare_cuts, read_cuts
from ssm_asr.data.tokens import Tokenizer, train_tokenizer
from ssm_asr.ops.devices import find_device
from ssm_asr.units import FRAME_SHIFT_MS, SAMPLE_RATE_HZ

CUTS_TO_WEIGH = 1000
MOST_BATCHES = 1000  # no measurement takes more batches of a source
WORDS = ["ONE", "TWO", "THREE", "FOUR"]
FORMS: dict[str, dict[str, Any]] = {
    "on the fly": {"on_the_fly": True},
    "stored": {"on_the_fly": False},
    "shards": {"on_the_fly": False, "shar": True},
}
# The parts of the work, each with the end of a file's path and a function in that file.
PARTS = {
    "read audio": ("data/features.py", "cut_source"),
    "read features": ("features/base.py", "load"),
    "draw augmentation": ("data/augment.py", "utterance"),
    "sampler": ("sampling/base.py", "__next__"),
    "padding": ("utils/rnn.py", "pad_sequence"),
    "make features": ("data/batches.py", "finish"),
}


def made_corpus(directory: Path, num_utterances: int) -> Path:
    """Makes utterances of noise of 5 - 15 s with random transcripts, and returns their manifest."""
    rng = np.random.default_rng(1)
    cuts = []
    for k in tqdm(range(num_utterances), desc="making utterances", leave=False, disable=None):
        name, path = f"utt{k:05d}", directory / f"utt{k:05d}.flac"
        samples_S = 0.1 * rng.standard_normal(round(rng.uniform(5.0, 15.0) * SAMPLE_RATE_HZ))
        soundfile.write(path, samples_S, SAMPLE_RATE_HZ)
        recording = Recording.from_file(path, recording_id=name)
        segment = SupervisionSegment(name, name, 0.0, recording.duration, text=" ".join(rng.choice(WORDS, 20)))
        cuts.append(MonoCut(name, 0.0, recording.duration, 0, supervisions=[segment], recording=recording))
    CutSet.from_cuts(cuts).to_file(directory / "cuts.jsonl.gz")
    return directory / "cuts.jsonl.gz"


class Source:
    """A source is one form of the training data."""

    def __init__(
        self,
        path: Path,
        tokenizer: Tokenizer,
        config: DataConfig,
        noise_cuts: CutSet | None,
        device: torch.device,
    ) -> None:
        self.tokenizer, self.config, self.noise_cuts, self.device = tokenizer, config, noise_cuts, device
        start = time.process_time()
        self.cuts = read_cuts(path).to_eager()
        self.read_us = (time.process_time() - start) * 1e6 / len(self.cuts)
        tracemalloc.start()
        some = list(islice(read_cuts(path), CUTS_TO_WEIGH))
        self.cut_kb = tracemalloc.get_traced_memory()[0] / 1000 / len(some)
        tracemalloc.stop()
        start = time.process_time()
        self.cuts, _ = filter_cuts(self.cuts, tokenizer, config)
        self.filter_us = (time.process_time() - start) * 1e6 / len(self.cuts)
        self.total_s = sum(cut.duration for cut in self.cuts)

    def batches(self, num_workers: int, start_batch: int = 0) -> Iterator[Batch]:
        """Yields more batches than any measurement takes, from the given one on."""
        repeats = math.ceil(MOST_BATCHES * self.config.max_duration_s / self.total_s)
        return train_batches(
            self.cuts.repeat(times=repeats),
            replace(self.config, num_workers=num_workers),
            self.tokenizer,
            epoch=1,
            seed=1,
            start_batch=start_batch,
            noise_cuts=self.noise_cuts,
            device=self.device,
        )


def audio_s(batch: Batch) -> float:
    """Returns the seconds of audio in a batch."""
    return float(batch.feature_lens_B.sum()) * FRAME_SHIFT_MS / 1000


def take(batches: Iterator[Batch], count: int, task: str) -> float:
    """Takes a number of batches, and returns the seconds of audio in them."""
    bar = tqdm(islice(batches, count), desc=task, total=count, unit="batch", leave=False, disable=None)
    return sum(audio_s(batch) for batch in bar)


def processor_times(source: Source, num_batches: int) -> dict[str, float]:
    """Returns the ms that one process spends on 1000 s of audio: in all, and on each of PARTS."""
    batches = source.batches(0)
    next(batches)  # fills the sampler's buffer
    start = time.process_time()
    seconds = take(batches, num_batches, "timing one process")
    times = {"all": time.process_time() - start}
    profile = cProfile.Profile(time.process_time)  # it slows small functions down, so it serves the parts only
    with profile:
        profiled_s = take(batches, num_batches, "profiling")
    statistics = pstats.Stats(profile).stats  # type: ignore[attr-defined]
    for part, (file_end, name) in PARTS.items():
        found = [entry[3] for key, entry in statistics.items() if key[0].endswith(file_end) and key[2] == name]
        times[part] = max(found, default=0.0) * seconds / profiled_s
    return {part: spent_s * 1e6 / seconds for part, spent_s in times.items()}


def delivered(source: Source, num_workers: int, num_batches: int) -> tuple[float, float]:
    """Returns how many seconds of audio come in a second from the workers, and how many this process could take."""
    batches = source.batches(num_workers)
    # These batches are not timed: the workers start, and what they made in advance is used up.
    take(batches, 4 * num_workers, f"starting {num_workers} workers")
    start, own_start = time.perf_counter(), time.process_time()
    seconds = take(batches, num_batches, f"timing {num_workers} workers")
    return seconds / (time.perf_counter() - start), seconds / (time.process_time() - own_start)


def passing_ms(source: Source, num_batches: int = 500) -> float:
    """Returns the ms that resumed training spends on each batch that it passes over."""
    first_ms: list[float] = []
    last_ms: list[float] = []
    for times_ms, start_batch in 3 * [(first_ms, 0), (last_ms, num_batches)]:
        start = time.process_time()
        next(source.batches(0, start_batch))
        times_ms.append((time.process_time() - start) * 1000)
    return (min(last_ms) - min(first_ms)) / num_batches


def report(name: str, source: Source, options: argparse.Namespace) -> None:
    """Measures a source and prints the results."""
    times_ms = processor_times(source, options.batches)
    needed_s = options.needed
    print(f"\n{name}")
    parts = ", ".join(f"{part} {ms:.0f}" for part, ms in times_ms.items() if part != "all" and ms >= 0.5)
    print(f"  processor time: {times_ms['all']:.0f} ms for 1000 s of audio ({parts})")
    print(f"  to keep up with {needed_s:g} s/s: {math.ceil(needed_s * times_ms['all'] / 1e6)} workers, each on a core")
    for num_workers in options.workers:
        rate, most = delivered(source, num_workers, options.batches)
        print(f"  delivered by {num_workers}: {rate:.0f} s/s; the training process can take {most:.0f} s/s")
    print(
        f"  once: {source.read_us:.0f} µs and {source.cut_kb:.1f} KB a cut to read, {source.filter_us:.0f} µs to filter"
    )
    print(f"  to resume: {passing_ms(source):.2f} ms a batch passed over")


def measure(options: argparse.Namespace) -> None:
    """Reports on the cuts that were given, or on made ones.

    Raises:
        ValueError: if the configuration, tokens or cuts cannot be used.
    """
    config = load_experiment(options.config).data if options.config else DataConfig(max_duration_s=100.0)
    noise_cuts = read_cuts(options.noise_cuts).to_eager() if options.noise_cuts else None
    device = find_device(options.device)
    print(f"torch {torch.__version__}, {device}, batches of {config.max_duration_s:g} s")
    if options.cuts:
        tokenizer = Tokenizer.load(options.tokens)
        for path in options.cuts:
            report(str(path), Source(path, tokenizer, config, noise_cuts, device), options)
        return
    with tempfile.TemporaryDirectory() as directory:
        corpus, tokenizer = made_corpus(Path(directory), options.utterances), train_tokenizer(WORDS, "word")
        for name, form in FORMS.items():
            out = Path(directory, name)
            path = prepare_cuts(corpus, out, speed_perturb=True, shuffle=True, num_jobs=1, **form)
            report(name, Source(path, tokenizer, config, noise_cuts, device), options)


def main() -> int:
    """Runs the program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cuts", nargs="+", type=Path, help="manifests or directories of shards (default: made)")
    parser.add_argument("--tokens", type=Path, help="directory that 'prepare tokens' wrote, for --cuts")
    parser.add_argument("--noise-cuts", type=Path, help="cuts of noise to mix in (default: none)")
    parser.add_argument("--config", type=Path, help="YAML file of the experiment (default: batches of 100 s)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    parser.add_argument("--workers", nargs="*", type=positive, default=[1, 2], help="how many to try (default: 1 2)")
    parser.add_argument("--batches", type=positive, default=20, help="batches to time (default: 20)")
    parser.add_argument("--utterances", type=positive, default=200, help="to make (default: 200)")
    parser.add_argument("--needed", type=float, default=10000.0, help="seconds of audio a second (default: 10000)")
    options = parser.parse_args()
    if options.cuts and not options.tokens:
        parser.error("--cuts needs --tokens")
    torch.set_num_threads(1)
    try:
        measure(options)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
