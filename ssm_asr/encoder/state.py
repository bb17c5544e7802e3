"""Streaming states: what layers must remember between chunks.

A state is a named tuple of tensors, which may be nested. Every tensor has the batch as its first dimension and is zero
at the start of a stream. A state is never hidden in a module and never changed in place. A layer declares its state by
`init_state(batch_size)`. Everything that needs to know about states (memory tables, export, batching of streams) reads
this declaration through the functions here.
"""

from collections.abc import Iterator
from itertools import groupby
from typing import Any, NamedTuple

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
    tensors = [tensor for _, tensor in leaves(state)]
    index = torch.tensor(streams, device=tensors[0].device)
    return rebuild(state, iter([tensor.index_select(0, index) for tensor in tensors]))


class Row(NamedTuple):
    """The state of one stream, which is a row of a batch's state and stays there until it is needed elsewhere."""

    batch: Any
    place: int


def join_rows(rows: list[Row]) -> Any:
    """Returns the state of a batch whose streams have these states.

    It costs nothing if they are all rows of one batch in its order, and otherwise the less, the more rows of one batch
    follow one another.
    """
    batch, places = rows[0].batch, [row.place for row in rows]
    _, tensor = next(leaves(batch))
    if all(row.batch is batch for row in rows) and places == list(range(len(tensor))):
        return batch
    runs = [list(run) for _, run in groupby(rows, key=lambda row: id(row.batch))]
    parts = [select_states(run[0].batch, [row.place for row in run]) for run in runs]
    return parts[0] if len(parts) == 1 else stack_states(parts)


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
