"""Variational noise (Graves, NeurIPS 2011): gradients at weights with Gaussian noise on them, against overfitting."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ssm_asr.ssm.parameters import ssm_parameters


def noisy_weights(model: nn.Module, parts: Iterable[str]) -> list[nn.Parameter]:
    """Returns the weights of some parts of a model that can be noisy: matrices and convolution filters.

    Noise on biases and scales would act quite differently. Parameters of state-space dynamics are left out as well,
    since they act through exponentials.

    Args:
        parts: names of modules or parameters; each stands for all weights within it.

    Raises:
        ValueError: if there are no weights in one of the parts.
    """
    ssm_ids = {id(parameter) for parameter in ssm_parameters(model)}
    weights = {name: p for name, p in model.named_parameters() if p.dim() > 1 and id(p) not in ssm_ids}
    chosen: dict[str, nn.Parameter] = {}
    for part in parts:
        weights_in_part = {name: p for name, p in weights.items() if f"{name}.".startswith(f"{part}.")}
        if not weights_in_part:
            known = ", ".join(dict.fromkeys(name.split(".")[0] for name in weights))
            raise ValueError(f"train.weight_noise.parts has {part!r}, which names no weights; give some of {known}")
        chosen |= weights_in_part
    return list(chosen.values())


@contextmanager
def variational_noise(parameters: Iterable[nn.Parameter], deviation: float) -> Iterator[None]:
    """Adds noise of a standard deviation to parameters within its `with` block, and restores their exact values.

    Put both the forward and the backward pass into the block, so that the gradients are taken at the noisy weights,
    and the step of the optimiser behind it. Autograd refuses a backward pass behind the block. The noise is drawn from
    the random numbers of torch; with a deviation of 0 none are drawn, and nothing happens.

    Raises:
        ValueError: if the deviation is negative.
    """
    if deviation < 0:
        raise ValueError(f"variational noise of deviation {deviation}: give 0 or more")
    noisy = list(parameters) if deviation else []
    with torch.no_grad():
        saved = [parameter.clone() for parameter in noisy]
        for parameter in noisy:
            parameter.add_(torch.randn_like(parameter), alpha=deviation)
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(noisy, saved, strict=True):
                parameter.copy_(value)
