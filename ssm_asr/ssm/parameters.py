"""These functions find the parameters of state-space models that need other optimiser settings than weight matrices."""

from typing import Any

from torch import nn


def ssm_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Returns the parameters that set the dynamics of state-space models: poles, step sizes, inputs and outputs.

    They are few and act through exponentials, so they need a learning rate of their own and no weight decay. A module
    lists the names of its parameters of this kind in the class attribute `ssm_parameter_names`. A parameter that is
    None is left out.
    """
    named = ((module, name) for module in model.modules() for name in getattr(module, "ssm_parameter_names", ()))
    found = (getattr(module, name) for module, name in named)
    return [parameter for parameter in found if parameter is not None]


def parameter_groups(model: nn.Module, ssm_lr_scale: float) -> list[dict[str, Any]]:
    """Returns the trainable parameters as groups for an optimiser.

    Args:
        model: the model.
        ssm_lr_scale: the `lr_scale` of the group with the parameters of `ssm_parameters`. This group comes last, and is
            missing if there are none.
    """
    apart = ssm_parameters(model)
    ids = {id(p) for p in apart}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in ids]
    groups: list[dict[str, Any]] = [{"params": others}]
    return [*groups, {"params": apart, "lr_scale": ssm_lr_scale}] if apart else groups
