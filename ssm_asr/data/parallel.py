"""Calls a function for many items in several processes, with a progress bar.

Processes are forked from a server, which has imported what they need once and has no threads.
"""

import multiprocessing
import multiprocessing.forkserver
import signal
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from tqdm import tqdm

LOADING = "ssm_asr.data.batches"  # the module that loads batches

Item = TypeVar("Item")
Result = TypeVar("Result")


def forking(module: str) -> Any:
    """Returns the multiprocessing context in which processes are forked from a server that has imported a module.

    The first module that is named counts, since the server runs then until this process ends.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([module])
    return context


def start_server(module: str) -> None:
    """Starts the server of `forking`, which imports for seconds, while the caller goes on."""
    forking(module)
    multiprocessing.forkserver.ensure_running()


def ignore_interrupt() -> None:
    """Leaves Ctrl-C, which reaches all processes of a terminal, to the one that started this one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def parallel_map(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    num_jobs: int,
    title: str,
    unit: str,
    chunk: int | None = None,
) -> Iterator[Result]:
    """Yields function(item) for each item, in the order of the items.

    Args:
        function: a picklable function.
        items: picklable items.
        num_jobs: number of processes; with 1, this process does the work.
        title, unit: what the progress bar says.
        chunk: so many items are sent to a process at once; by default up to 32.
    """
    if not items:
        return
    with tqdm(total=len(items), desc=title, unit=unit, mininterval=1.0) as bar:
        if num_jobs == 1 or len(items) == 1:
            for item in items:
                yield function(item)
                bar.update()
            return
        chunk = chunk or max(1, min(32, len(items) // (8 * num_jobs)))
        with forking(function.__module__).Pool(min(num_jobs, len(items)), initializer=ignore_interrupt) as pool:
            for result in pool.imap(function, items, chunk):
                yield result
                bar.update()
