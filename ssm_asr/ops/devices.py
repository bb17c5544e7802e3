"""This module finds the device to compute on, and copies to and from it without making the host wait."""

from collections.abc import Callable

import torch
from torch import Tensor


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """Returns x on the device. Unlike x.to(device), this does not wait until the device has done its queued work."""
    if device.type == "cuda" and not x.is_cuda:
        x = x.pin_memory()
    return x.to(device, non_blocking=True)


def to_host(x: Tensor) -> Callable[[], list[float]]:
    """Starts to copy x to the host, and returns a function that waits for the copy and returns the numbers.

    The function does not wait for work that the device was given after the copy.

    Args:
        x: (N,), on any device; its gradient is not followed.
    """
    copy = x.detach().to("cpu", non_blocking=True, copy=True)
    copied = torch.cuda.current_stream(x.device).record_event() if x.is_cuda else None

    def numbers() -> list[float]:
        if copied is not None:
            copied.synchronize()
        values: list[float] = copy.tolist()
        return values

    return numbers


def find_device(name: str) -> torch.device:
    """Returns the device that a name stands for.

    Args:
        name: cpu, cuda, cuda:N, or auto, which is a GPU if PyTorch can use one and the CPU otherwise.

    Raises:
        ValueError: if the name is none of these, or if this machine does not have the device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f"device {name!r}: give auto, cpu or cuda")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {name}: this machine has {torch.cuda.device_count()} GPUs that PyTorch can use")
    return device
