"""Several GPUs through torchrun, one process for each.

A single process takes no other path through the program: the functions here then have nothing to do.
"""

import os
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ssm_asr.ops.devices import find_device


class Place(NamedTuple):
    """Says which of all processes this one is."""

    rank: int  # Ranks are counted from 0.
    world_size: int
    device: torch.device


def join(device_name: str = "auto") -> Place:
    """Joins the processes that torchrun started, if it did.

    Args:
        device_name: as for `find_device`; with several GPUs each process takes its own.

    Raises:
        ValueError: if there is no such device.
    """
    device = find_device(device_name)
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if device.type == "cuda" and "LOCAL_RANK" in os.environ:
        device = find_device(f"cuda:{os.environ['LOCAL_RANK']}")
        torch.cuda.set_device(device)
    if world_size == 1:
        return Place(0, 1, device)
    # The host sends its own numbers through gloo, so that it need not wait for the GPU.
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    return Place(dist.get_rank(), world_size, device)


def leave(place: Place) -> None:
    """Leaves the processes that `join` joined."""
    if place.world_size > 1:
        dist.destroy_process_group()


def wait(place: Place) -> None:
    """Waits until every process is here."""
    if place.world_size > 1:
        dist.barrier()


def share_weights(model: nn.Module, place: Place) -> None:
    """Copies weights and buffers from the first process to all others."""
    if place.world_size > 1:
        for tensor in model.state_dict().values():
            dist.broadcast(tensor, 0)


def average_gradients(model: nn.Module, place: Place) -> None:
    """Replaces gradients by their mean over all processes, in one message.

    A parameter that this process did not use counts with a zero gradient. Processes use different ones, since each
    skips modules at random.
    """
    if place.world_size == 1:
        return
    parameters = [p for p in model.parameters() if p.requires_grad]
    for p in parameters:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    grads = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([grad.flatten() for grad in grads])
    dist.all_reduce(flat)
    flat /= place.world_size
    parts = flat.split([grad.numel() for grad in grads])
    torch._foreach_copy_(grads, [part.view_as(grad) for part, grad in zip(parts, grads, strict=True)])


def total(value_N: Tensor, place: Place) -> Tensor:
    """Returns the sum of a tensor over all processes; the tensor itself may be overwritten by it."""
    if place.world_size > 1:
        dist.all_reduce(value_N)
    return value_N


def gather(flags: list[bool], place: Place) -> list[list[bool]]:
    """Returns the flags of every process, in the order of ranks. All processes must have equally many."""
    flags_RN = torch.zeros(place.world_size, len(flags), dtype=torch.int64)
    flags_RN[place.rank] = torch.tensor(flags)
    return total(flags_RN, place).bool().tolist()
