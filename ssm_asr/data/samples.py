"""Checks of samples that a caller hands over, where no file says what they are."""

from typing import Any

import numpy as np
import torch

from ssm_asr.data.errors import AudioError
from ssm_asr.data.features import sound_fault


def check_samples(samples: Any, name: str = "samples") -> np.ndarray:
    """Returns samples as an array (S,) of float32, after a check that they can be audio of one channel.

    Args:
        samples: a NumPy array or a PyTorch tensor of floats in [-1, 1], with any number of samples.
        name: what an error calls them.

    Raises:
        AudioError: if they have another type or shape, are not finite, or were not divided by their full scale.
    """
    if isinstance(samples, torch.Tensor):
        samples = samples.detach().cpu()
        samples = (samples.float() if samples.is_floating_point() else samples).numpy()
    if not isinstance(samples, np.ndarray):
        raise AudioError(name, f"no audio but {type(samples).__name__}", "give an array or a tensor of samples")
    if samples.ndim != 1:
        raise AudioError(name, f"shape {samples.shape}", "give one channel, an array of shape (num_samples,)")
    if samples.dtype.kind != "f":
        remedy = "give floats in [-1, 1]; 16-bit integers become so by samples / 32768"
        raise AudioError(name, f"type {samples.dtype}", remedy)
    fault = sound_fault(samples)
    if fault:
        raise AudioError(name, *fault)
    return samples.astype(np.float32, copy=False)
