"""This module computes gates, which multiply two halves of a projection, and the sums of non-linear attention.

Shapes: B batch, T frames (queries), K keys, D channels, N gated channels.
"""

import torch
from torch import Tensor

from ssm_asr.ops import dispatch
from ssm_asr.ops.balance import Balance, balance
from ssm_asr.ops.numbers import Number, known_zero, on_device

ACTIVATIONS = {"sigmoid": torch.sigmoid, "tanh": torch.tanh, "identity": lambda gate: gate}


def gated(
    inputs: Tensor | tuple[Tensor, Tensor],
    activation: str,
    padding_mask_BT: Tensor | None = None,
    by: Balance | None = None,
) -> Tensor:
    """Returns x·activation(gate), (B, T, D), with zeros at padding.

    Args:
        inputs: x and gate, (B, T, D) each, or one tensor (B, T, 2D) whose first half is x and whose second is gate.
        activation: a name in ACTIVATIONS.
        padding_mask_BT: True at padding; None if there is no padding.
        by: how the gradient of the gate is balanced; None leaves it as it is.
    """
    first = inputs[0] if isinstance(inputs, tuple) else inputs
    if dispatch.use_kernels(first) and not torch.jit.is_tracing():
        from ssm_asr.ops.gates_kernel import gated as gated_kernel  # only where Triton is installed

        numbers, grad_scale = None, 0.0
        if by is not None and not by.idle:
            numbers, grad_scale = on_device(by.numbers, first.device), by.grad_scale
        return gated_kernel(inputs, activation, padding_mask_BT, numbers, grad_scale)
    x_BTD, gate_BTD = inputs if isinstance(inputs, tuple) else inputs.chunk(2, dim=-1)
    out_BTD = x_BTD * ACTIVATIONS[activation](balance(gate_BTD, by))
    return out_BTD if padding_mask_BT is None else out_BTD.masked_fill(padding_mask_BT[..., None], 0.0)


def evenly_weighted(weights_BTK: Tensor, x_BKN: Tensor, even: Number) -> Tensor:
    """Returns weights @ x, (B, T, N), or the plain mean of x over the keys with a nonzero weight.

    Args:
        weights_BTK: the weights of each query, not negative.
        x_BKN: what is summed.
        even: if above 0, the nonzero weights of a query are replaced by 1 over their number. These even weights are
            constants, so that no gradient flows to weights_BTK.
    """
    if known_zero(even):
        return weights_BTK @ x_BKN
    if dispatch.use_kernels(x_BKN):
        from ssm_asr.ops.gates_kernel import mixed  # only where Triton is installed

        return mixed(weights_BTK.to(x_BKN.dtype), x_BKN, on_device(even, x_BKN.device))
    visible_BTK = (weights_BTK > 0).to(weights_BTK.dtype)
    even_BTK = visible_BTK / visible_BTK.sum(dim=-1, keepdim=True)
    if isinstance(even, Tensor):
        even_BTK = torch.where(even > 0, even_BTK, weights_BTK)
    return even_BTK @ x_BKN
