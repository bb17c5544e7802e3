"""Sections of a configuration are dataclasses whose fields have their bounds beside them.

    @dataclass
    class OptimConfig(Section, name="optim"):
        base_lr: float = setting(0.045, above=0, most=10)

A section checks its fields whenever one is made, in Python as well as from a file: the types, and what `setting` says.
Numbers that are no numbers (NaN) keep to no bounds, so they are refused.
"""

import dataclasses
import typing
from dataclasses import dataclass
from typing import Any, ClassVar, NoReturn, TypeVar

T = TypeVar("T")

NOUNS = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
LONGEST_SHOWN = 100  # characters of a value in a message


class ConfigError(ValueError):
    """A configuration cannot be used. The message is one line, which names the field, the value and the remedy."""


@dataclass(frozen=True)
class Bounds:
    """A single value of a field must keep to these; `setting` explains the attributes."""

    above: float | None = None
    least: float | None = None
    most: float | None = None
    multiple_of: int | None = None
    choices: tuple[str, ...] = ()
    unlimited: int | None = None

    def allow(self, value: Any) -> bool:
        """Tells whether a value of the right type is one of the choices, or a number within the bounds."""
        if self.choices:
            return value in self.choices
        if self.unlimited is not None and value == self.unlimited:
            return True
        return (
            (self.above is None or value > self.above)
            and (self.least is None or value >= self.least)
            and (self.most is None or value <= self.most)
            and (self.multiple_of is None or value % self.multiple_of == 0)
        )

    def remedy(self, kind: type) -> str:
        """Says what to give instead, for a field whose values are of this type."""
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        text = NOUNS.get(kind, f"a {kind.__name__}")
        if self.multiple_of is not None:
            text = f"a multiple of {self.multiple_of}"
        if self.above is not None:
            text += f" above {self.above}, at most {self.most}"
        elif self.least is not None:
            text += f" from {self.least} to {self.most}"
        return text if self.unlimited is None else f"{text}, or {self.unlimited} for all"


def setting(
    default: T,
    *,
    above: float | None = None,
    least: float | None = None,
    most: float | None = None,
    multiple_of: int | None = None,
    choices: tuple[str, ...] = (),
    unlimited: int | None = None,
) -> T:
    """Declares a dataclass field with its default and its bounds, to which each entry of a list must keep.

    Args:
        above: A number must be larger than this.
        least, most: A number must be neither smaller nor larger than these.
        multiple_of: A whole number must be a multiple of this one.
        choices: A text must be one of these.
        unlimited: This number is allowed as well, and stands for all there is.
    """
    bounds = Bounds(above, least, most, multiple_of, choices, unlimited)
    return dataclasses.field(default=default, metadata={"bounds": bounds})


class Section:
    """All dataclasses of a configuration are sections.

    A subclass gives the name of its section as `--set` takes it: `class TrainConfig(Section, name="train")`. Relations
    between fields are checked in its own `__post_init__`, which calls this one first and then `require`.
    """

    section_name: ClassVar[str] = ""

    def __init_subclass__(cls, name: str | None = None, **options: Any) -> None:
        super().__init_subclass__(**options)
        if name is not None:
            cls.section_name = name

    def __post_init__(self) -> None:
        types = field_types(type(self))
        for field in dataclasses.fields(typing.cast(Any, self)):
            value = getattr(self, field.name)
            _check(self._full_name(field.name), value, types[field.name], field.metadata.get("bounds", Bounds()))

    def require(self, good: bool, field: str, remedy: str) -> None:
        """Refuses the value of a field unless it is good.

        Raises:
            ConfigError: The message names the field with its section, the value and the remedy.
        """
        if not good:
            _refuse(self._full_name(field), getattr(self, field), remedy)

    def _full_name(self, field: str) -> str:
        return f"{self.section_name}.{field}" if self.section_name else field


def field_types(cls: Any) -> dict[str, Any]:
    """Gives the types of the fields of a section, by name and in order."""
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def shown(value: Any) -> str:
    """Writes a value as messages show it: in one line, cut at LONGEST_SHOWN, with tuples as the lists that YAML has."""
    text = repr(list(value) if isinstance(value, tuple) else value)
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}…"


def _check(name: str, value: Any, hint: Any, bounds: Bounds) -> None:
    if typing.get_origin(hint) is tuple:
        entry_type, *others = typing.get_args(hint)
        length = None if others == [Ellipsis] else 1 + len(others)
        if not isinstance(value, (tuple, list)) or (length is not None and len(value) != length):
            _refuse(name, value, "a list" if length is None else f"a list of {length}")
        for i, entry in enumerate(value):
            _check(f"{name}[{i}]", entry, entry_type, bounds)
    elif not _is_of_type(value, hint) or not bounds.allow(value):
        _refuse(name, value, bounds.remedy(hint))


def _is_of_type(value: Any, kind: type) -> bool:
    """Tells whether a value is of the type. Whole numbers are numbers as well, but true and false are not."""
    if isinstance(value, bool) or kind is bool:
        return isinstance(value, bool) and kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


def _refuse(name: str, value: Any, remedy: str) -> NoReturn:
    raise ConfigError(f"{name} is {shown(value)}; give {remedy}")
