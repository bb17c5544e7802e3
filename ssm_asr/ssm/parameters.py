"""The parameters of state-space models that an optimiser should treat apart from weight matrices."""

from typing import Any

from torch import nn


def ssm_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Those of the model's parameters that set the dynamics of state-space models: poles, steps, inputs and outputs.

    They are few and act through exponentials: give them a parameter group with its own learning rate and no weight
    decay. A module names its own in the class attribute `ssm_parameter_names`; one that is None there is left out.
    """
    named = ((module, name) for module in model.modules() for name in getattr(module, "ssm_parameter_names", ()))
    found = (getattr(module, name) for module, name in named)
    return [parameter for parameter in found if parameter is not None]


def parameter_groups(model: nn.Module, ssm_lr_scale: float) -> list[dict[str, Any]]:
    """All trainable parameters for an optimiser; those of state-space dynamics in a group with `lr_scale`."""
    apart = ssm_parameters(model)
    ids = {id(p) for p in apart}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in ids]
    groups: list[dict[str, Any]] = [{"params": others}]
    return [*groups, {"params": apart, "lr_scale": ssm_lr_scale}] if apart else groups
