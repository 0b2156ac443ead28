"""Plausibility checks of the results, for the node and the bag evaluation.

Features can be published without an error and still be wrong, for example if a lens is covered,
left and right are swapped, the images are not rectified, or the calibration is in millimetres.
`HealthMonitor` checks the newest pairs and reports the most likely cause.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kp_frontend.calibration import Camera, RawStereoCalibration
from kp_frontend.encodings import GreyConverter
from kp_frontend.features import StereoFeatures
from kp_frontend.mismatches import USUAL_SHARE, doubtful, row_evidence, slope, why_unmatched

Cameras = tuple[Camera, Camera]

SECONDS = 3.0  # duration of the newest pairs that are checked
LEAST_SECONDS, LEAST_PAIRS = 1.0, 3  # minimum needed to check keypoints and matches
FEW_KEYPOINTS = 30
SAMPLES = 4096  # number of pixels per image that are sampled for grey values
PERCENTILES = (2, 98)  # percentiles of the grey values that define their range
DULL = 24  # minimum range of grey values of a useful image
DARK, BRIGHT = 48, 220  # grey values below or above which a dull image is dark or overexposed
ROWS_PAIRS, ROWS_MATCHES = 300, 1000  # number of newest pairs, and of matches, for the row offset
ROWS_OFF = 0.5  # pixels; median row offset above which to warn
RAW_MOVES = 2.0  # pixels; smaller motions by rectification are ignored
RAW_LOOKS = 60  # number of pairs, one per check, to tell raw images from rectified ones
RAW_MATCHES, RAW_SLOPE = 100, 0.4  # minimum number of matches, maximum error of the slope
PLAUSIBLE_FOCAL = (0.1, 20.0)  # share of the image width: fields of view from 157 to 3 degrees
PLAUSIBLE_DEPTH = (0.01, 1000.0)  # metres


@dataclass(frozen=True)
class Finding:
    """A problem that makes the results wrong or doubtful: the name of its cause, and a message."""

    cause: str
    words: str


@dataclass(frozen=True)
class _Pair:
    """Statistics of a pair."""

    time: float
    keypoints: tuple[int, int]
    matches: int
    doubtful: bool  # most matches are probably wrong
    rare: bool  # the share of matched keypoints is lower than usual
    row_offset: float
    depth: float  # median, metres
    greys: tuple[tuple[float, float], tuple[float, float]]  # range of the left and right image
    same: bool  # both images are equal


class HealthMonitor:
    """Checks the newest pairs. One thread may add pairs while another calls `findings`.

    Args:
        topics: topics of the left and right images. Their names may contain `raw`.
        grey: the converter of the images, which knows their bit depth.
    """

    def __init__(self, topics: Sequence[str] = (), grey: GreyConverter | None = None) -> None:
        self._topics, self._grey = topics, grey
        self._lock = threading.Lock()
        self._pairs: deque[_Pair] = deque(maxlen=ROWS_PAIRS)
        self._last: tuple[StereoFeatures, Cameras | None] | None = None
        self._raw_evidence: deque[tuple[np.ndarray, np.ndarray]] = deque(maxlen=RAW_LOOKS)
        self._moves: tuple[Cameras | None, bool] = (None, False)

        self.depths = (0.0, math.inf)  # metres; limits of the disparity search

    def clear(self) -> None:
        """Forget all pairs."""
        with self._lock:
            self._pairs.clear()
            self._raw_evidence.clear()
            self._last = None

    def add(
        self,
        time: float,
        result: StereoFeatures,
        left: np.ndarray,
        right: np.ndarray,
        cameras: Cameras | None = None,
    ) -> None:
        """Add a pair.

        Args:
            time: seconds on any clock.
            left, right: the images, (H, W) uint8.
            cameras: both cameras from camera_info, for images of this size.
        """
        samples = _sample(left), _sample(right)
        depth = result.points[:, 2]
        known = depth[np.isfinite(depth)]
        pair = _Pair(
            time,
            (len(result.left), len(result.right)),
            len(result),
            doubtful(result),
            len(result) < USUAL_SHARE * min(len(result.left), len(result.right)),
            result.row_offset,
            float(np.median(known)) if len(known) else math.nan,
            (_range(samples[0]), _range(samples[1])),
            left.shape == right.shape and bool((samples[0] == samples[1]).all()),
        )
        with self._lock:
            if self._pairs and time < self._pairs[-1].time:  # time went back: a new stream
                self._pairs.clear()
            self._pairs.append(pair)
            self._last = result, cameras

    def findings(self, least_seconds: float = LEAST_SECONDS) -> list[Finding]:
        """The findings, the most likely cause first; empty without a problem.

        Args:
            least_seconds: minimum duration of the newest pairs to check keypoints and matches.
        """
        with self._lock:
            pairs, last = list(self._pairs), self._last
        if last is None:
            return []
        result, cameras = last
        recent = [pair for pair in pairs if pair.time >= pairs[-1].time - SECONDS]
        recent = max(recent, pairs[-LEAST_PAIRS:], key=len)  # more than 3 s of a slow stream
        if all(pair.same and not _dull(*pair.greys[0]) for pair in recent):
            words = "left and right show the same image: are both topics of one camera?"
            return [Finding("same image", words)]
        found = _calibration_doubts(result)
        if self._grey and (clipped := self._grey.clipped()):
            found.append(Finding("bit depth", clipped))
        raw = self._raw(result, cameras)
        enough = len(recent) >= LEAST_PAIRS and recent[-1].time - recent[0].time >= least_seconds
        if enough or least_seconds == 0:
            found += self._poor(recent, result, raw)
        if raw:
            found.append(Finding("raw", raw))
        elif not found:
            found += _rows_off(pairs) + _depth_doubts(recent)
        return found

    def _poor(self, recent: list[_Pair], result: StereoFeatures, raw: str) -> list[Finding]:
        """Findings for too few keypoints or matches."""
        keypoints = np.median([pair.keypoints for pair in recent], axis=0)
        matches = float(np.median([pair.matches for pair in recent]))
        most_doubtful, most_rare = (
            2 * sum(flags) > len(recent)
            for flags in zip(*((pair.doubtful, pair.rare) for pair in recent), strict=True)
        )
        if not most_doubtful and not most_rare:
            return []
        greys = np.median([pair.greys for pair in recent], axis=0)
        if not most_doubtful:
            # If the cameras converge, even swapped images have some matches.
            cause, words = why_unmatched(result, self.depths)
            return [Finding(cause, words)] if cause == "swapped" and not raw else []
        if blind := self._blind(greys):
            return blind
        bare = [
            Finding(
                f"{side} bare",
                f"the {side} image has {count:.0f} keypoints only: it shows little texture, or "
                "score_threshold is too high",
            )
            for side, count in zip(("left", "right"), keypoints, strict=True)
            if count < FEW_KEYPOINTS
        ]
        if bare or raw:
            return bare
        cause, words = why_unmatched(result, self.depths)
        return [Finding(cause, f"{matches:.0f} matches of {min(keypoints):.0f} keypoints: {words}")]

    def _blind(self, greys: np.ndarray) -> list[Finding]:
        """Findings for dark, overexposed or blank images, by their ranges of grey values (2, 2)."""
        told = [_dull(low, high) for low, high in greys]
        if told[0] and told[1] and told[0][0] == told[1][0]:
            word, why = told[0]
            return [Finding(word, f"both images are {word} ({why}){self._bits()}")]
        return [
            Finding(f"{side} {found[0]}", f"the {side} image is {found[0]} ({found[1]})")
            for side, found in zip(("left", "right"), told, strict=True)
            if found
        ]

    def _bits(self) -> str:
        unused = self._grey.unused_bits() if self._grey else ""
        return f"; {unused}" if unused else ""

    def _raw(self, result: StereoFeatures, cameras: Cameras | None) -> str:
        """A message if images that should be rectified look raw, else an empty string."""
        if cameras is None or isinstance(result.calibration, RawStereoCalibration):
            return ""
        if cameras != self._moves[0]:
            self._moves = cameras, any(moves_points(camera) for camera in cameras)
            self._raw_evidence.clear()
        if not self._moves[1]:
            return ""
        remedy = "set input to raw, or rectify them first"
        if named := [topic for topic in self._topics if says_raw(topic)]:
            return (
                f"the images look raw, not rectified: the topic is {named[0]}, and camera_info "
                f"contains a rectification that changes them; {remedy}"
            )
        self._raw_evidence.append(row_evidence(result, cameras))
        differ, expected = np.hstack(self._raw_evidence)
        # The slope is 1 if the row differences of the matches are those of raw images, 0 if the
        # images are rectified.
        if len(differ) >= RAW_MATCHES and abs(slope(differ, expected) - 1) < RAW_SLOPE:
            return (
                "the images look raw, not rectified: rectification by camera_info improves the row "
                f"alignment of the matches; {remedy}"
            )
        return ""


def says_raw(topic: str) -> bool:
    """Whether the name of an image topic indicates raw images."""
    return "raw" in topic and "rect" not in topic


def moves_points(camera: Camera) -> bool:
    """Whether rectification moves some pixels by more than `RAW_MOVES`."""
    x, y = (np.linspace(0, size - 1, 5) for size in (camera.width, camera.height))
    grid = np.stack(np.meshgrid(x, y), -1).reshape(-1, 2)
    moved = np.abs(camera.rectify(grid) - grid)
    return bool((np.isnan(moved) | (moved > RAW_MOVES)).any())


def _sample(image: np.ndarray) -> np.ndarray:
    step = max(1, math.ceil(math.sqrt(image.size / SAMPLES)))
    return image[::step, ::step]


def _range(grey: np.ndarray) -> tuple[float, float]:
    low, high = np.percentile(grey, PERCENTILES)
    return float(low), float(high)


def _dull(low: float, high: float) -> tuple[str, str] | None:
    """A description and a reason if the range of grey values is too small, else None."""
    if high - low >= DULL:
        return None
    values = f"grey values from {low:.0f} to {high:.0f} of 255"
    if high < DARK:
        return "dark", f"{values}: is the lens covered, or the exposure too short?"
    if low > BRIGHT:
        return "overexposed", f"{values}: is the exposure too long?"
    return "without contrast", f"{values}: a blank wall, fog, or a lens out of focus?"


def _rows_off(pairs: list[_Pair]) -> list[Finding]:
    """A finding if the row offset of the rig is too large; none with too few matches."""
    offsets = [pair.row_offset for pair in pairs if not math.isnan(pair.row_offset)]
    if not offsets or sum(pair.matches for pair in pairs) < ROWS_MATCHES:
        return []
    offset = float(np.median(offsets))
    if abs(offset) <= ROWS_OFF:
        return []
    words = f"the right image's rows are {offset:+.2f} px off the left's: calibrate the rig again"
    return [Finding("rows off", words)]


def _depth_doubts(recent: list[_Pair]) -> list[Finding]:
    """A finding for implausible depths."""
    depths = [pair.depth for pair in recent if not (math.isnan(pair.depth) or pair.doubtful)]
    depth = float(np.median(depths)) if depths else math.nan
    if not (depth < PLAUSIBLE_DEPTH[0] or depth > PLAUSIBLE_DEPTH[1]):
        return []
    return [
        Finding(
            "depth",
            f"a median depth of {depth:.3g} m is implausible: check the unit of P[3] and the "
            "principal points in P",
        )
    ]


def _calibration_doubts(result: StereoFeatures) -> list[Finding]:
    """Findings for a calibration that is implausible for images of this size."""
    calibration = result.calibration
    if calibration is None:
        return []
    if doubt := calibration.doubt():
        return [Finding("baseline", doubt)]
    share = calibration.fx / result.width
    if not PLAUSIBLE_FOCAL[0] <= share <= PLAUSIBLE_FOCAL[1]:
        return [
            Finding(
                "focal length",
                f"a focal length of {calibration.fx:g} px is implausible for images "
                f"{result.width} px wide: P must be in pixels, and of this image size",
            )
        ]
    if not (0 <= calibration.cx <= result.width and 0 <= calibration.cy <= result.height):
        return [
            Finding(
                "principal point",
                f"the principal point of P ({calibration.cx:.0f}, {calibration.cy:.0f}) is outside "
                f"the {result.width}x{result.height} image: camera_info is for another size",
            )
        ]
    return []
