"""Variational noise: gradients at weights with Gaussian noise on them (Graves, NeurIPS 2011), against overfitting."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ssm_asr.ssm.parameters import ssm_parameters


def noisy_weights(model: nn.Module, parts: Iterable[str]) -> list[nn.Parameter]:
    """The weights under these names: matrices and kernels, since noise on biases and scales would act quite otherwise.

    Parameters of state-space dynamics, which act through exponentials, are left out as well.

    Raises:
        ValueError: if there are none under one of the names.
    """
    apart = {id(parameter) for parameter in ssm_parameters(model)}
    weights = {name: p for name, p in model.named_parameters() if p.dim() > 1 and id(p) not in apart}
    found: dict[str, nn.Parameter] = {}
    for part in parts:
        under = {name: p for name, p in weights.items() if f"{name}.".startswith(f"{part}.")}
        if not under:
            known = ", ".join(dict.fromkeys(name.split(".")[0] for name in weights))
            raise ValueError(f"train.weight_noise.parts has {part!r}, which names no weights; give some of {known}")
        found |= under
    return list(found.values())


@contextmanager
def variational_noise(parameters: Iterable[nn.Parameter], deviation: float) -> Iterator[None]:
    """Adds noise of this standard deviation to the parameters, and takes it away again to the last bit at the end.

    Put both the forward and the backward pass inside, and the optimiser's step outside, so that the gradients are
    those at the noisy weights. A backward pass outside is refused by autograd. The noise comes from torch's random
    numbers; with a deviation of 0 nothing happens, and none are drawn.
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
