"""Compiles the GPU kernels of a training step before its first batch, many at a time.

A rehearsal goes through the step without launching our kernels, and notes which it would launch.
"""

import hashlib
import os
import time
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from ssm_asr import ops
from ssm_asr.data.batches import Batch, TrainingJobs, shape_tokens
from ssm_asr.data.errors import first_line
from ssm_asr.data.parallel import forking, ignore_interrupt
from ssm_asr.ops import ahead
from ssm_asr.training.graphs import Graphs
from ssm_asr.training.objective import Objective
from ssm_asr.training.optim import ScaledAdam
from ssm_asr.units import NUM_MELS, embed_frames

LATTICES = (31, 63, 95, 127, 255, 511)  # up to so many tokens, the sums over the lattice take kernels of their own
MOST_TOKENS_A_SECOND = 12  # faster speech than this waits until kernels are compiled for it
MOST_JOBS = 16  # more than this share the work no better


def compile_ahead(objective: Objective, optimizer: ScaledAdam, jobs: TrainingJobs, device: torch.device) -> str:
    """Compiles what is not in Triton's cache on disk.

    Args:
        objective: with graphs of the encoder's passes.
        optimizer: of the model; it is not changed.
        jobs: the training batches, of fixed shapes.
        device: a GPU.

    Returns:
        A line for the user: how many kernels there are, how long it took to compile them, and where they are kept.
    """
    start = time.perf_counter()
    done = _marker(objective, jobs, device)
    if done.exists():
        return f"kernels: compiled before; kept in {done.parent}"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    compiling: dict[ahead.Kernel, Any] = {}
    try:
        with forking(ahead.__name__).Pool(min(cores, MOST_JOBS), initializer=ignore_interrupt) as pool:
            for kernels in _rehearse(objective, optimizer, jobs, device):
                for kernel in sorted(kernels - compiling.keys()):
                    compiling[kernel] = pool.apply_async(ahead.compile_kernel, (kernel,))
            for result in tqdm(compiling.values(), desc="compiling kernels", unit="kernel", mininterval=1.0):
                result.get()
    except Exception as error:  # training does not depend on it; of memory, the trial of the largest batch tells
        return f"kernels: compiled when they are first used, since the rehearsal failed ({first_line(error)})"
    finally:
        objective.model.zero_grad(set_to_none=True)
    done.parent.mkdir(parents=True, exist_ok=True)
    done.touch()
    return f"kernels: {len(compiling)}, compiled in {time.perf_counter() - start:.0f} s; kept in {done.parent}"


def _marker(objective: Objective, jobs: TrainingJobs, device: torch.device) -> Path:
    """Returns a file that is there if all that these batches and this model need has been compiled."""
    digest = hashlib.sha256()
    for source in sorted(Path(ops.__path__[0]).glob("*.py")):
        digest.update(source.read_bytes())
    model = objective.model
    versions = torch.__version__, torch.cuda.get_device_capability(device), objective.precision
    digest.update(repr((versions, model.config, model.vocab_size, jobs.shapes())).encode())
    return Path(ahead.cache_directory()) / f"ssm-asr-{digest.hexdigest()[:32]}"


def _rehearse(
    objective: Objective, optimizer: ScaledAdam, jobs: TrainingJobs, device: torch.device
) -> Iterator[set[ahead.Kernel]]:
    """Yields after each part of the rehearsal the kernels so far that a training step would have to compile or load."""
    objective.model.train()
    # Kernels differ where the next power of 2 of a number of frames differs; of each, the longest shape comes.
    classes = {(embed_frames(frames) - 1).bit_length(): (count, frames) for count, frames in jobs.shapes()}
    shapes = list(classes.values())
    most = bisect_left(LATTICES, MOST_TOKENS_A_SECOND * shapes[-1][1] // 100)
    with ahead.recording() as kernels, _rehearsals(objective.graphs()):
        for shape, tokens in zip_longest(shapes[::-1], LATTICES[most::-1]):
            count, frames = shape or shapes[0]
            losses = objective.losses(_silence(count, frames, tokens or LATTICES[0], device))
            objective.weighted(losses).nan_to_num(posinf=0.0).sum().backward()
            yield kernels
        _rehearse_optimizer(optimizer)
    yield kernels


def _rehearsals(graphs: Iterable[Graphs]) -> ExitStack:
    stack = ExitStack()
    for passes in graphs:
        stack.enter_context(passes.rehearsal())
    return stack


def _rehearse_optimizer(optimizer: ScaledAdam) -> None:
    """Makes steps with copies of the parameters, as many as take all of the optimiser's ways."""
    groups = [
        {**group, "params": [nn.Parameter(torch.zeros_like(p)) for p in group["params"]]}
        for group in optimizer.param_groups
    ]
    copy = ScaledAdam(groups)
    for group in groups:
        for p in group["params"]:
            p.grad = torch.zeros_like(p)
    for _ in range(copy.size_update_period):
        copy.step()


def _silence(count: int, frames: int, tokens: int, device: torch.device) -> Batch:
    """Returns a batch of so many utterances of so many feature frames and tokens."""
    tokens_BU = torch.ones(count, shape_tokens(tokens), dtype=torch.int64, device=device)
    features_BTF = torch.zeros(count, frames, NUM_MELS, device=device)
    return Batch(features_BTF, torch.full((count,), frames), tokens_BU, torch.full((count,), tokens), [], [])
