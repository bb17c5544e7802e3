"""Several GPUs through torchrun, with one code path: with a single process every function here does nothing."""

import os
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ssm_asr.ops.devices import find_device


class Place(NamedTuple):
    """This process among all."""

    rank: int
    world_size: int
    device: torch.device


def join(device_name: str = "auto") -> Place:
    """Joins the processes that torchrun started, if it did. See `find_device` for the name."""
    device = find_device(device_name)
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if device.type == "cuda" and "LOCAL_RANK" in os.environ:
        device = find_device(f"cuda:{os.environ['LOCAL_RANK']}")
        torch.cuda.set_device(device)
    if world_size == 1:
        return Place(0, 1, device)
    # Numbers that the host needs go through gloo, so that it does not wait for the GPU.
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    return Place(dist.get_rank(), world_size, device)


def leave(place: Place) -> None:
    """Ends what `join` began."""
    if place.world_size > 1:
        dist.destroy_process_group()


def wait(place: Place) -> None:
    """Waits until every process is here."""
    if place.world_size > 1:
        dist.barrier()


def share_weights(model: nn.Module, place: Place) -> None:
    """Gives every process the weights of the first."""
    if place.world_size > 1:
        for tensor in model.state_dict().values():
            dist.broadcast(tensor, 0)


def average_gradients(model: nn.Module, place: Place) -> None:
    """Replaces gradients by their mean over all processes, in one message.

    A parameter that this process did not use counts with a zero gradient: modules are skipped at random, and not
    the same ones everywhere.
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
    torch._foreach_copy_(grads, [part.view_as(g) for part, g in zip(_split(flat, grads), grads, strict=True)])


def total(value_N: Tensor, place: Place) -> Tensor:
    """The sum of a tensor over all processes."""
    if place.world_size > 1:
        dist.all_reduce(value_N)
    return value_N


def gather(flags: list[bool], place: Place) -> list[list[bool]]:
    """The flags of every process, in the order of their ranks; all have the same number of them."""
    flags_RN = torch.zeros(place.world_size, len(flags), dtype=torch.int64)
    flags_RN[place.rank] = torch.tensor(flags)
    return total(flags_RN, place).bool().tolist()


def _split(flat: Tensor, like: list[Tensor]) -> tuple[Tensor, ...]:
    return flat.split([t.numel() for t in like])
