"""Measures a real training run: how fast it is from the start of its process on, and what it waits for.

    python benchmarks/bench_run.py --seconds 150 -- --config FILE --train-cuts FILE --valid-cuts FILE --tokens DIR

What follows -- are options of `ssm-asr train`; without --exp-dir, the run goes to a directory that is removed. It is an
ordinary run: audio or stored features, noise, augmentation, validation and checkpoints as the configuration says.

The first table has a line for each --every seconds: seconds of audio a second, the share of the time in which the GPU
was busy (by nvidia-smi), and what the main thread did, sampled 100 times a second. Full speed is the median of the last
third of the lines without a validation; below stand the seconds until the first batch and until 80 % of full speed,
both since the process was started.
"""

import argparse
import os
import runpy
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that `ssm_asr` is found when this file is run by its path

from ssm_asr.data.parallel import LOADING, start_server

if __name__ == "__main__":  # as `ssm-asr train` does, before the imports that take seconds
    start_server(LOADING)

from ssm_asr.cli.program import positive, run
from ssm_asr.training.trainer import StepResult, Trainer

# How long the machine had been up when this process started.
PROCESS_START_S = int(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19]) / os.sysconf("SC_CLK_TCK")
SAMPLES_A_SECOND = 100
# What the main thread does while a function of this name, in a file whose path ends so, is running. The first that is
# found counts; a thread that is in none of them does "other" things.
ACTIVITIES = {
    "imports": [("<frozen importlib._bootstrap>", "_find_and_load")],
    "compiles": [("training/compile_ahead.py", "compile_ahead"), ("compiler.py", "compile")],
    "captures": [("training/graphs.py", "__init__")],
    "waits for a batch": [("dataloader.py", "__next__")],
    "makes features": [("data/batches.py", "finish")],
    "waits for losses": [("ops/devices.py", "numbers")],
    "validates": [("trainer.py", "_validate")],
    "saves": [("resume.py", "save"), ("resume.py", "save_to_resume")],
    "launches": [("trainer.py", "step")],
}


class Recorder:
    """Records steps, what the main thread does, and how busy the GPU is, once a run has begun."""

    def __init__(self, main_thread: int) -> None:
        self._main_thread = main_thread
        self.steps: list[tuple[float, float]] = []  # (seconds since the process started, seconds of audio)
        self.doing: list[tuple[float, str]] = []
        self.busy: list[tuple[float, float]] = []
        self._ended = threading.Event()

    def now_s(self) -> float:
        """Returns the seconds since the process started."""
        return time.clock_gettime(time.CLOCK_BOOTTIME) - PROCESS_START_S

    def start(self, seconds: float) -> None:
        """Starts to record; after so many seconds since the process started, the run is asked to stop."""
        threading.Thread(target=self._sample, args=(seconds,), daemon=True).start()
        if shutil.which("nvidia-smi"):
            threading.Thread(target=self._watch_gpu, daemon=True).start()

    def stop(self) -> None:
        """Ends the recording."""
        self._ended.set()

    def _sample(self, seconds: float) -> None:
        while not self._ended.wait(1 / SAMPLES_A_SECOND):
            self.doing.append((self.now_s(), activity(sys._current_frames()[self._main_thread])))
            if self.now_s() > seconds:
                seconds = float("inf")
                os.kill(os.getpid(), signal.SIGINT)

    def _watch_gpu(self) -> None:
        query = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "-lms", "500"]
        query += ["-i", os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]]
        with subprocess.Popen(query, stdout=subprocess.PIPE, text=True) as process:
            for line in process.stdout or ():
                self.busy.append((self.now_s(), float(line)))
                if self._ended.is_set():
                    process.kill()


def activity(frame: Any) -> str:
    """Returns what a thread does, by its stack."""
    stack = []
    while frame is not None:
        stack.append((frame.f_code.co_filename, frame.f_code.co_name))
        frame = frame.f_back
    for name, places in ACTIVITIES.items():
        if any(path.endswith(end) and function == called for path, called in stack for end, function in places):
            return name
    return "other"


def between(records: list[tuple[float, Any]], start_s: float, end_s: float) -> list[Any]:
    """Returns the values of the records of a stretch of time."""
    return [value for time_s, value in records if start_s <= time_s < end_s]


def report(recorder: Recorder, every_s: int, wanted: float | None) -> None:
    """Prints the tables."""
    if not recorder.steps:
        raise SystemExit("no batch was trained in this time; give more --seconds")
    end_s = recorder.steps[-1][0]
    names = [*ACTIVITIES, "other"]
    print(f"{'from s':>7}{'audio s/s':>11}{'GPU busy %':>12}" + "".join(f"{name:>19}" for name in names))
    speeds: list[tuple[float, float, bool]] = []
    for start_s in range(0, int(end_s), every_s):
        stretch = (start_s, min(start_s + every_s, end_s))
        speed = sum(between(recorder.steps, *stretch)) / (stretch[1] - stretch[0])
        doing, busy = Counter(between(recorder.doing, *stretch)), between(recorder.busy, *stretch)
        shares = [100 * doing[name] / max(1, doing.total()) for name in names]
        print(
            f"{start_s:7d}{speed:11.0f}{f'{statistics.mean(busy):.0f}' if busy else '-':>12}"
            + "".join(f"{share:17.0f} %" for share in shares)
        )
        speeds.append((stretch[1], speed, doing["validates"] > 0))
    last = speeds[-max(1, len(speeds) // 3) :]
    full = statistics.median([speed for _, speed, validated in last if not validated] or [last[-1][1]])
    fast_s = next(time_s for time_s, speed, _ in speeds if speed >= 0.8 * full)
    print(f"first batch trained after {recorder.steps[0][0]:.1f} s, 80 % of full speed after {fast_s:.0f} s")
    print(
        f"full speed {full:.0f} s/s; with validation and checkpoints {statistics.mean(x for _, x, _ in last):.0f} s/s"
    )
    if wanted:
        print(f"that is {100 * full / wanted:.0f} % of {wanted:.0f} s/s")


def main() -> None:
    """Runs the program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=positive, default=150, help="of the process (default: 150)")
    parser.add_argument("--every", type=positive, default=5, help="seconds a line stands for (default: 5)")
    parser.add_argument("--of", type=float, help="audio s/s that bench_train reaches here, to compare with")
    options, train_options = parser.parse_known_args()
    train_options = [option for option in train_options if option != "--"]
    recorder = Recorder(threading.get_ident())
    step = Trainer.step

    def recorded_step(trainer: Trainer, *arguments: Any) -> StepResult:
        result = step(trainer, *arguments)
        recorder.steps.append((recorder.now_s(), result.audio_s))
        return result

    Trainer.step = recorded_step  # type: ignore[method-assign, assignment]
    with tempfile.TemporaryDirectory() as directory:
        if "--exp-dir" not in train_options:
            train_options += ["--exp-dir", directory]
        recorder.start(options.seconds)
        sys.argv = ["ssm-asr train", *train_options]
        try:
            runpy.run_module("ssm_asr.train", run_name="__main__")
        except SystemExit as end:
            if end.code in (1, 2):
                raise
        recorder.stop()
    report(recorder, options.every, options.of)


if __name__ == "__main__":
    sys.exit(run(main))
