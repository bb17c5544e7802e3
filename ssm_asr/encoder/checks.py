"""Checks of an encoder's configuration, so that a wrong value is refused by its name before anything is built."""

import dataclasses
from typing import Any

CONTEXTS = ("chunk_frames", "left_context_frames")


def check_sizes(config: Any) -> None:
    """Whole numbers of a configuration must be positive, one by one or in a tuple.

    Raises:
        ValueError: naming the field.
    """
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        numbers = value if isinstance(value, tuple) else (value,)
        if field.name not in CONTEXTS and any(type(number) is int and number < 1 for number in numbers):
            raise ValueError(f"encoder.{field.name} is {_text(value)}; give positive numbers")


def check_contexts(chunk_frames: tuple[int, ...], left_context_frames: tuple[int, ...], multiple: int) -> None:
    """The chunks and left contexts that training draws from, in frames of 20 ms.

    Raises:
        ValueError: if there are none, a chunk is neither -1 nor a multiple of the given, or a left context below -1.
    """
    if not chunk_frames or any(chunk != -1 and (chunk < 1 or chunk % multiple) for chunk in chunk_frames):
        raise ValueError(f"encoder.chunk_frames is {_text(chunk_frames)}; give multiples of {multiple}, or -1 for all")
    if not left_context_frames or min(left_context_frames) < -1:
        raise ValueError(f"encoder.left_context_frames is {_text(left_context_frames)}; give 0 or more, or -1 for all")


def _text(value: Any) -> str:
    return str(list(value) if isinstance(value, tuple) else value)
