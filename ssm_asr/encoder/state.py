"""Streaming states: what layers must remember between chunks.

A state is a named tuple of tensors, which may be nested. Every tensor has the batch as its first dimension and is zero
at the start of a stream. A state is never hidden in a module and never changed in place. A layer declares its state by
`init_state(batch_size)`. Everything that needs to know about states (memory tables, export, batching of streams) reads
this declaration through the functions here.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


def leaves(state: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yields (dotted field name, tensor) for every tensor of a nested state, in the order of declaration.

    Args:
        state: a tensor, a named tuple or a tuple of states.
        name: put in front of every field name.
    """
    if isinstance(state, Tensor):
        yield name, state
        return
    fields = getattr(state, "_fields", range(len(state)))
    for field, value in zip(fields, state, strict=True):
        yield from leaves(value, f"{name}.{field}" if name else str(field))


def rebuild(state: Any, tensors: Iterator[Tensor]) -> Any:
    """Returns a state with the structure of `state` and the tensors of `tensors`, in the order of `leaves`."""
    if isinstance(state, Tensor):
        return next(tensors)
    values = [rebuild(value, tensors) for value in state]
    return type(state)(*values) if hasattr(state, "_fields") else tuple(values)


def stack_states(states: list[Any]) -> Any:
    """Joins the states of single streams, or of batches of streams, to the state of one batch."""
    columns = zip(*([tensor for _, tensor in leaves(state)] for state in states), strict=True)
    return rebuild(states[0], iter([torch.cat(column) for column in columns]))


def select_states(state: Any, streams: list[int]) -> Any:
    """Returns the state of the given streams of a batch, in the given order."""
    return rebuild(state, iter([tensor[streams] for _, tensor in leaves(state)]))


def state_sizes(state: Any) -> dict[str, int]:
    """Returns how many floats the state of one stream holds, by kind and summed over layers.

    The kind is the name of the field without its shape suffix. An integer counter counts as one float, because
    exported models carry it as a float.
    """
    sizes: dict[str, int] = {}
    for name, tensor in leaves(state):
        # "processed.0", the first of a tuple, is of the kind "processed"; "3.key_BLQ" is of the kind "key".
        kind = next(part for part in reversed(name.split(".")) if not part.isdigit())
        kind = kind.rpartition("_")[0] or kind
        sizes[kind] = sizes.get(kind, 0) + tensor.numel() // tensor.shape[0]
    return sizes
