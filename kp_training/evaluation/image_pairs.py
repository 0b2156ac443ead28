"""Common parts of the evaluations on pairs of still images."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol, TypeVar

import numpy as np
from rich.progress import track

from kp_training.evaluation.method import Found, Method
from kp_training.evaluation.methods import NetworkMethod
from kp_training.evaluation.results import seed_everything, summary


class Named(Protocol):
    """The files of a pair, with a name."""

    @property
    def name(self) -> str: ...


Files = TypeVar("Files", bound=Named)
Pair = TypeVar("Pair")


class PairResult(NamedTuple):
    """The result of a method on both images of a pair.

    `matches` (M, 2) are indices, `milliseconds` is the time for the detection in one image.
    """

    first: Found
    second: Found
    matches: np.ndarray
    milliseconds: float

    def places(self) -> tuple[np.ndarray, np.ndarray]:
        """Positions of the matches in the first and in the second image, (M, 2) each."""
        return self.first.xy[self.matches[:, 0]], self.second.xy[self.matches[:, 1]]


def run_method(method: Method, images: tuple[np.ndarray, np.ndarray], seeded: bool) -> PairResult:
    """Detect in both images and match. `seeded` seeds all random generators first."""
    if seeded:
        seed_everything()
    first, second, took = method.detect_timed(images)
    return PairResult(first, second, method.match(first, second), took)


def load_usable(
    found: Sequence[Files], load: Callable[[Files], Pair], skipped: list[str], what: str
) -> Iterator[tuple[Files, Pair]]:
    """Load each pair, with a progress bar. Pairs that fail to load are added to `skipped`."""
    for files in track(found, what):
        try:
            pair = load(files)
        except ValueError as error:
            skipped.append(f"{files.name}: {error}")
            continue
        yield files, pair


def pair_metrics_file(
    scenes: Iterable[str],
    names: Iterable[str],
    rows: dict[str, dict[str, dict[str, float | None]]],
    protocol: dict,
) -> dict:
    """The contents of metrics.json.

    Args:
        scenes: names of the pairs.
        names: names of the metrics.
        rows: the metrics of each method and pair.
        protocol: settings of the evaluation.
    """
    return {
        "scenes": list(scenes),
        "protocol": protocol,
        "methods": {method: summary(names, found) for method, found in rows.items()},
    }


def pair_protocol(
    most: int,
    size: tuple[int, int] | None,
    seeded: bool,
    skipped: list[str],
    methods: Iterable[Method],
    **own: object,
) -> dict:
    """The common part of `protocol`, with the entries `own` of one evaluation."""
    networks = [method for method in methods if isinstance(method, NetworkMethod)]
    return {
        "max_keypoints": most,
        "size": list(size) if size else "native",
        "seeded": seeded,
        "engines": {method.name: sorted(method.engines) for method in networks},
        **own,
        "skipped": skipped,
    }
