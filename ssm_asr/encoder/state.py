"""Streaming state: what a layer must remember between chunks.

A state is a (nested) named tuple of tensors, batch first, zeros at the start of a stream, never hidden in a
module and never changed in place. A layer declares its state by `init_state(batch_size)`; everything that needs
to know about states (memory tables, export, batching of streams) reads that declaration through this file.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


def leaves(state: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yields (dotted field name, tensor) for every tensor of a nested state, in declaration order."""
    if isinstance(state, Tensor):
        yield name, state
        return
    fields = getattr(state, "_fields", range(len(state)))
    for field, value in zip(fields, state, strict=True):
        yield from leaves(value, f"{name}.{field}" if name else str(field))


def rebuild(state: Any, tensors: Iterator[Tensor]) -> Any:
    """A state of the same structure as `state`, with its tensors taken from `tensors` in the order of `leaves`."""
    if isinstance(state, Tensor):
        return next(tensors)
    values = [rebuild(value, tensors) for value in state]
    return type(state)(*values) if hasattr(state, "_fields") else tuple(values)


def stack_states(states: list[Any]) -> Any:
    """Joins states of single streams (or of batches) along the batch, the first dimension of every tensor."""
    columns = zip(*([tensor for _, tensor in leaves(state)] for state in states), strict=True)
    return rebuild(states[0], iter([torch.cat(column) for column in columns]))


def select_states(state: Any, streams: list[int]) -> Any:
    """The state of the given streams of a batch, in the given order."""
    return rebuild(state, iter([tensor[streams] for _, tensor in leaves(state)]))


def state_sizes(state: Any) -> dict[str, int]:
    """Floats that one stream's state holds, by kind: the field's name without its shape, summed over layers.

    A counter, whatever its integer type, counts as one float: that is how exported models carry it.
    """
    sizes: dict[str, int] = {}
    for name, tensor in leaves(state):
        # processed.0 is the first of the tuple "processed"; key_BLQ, wherever it is, a key.
        kind = next(part for part in reversed(name.split(".")) if not part.isdigit())
        kind = kind.rpartition("_")[0] or kind
        sizes[kind] = sizes.get(kind, 0) + tensor.numel() // tensor.shape[0]
    return sizes
