"""Compiles the GPU kernels of a training step before its first batch, many at a time.

A rehearsal goes through the step without launching our kernels, and notes which it would launch.
"""

import hashlib
import os
import time
from bisect import bisect_left
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import nn

from ssm_asr import ops
from ssm_asr.data.batches import Batch, TrainingJobs, shape_tokens
from ssm_asr.data.errors import first_line
from ssm_asr.data.parallel import parallel_map
from ssm_asr.ops import ahead
from ssm_asr.training.graphs import Graphs
from ssm_asr.training.objective import Objective
from ssm_asr.training.optim import ScaledAdam
from ssm_asr.units import NUM_MELS

TOKENS_A_SECOND = 4  # of the rehearsal of each shape
LATTICES = (31, 63, 95, 127, 255, 511)  # up to so many tokens, the sums over the lattice take kernels of their own
MOST_TOKENS_A_SECOND = 12  # faster speech than this waits until kernels are compiled for it
MOST_JOBS = 16  # more than this share the work no better
SLOW = ("_sum",)  # the sums over the lattice take ten times as long as others to compile, so they begin first


def compile_ahead(objective: Objective, optimizer: ScaledAdam, jobs: TrainingJobs, device: torch.device) -> str:
    """Compiles what is not in Triton's cache on disk.

    Args:
        objective: with graphs of the encoder's passes.
        optimizer: of the model; it is not changed.
        jobs: the training batches, of fixed shapes.
        device: a GPU.

    Returns:
        A line for the user: how many kernels there are, how many were compiled in how long, and where they are kept.
    """
    start = time.perf_counter()
    done = _marker(objective, jobs, device)
    if done.exists():
        return f"kernels: compiled before; kept in {done.parent}"
    try:
        kernels = sorted(_rehearse(objective, optimizer, jobs, device))
    except Exception as error:  # training does not depend on it; of memory, the trial of the largest batch tells
        return f"kernels: compiled when they are first used, since the rehearsal failed ({first_line(error)})"
    finally:
        objective.model.zero_grad(set_to_none=True)
    missing = [kernel for kernel in kernels if not ahead.is_compiled(kernel)]
    missing.sort(key=lambda kernel: kernel.name not in SLOW)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # Neighbours in the list are alike, and some of them take long, so that no process should get many at once.
    for _ in parallel_map(ahead.compile_kernel, missing, min(cores, MOST_JOBS), "compiling kernels", "kernel", chunk=1):
        pass
    done.parent.mkdir(parents=True, exist_ok=True)
    done.touch()
    took_s = time.perf_counter() - start
    return f"kernels: {len(kernels)}, {len(missing)} of them compiled, in {took_s:.0f} s; kept in {done.parent}"


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
) -> set[ahead.Kernel]:
    """Returns the kernels that a training step would have to compile or load."""
    objective.model.train()
    shapes = jobs.shapes()
    calls = [(*shape, TOKENS_A_SECOND * shape[1] // 100) for shape in shapes]
    count, frames = shapes[-1]
    most = bisect_left(LATTICES, MOST_TOKENS_A_SECOND * frames // 100)
    calls += [(count, frames, tokens) for tokens in LATTICES[: most + 1]]
    with ahead.recording() as kernels, _rehearsals(objective.graphs()):
        for call in calls:
            losses = objective.losses(_silence(*call, device))
            objective.weighted(losses).nan_to_num(posinf=0.0).sum().backward()
        _rehearse_optimizer(optimizer)
    return kernels


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
