"""Works on the runs of a sweep, several at a time, each by the programs that train, average and decode."""

import os
import re
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from tqdm import tqdm

from research.sweep_plan import Run

ROOT = Path(__file__).parents[1]
LOG = "log.txt"


def work(run: Run) -> int:
    """Calls the programs of a run until one fails, appends what they print to its log, and returns the exit status.

    Each program gets one thread, since the runs work in parallel.
    """
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    run.directory.mkdir(parents=True, exist_ok=True)
    with open(run.directory / LOG, "ab") as log:
        for verb, arguments in run.commands:
            command = ["-m", f"ssm_asr.{verb}", *arguments]
            log.write(f"$ python {shlex.join(command)}\n".encode())
            log.flush()
            status = subprocess.run([sys.executable, *command], stdout=log, stderr=log, env=environment).returncode
            if status:
                return status
    return 0


def work_on_all(runs: list[Run], jobs: int) -> list[str]:
    """Works on `jobs` runs at a time, and returns a line for each run that failed, which says why."""
    failures = []
    with ThreadPoolExecutor(jobs) as pool, tqdm(total=len(runs), desc="sweep", unit="run") as bar:
        futures = {pool.submit(work, run): run for run in runs}
        try:
            for future in as_completed(futures):
                run, status = futures[future], future.result()
                if status:
                    failures.append(f"{run.directory}: failed ({status}): {_last_line(run.directory / LOG)}")
                    bar.write(failures[-1])
                bar.update()
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return failures


def _last_line(log: Path) -> str:
    """Returns what was printed last; the parts of a progress bar, which end in a carriage return, count as lines."""
    lines = re.split(r"[\r\n]+", log.read_text(encoding="utf-8", errors="replace").strip())
    return lines[-1] if lines[-1] else "it printed nothing"
