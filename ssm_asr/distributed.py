"""Several GPUs through torchrun, with one code path: with a single process every function here does nothing."""

import os
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn


class Place(NamedTuple):
    """This process among all."""

    rank: int
    world_size: int
    device: torch.device


def join(device: str = "auto") -> Place:
    """Joins the processes that torchrun started, if it did.

    Args:
        device: auto (a GPU where there is one), cpu, or cuda.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if device.startswith("cuda") and "LOCAL_RANK" in os.environ:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    if world_size == 1:
        return Place(0, 1, torch.device(device))
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    return Place(dist.get_rank(), world_size, torch.device(device))


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


def _split(flat: Tensor, like: list[Tensor]) -> tuple[Tensor, ...]:
    return flat.split([t.numel() for t in like])
