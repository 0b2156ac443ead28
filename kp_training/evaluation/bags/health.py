"""Plausibility checks of the results of a bag, with the rules of the node's diagnostics."""

from __future__ import annotations

import math
from collections.abc import Sequence

from kp_frontend.calibration import Camera as Lens
from kp_frontend.encodings import GreyConverter
from kp_frontend.features import StereoFeatures
from kp_frontend.health import HealthMonitor
from kp_training.evaluation.bags.stamps import stamp_text
from kp_training.evaluation.frames import StereoFrame

EVERY = 1.0  # seconds of the bag between two looks, as in the node


class StreamHealth:
    """Queries a `HealthMonitor` once per second of the bag and collects its findings.

    Args:
        topics: of the left and right images.
        grey: what makes the images.
        depths: nearest and farthest that are searched, metres.
    """

    def __init__(
        self,
        topics: Sequence[str] = (),
        grey: GreyConverter | None = None,
        depths: tuple[float, float] = (0.0, math.inf),
    ) -> None:
        self._monitor = HealthMonitor(topics, grey)
        self._monitor.depths = depths
        self._looks = 0
        self._begin = self._looked = math.nan  # seconds
        self._stamp = 0
        self._found: dict[str, dict] = {}

    def add(self, frame: StereoFrame, features: StereoFeatures) -> None:
        """Add a pair and its features."""
        seconds = frame.stamp / 1e9
        if not self._looked <= seconds:  # the first pair, or time went back
            self._begin = self._looked = seconds
        images = frame.left, frame.right
        self._monitor.add(seconds, features, *images, _lenses(frame))
        self._stamp = frame.stamp
        if seconds - self._looked >= EVERY:
            self._looked = seconds
            self._look()

    def _look(self, **options: float) -> None:
        self._looks += 1
        for finding in self._monitor.findings(**options):
            new = {"cause": finding.cause, "first": stamp_text(self._stamp), "looks": 0}
            entry = self._found.setdefault(finding.cause, new)
            entry["words"] = finding.words
            entry["looks"] += 1

    def summary(self) -> list[dict]:
        """The findings, the most frequent first: cause, message, first time stamp and share.

        A stream that is shorter than a look is judged as a whole.
        """
        if not self._looks and self._stamp:
            self._look(least_seconds=0)
        found = sorted(self._found.values(), key=lambda entry: -entry["looks"])
        return [
            {name: entry[name] for name in ("cause", "words", "first")}
            | {"share": entry["looks"] / self._looks}
            for entry in found
        ]


def _lenses(frame: StereoFrame) -> tuple[Lens, Lens] | None:
    """The cameras of a frame's images; None without a full calibration."""
    if frame.cameras is None or frame.raw:
        return None
    left, right = frame.cameras
    try:
        return left.for_image(frame.left).lens(), right.for_image(frame.right).lens()
    except ValueError:  # the evaluation reports this itself
        return None
