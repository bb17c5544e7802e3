"""Devices: which to compute on, and copies to and from it for which the host does not wait."""

from collections.abc import Callable

import torch
from torch import Tensor


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """x on the device; the host does not wait for what the device still has to do, as it would with x.to(device)."""
    if device.type == "cuda" and not x.is_cuda:
        x = x.pin_memory()
    return x.to(device, non_blocking=True)


def to_host(x: Tensor) -> Callable[[], list[float]]:
    """Begins to copy x; what it returns waits for that and gives the numbers, whatever the device has to do since."""
    copy = x.detach().to("cpu", non_blocking=True, copy=True)
    copied = torch.cuda.current_stream(x.device).record_event() if x.is_cuda else None

    def numbers() -> list[float]:
        if copied is not None:
            copied.synchronize()
        values: list[float] = copy.tolist()
        return values

    return numbers


def find_device(name: str) -> torch.device:
    """The device of a name: auto (a GPU where there is one), cpu, cuda or cuda:N.

    Raises:
        ValueError: if there is no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device {name!r}: give auto, cpu or cuda") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {name}: this machine has {torch.cuda.device_count()} GPUs that PyTorch can use")
    return device
