"""Why something was left out: lists of reasons on few lines."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

STAMP = re.compile(r"(\d+\.\d{9}): (.*)", re.DOTALL)


def listed(reasons: Sequence[str], most: int = 3) -> str:
    """The first reasons of a list in one line, and how many more there are."""
    more = [f"{len(reasons) - most} more"] if len(reasons) > most else []
    return "; ".join([*reasons[:most], *more])


def grouped(reasons: Iterable[str]) -> list[str]:
    """One line for each reason of a list; those that differ in the time stamp only share one."""
    groups: dict[str, list[str]] = {}
    for reason in reasons:
        stamped = STAMP.fullmatch(reason)
        stamps = groups.setdefault(stamped[2] if stamped else reason, [])
        if stamped:
            stamps.append(stamped[1])
    return [f"{listed(stamps)}: {words}" if stamps else words for words, stamps in groups.items()]
