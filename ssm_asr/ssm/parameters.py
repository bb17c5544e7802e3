"""The parameters of state-space models that an optimiser should treat apart from weight matrices."""

from torch import nn


def ssm_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Those of the model's parameters that set the dynamics of state-space models: poles, steps, inputs and outputs.

    They are few and act through exponentials: give them a parameter group with its own learning rate and no weight
    decay. A module names its own in the class attribute `ssm_parameter_names`; one that is None there is left out.
    """
    named = ((module, name) for module in model.modules() for name in getattr(module, "ssm_parameter_names", ()))
    found = (getattr(module, name) for module, name in named)
    return [parameter for parameter in found if parameter is not None]
