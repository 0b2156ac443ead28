"""Settings that a user may choose: each declared once, with its default, range and meaning.

A config is a frozen dataclass whose fields are made by `setting`. From the same declarations come
the checks here, the node's parameters and their table in the documentation.
"""

from __future__ import annotations

from dataclasses import Field, field, fields
from typing import Any

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
    """A field of a config.

    Args:
        default: its type is the type of the setting; whole numbers are taken for a float.
        meaning: in words, with the unit.
        low, high: bounds of a number, inclusive.
        choices: the words that a string may be; any if there are none.
        fixed: whether it cannot change once the engine is built or the node runs.
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
    """Lowest and highest value of a setting, None if it is no number."""
    low = declared.metadata["low"]
    return None if low is None else (low, declared.metadata["high"])


def check(config: object) -> None:
    """Check the type and range of every setting of a config.

    Raises:
        ValueError: says which setting, what it is and what it may be.
    """
    for f in fields(config):
        value, kind = getattr(config, f.name), type(f.default)
        allowed = (int, float) if kind is float else kind
        if not isinstance(value, allowed) or (kind is not bool and isinstance(value, bool)):
            raise ValueError(f"{f.name} is {value!r}, must be a {kind.__name__}")
        limits, choices = bounds(f), f.metadata["choices"]
        if limits and not limits[0] <= value <= limits[1]:  # NaN is not within either
            raise ValueError(f"{f.name} is {value}, must be between {limits[0]} and {limits[1]}")
        if choices and value not in choices:
            raise ValueError(f"{f.name} is {value!r}, must be one of {', '.join(choices)}")


def fixed_settings(config: type) -> tuple[str, ...]:
    """Names of the settings that cannot change later."""
    return tuple(f.name for f in fields(config) if f.metadata["fixed"])
