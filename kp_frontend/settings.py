"""User settings, each declared once with its default, range and meaning.

A config is a frozen dataclass with fields made by `setting`. The checks below, the parameters of
the node and their table in the documentation are generated from these declarations.
"""

from __future__ import annotations

from dataclasses import Field, field, fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Value = bool | int | float | str


def setting(
    default: Value,
    meaning: str,
    low: float | None = None,
    high: float | None = None,
    *,
    choices: tuple[str, ...] = (),
    fixed: bool = False,
) -> Any:
    """Declare a field of a config.

    Args:
        default: default value; its type is the type of the setting. A float accepts integers.
        meaning: description with the unit.
        low, high: bounds of a number, inclusive.
        choices: allowed values of a string; empty allows any.
        fixed: whether the setting is fixed once the engine is built or the node runs.
    """
    return field(
        default=default,
        metadata={
            "meaning": meaning,
            "low": low,
            "high": high,
            "choices": choices,
            "fixed": fixed,
        },
    )


def bounds(declared: Field) -> tuple[float, float] | None:
    """Lowest and highest value of a setting; None if it is not a number."""
    low = declared.metadata["low"]
    return None if low is None else (low, declared.metadata["high"])


def check(config: DataclassInstance) -> None:
    """Check the type and range of every setting of a config.

    Raises:
        ValueError: names the setting, its value and the allowed values.
    """
    for f in fields(config):
        value, kind = getattr(config, f.name), type(f.default)
        allowed = (int, float) if kind is float else kind
        if not isinstance(value, allowed) or (kind is not bool and isinstance(value, bool)):
            raise ValueError(f"{f.name} is {value!r}, must be a {kind.__name__}")
        limits, choices = bounds(f), f.metadata["choices"]
        if limits and not limits[0] <= value <= limits[1]:  # NaN fails too
            raise ValueError(f"{f.name} is {value}, must be between {limits[0]} and {limits[1]}")
        if choices and value not in choices:
            raise ValueError(f"{f.name} is {value!r}, must be one of {', '.join(choices)}")


def fixed_settings(config: type) -> tuple[str, ...]:
    """Names of the settings that cannot change while the node runs."""
    return tuple(f.name for f in fields(config) if f.metadata["fixed"])
