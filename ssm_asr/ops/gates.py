"""Gates: a product of two halves of a projection, and weighted sums whose weights may be made even.

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
    """x·activation(gate), (B, T, D), 0 at padding.

    Args:
        inputs: x and gate, (B, T, D) each, or one tensor (B, T, 2D) of which they are the halves.
        activation: a name of ACTIVATIONS.
        padding_mask_BT: True at padding.
        by: how gradients of the gate are balanced.
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
    """weights @ x; where `even` is over 0, 1 over the number of nonzero weights takes the place of each of them.

    Even weights are constants: they have no gradient.
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
