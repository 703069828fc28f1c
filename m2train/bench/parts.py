"""Strict records on plain dataclasses: checked when made and when read, so that a row file needs no further package.

A `Part` is a dataclass whose annotations are its schema: str, int, float, bool, Any, Literal, `| None`, list[...],
dict[str, ...] and other parts. Unknown and missing fields, wrong types and numbers that are not finite raise
ValueError with the path of the field, what was got and what was expected.
"""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from typing import Any, Literal, Self, Union


class Part:
    """Base of records; subclasses are `@dataclass(kw_only=True)`."""

    def __post_init__(self) -> None:
        """Raise ValueError for a value that its annotation does not allow."""
        for name, kind in _schema(type(self)).items():
            setattr(self, name, _checked(getattr(self, name), kind, name))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dataclasses.asdict(self)  # type: ignore[call-overload,no-any-return]  # subclasses are dataclasses

    @classmethod
    def from_dict(cls, value: Any) -> Self:
        """The record of plain JSON values.

        Raises:
            ValueError: `value` is not one; names the field.
        """
        return _part(value, cls, "")  # type: ignore[no-any-return]

    def to_json(self) -> str:
        """One line."""
        return json.dumps(self.to_dict(), allow_nan=False, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The record of one line.

        Raises:
            ValueError: it is not JSON, or not such a record.
        """
        return cls.from_dict(json.loads(text))


_SCHEMAS: dict[type[Part], dict[str, Any]] = {}


def _schema(kind: type[Part]) -> dict[str, Any]:
    """Field -> type, annotations resolved."""
    if kind not in _SCHEMAS:
        hints = typing.get_type_hints(kind)
        _SCHEMAS[kind] = {field.name: hints[field.name] for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    return _SCHEMAS[kind]


def _part(value: Any, kind: type[Part], where: str) -> Any:
    if isinstance(value, kind):
        return value
    if not isinstance(value, dict):
        raise _mistake(where, value, f"an object with the fields of {kind.__name__}")
    prefix = f"{where}." if where else ""
    schema = _schema(kind)
    unknown = [str(name) for name in value if name not in schema]
    if unknown:
        raise ValueError(f"{prefix}{unknown[0]}: unknown field; {kind.__name__} has {', '.join(schema)}")
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        optional = field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
        if field.name not in value and not optional:
            raise ValueError(f"{prefix}{field.name}: missing")
    return kind(**{name: _checked(item, schema[name], f"{prefix}{name}") for name, item in value.items()})


def _checked(value: Any, kind: Any, where: str) -> Any:
    """The value as `kind`: objects become parts, integers floats where a float is asked for."""
    if kind is Any:
        return value
    origin, inside = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        if value not in inside or isinstance(value, bool) != any(isinstance(x, bool) for x in inside):
            raise _mistake(where, value, " or ".join(map(repr, inside)))
        return value
    if origin in (Union, types.UnionType):
        if value is None and type(None) in inside:
            return None
        rest = [x for x in inside if x is not type(None)]
        assert len(rest) == 1, f"{where}: {kind} is no schema that is supported"
        return _checked(value, rest[0], where)
    if origin is list:
        if not isinstance(value, list):
            raise _mistake(where, value, "a list")
        return [_checked(item, inside[0], f"{where}[{number}]") for number, item in enumerate(value)]
    if origin is dict:
        if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
            raise _mistake(where, value, "an object with names")
        return {name: _checked(item, inside[1], f"{where}.{name}") for name, item in value.items()}
    if isinstance(kind, type) and issubclass(kind, Part):
        return _part(value, kind, where)
    return _scalar(value, kind, where)


def _scalar(value: Any, kind: type, where: str) -> Any:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind is float:
        if not number or not math.isfinite(value):
            raise _mistake(where, value, "a finite number")
        return float(value)
    if kind is int and isinstance(value, bool) or not isinstance(value, kind):
        raise _mistake(where, value, {int: "an integer", str: "a string", bool: "true or false"}[kind])
    return value


def _mistake(where: str, value: Any, expected: str) -> ValueError:
    text = repr(value)
    return ValueError(f"{where or 'row'}: got {text if len(text) < 60 else text[:57] + '...'}; expected {expected}")
