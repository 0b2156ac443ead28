"""Are the results worth anything? The likeliest cause if not. For the node and for bags alike.

A stream of features can flow without a fault and still be wrong: a covered lens, left and right
swapped, images that are not rectified, a calibration in millimetres. `HealthMonitor` looks at the
newest pairs and names such causes.
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
from kp_frontend.mismatches import USUAL_SHARE, doubtful, row_evidence, why_unmatched

Cameras = tuple[Camera, Camera]

SECONDS = 3.0  # of the newest pairs that are judged
LEAST_SECONDS, LEAST_PAIRS = 1.0, 3  # that there must be before keypoints and matches are judged
FEW_KEYPOINTS = 30
SAMPLES = 4096  # pixels of an image of which the grey values are looked at
PERCENTILES = (2, 98)  # of the grey values: their range
DULL = 24  # grey values; a smaller range shows nothing
DARK, BRIGHT = 48, 220  # grey values; a dull image below or above them
ROWS_PAIRS, ROWS_MATCHES = 300, 1000  # newest pairs, and matches in them, that judge the rows
ROWS_OFF = 0.5  # pixels of median row offset that are worth a warning
RAW_MOVES = 2.0  # pixels by which rectification must move points for raw images to matter
RAW_LOOKS = 10  # pairs, one for each look, that tell raw images from rectified ones
RAW_ROWS = 0.15  # pixels (rms) by which raw images' rows must differ for matches to tell
PLAUSIBLE_FOCAL = (0.1, 20.0)  # of the image's width: fields of view from 157 to 3 degrees
PLAUSIBLE_DEPTH = (0.01, 1000.0)  # metres


@dataclass(frozen=True)
class Finding:
    """Something that makes results worthless or doubtful: a cause by name, and a sentence."""

    cause: str
    words: str


@dataclass(frozen=True)
class _Pair:
    """What is remembered of a pair."""

    time: float
    keypoints: tuple[int, int]
    matches: int
    doubtful: bool  # few of the matches, if any, are right
    rare: bool  # less of the keypoints are matched than usual
    row_offset: float
    depth: float  # median, metres
    greys: tuple[tuple[float, float], tuple[float, float]]  # range of the left and right image
    same: bool  # both images are one


class HealthMonitor:
    """Judges the newest pairs. One thread may add pairs while another asks for findings.

    Args:
        topics: of the left and right images; their names may say that they are raw.
        grey: what made the images, for what it knows of their bit depth.
    """

    def __init__(self, topics: Sequence[str] = (), grey: GreyConverter | None = None) -> None:
        self._topics, self._grey = topics, grey
        self._lock = threading.Lock()
        self._pairs: deque[_Pair] = deque(maxlen=ROWS_PAIRS)
        self._last: tuple[StereoFeatures, Cameras | None] | None = None
        self._raw_evidence: deque[tuple[float, float, float, int]] = deque(maxlen=RAW_LOOKS)
        self._moves: tuple[Cameras | None, bool] = (None, False)

        self.depths = (0.0, math.inf)  # metres; the depths that are searched

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
        """Take note of a pair.

        Args:
            time: seconds, of any clock.
            left, right: the images, (H, W) uint8.
            cameras: what camera_info says of both, for images of this size.
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
            if self._pairs and time < self._pairs[-1].time:  # time went back: another stream
                self._pairs.clear()
            self._pairs.append(pair)
            self._last = result, cameras

    def findings(self, least_seconds: float = LEAST_SECONDS) -> list[Finding]:
        """What is wrong, the likeliest cause first; empty if nothing is.

        Args:
            least_seconds: that the newest pairs must span before keypoints and matches are judged.
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
        """Keypoints or matches near nothing, and why."""
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
            # Between cameras that converge even swapped images have some matches.
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
        """Images, by their ranges of grey values (2, 2), that show nothing."""
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
        """A sentence if images taken for rectified ones are raw; empty if not, or not known."""
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
                f"the images look raw, not rectified: {named[0]} is named so, and camera_info says "
                f"that rectification changes them; {remedy}"
            )
        self._raw_evidence.append(row_evidence(result, cameras))
        explained, expected, total, count = np.sum(self._raw_evidence, axis=0)
        if expected == 0:
            return ""
        # Least squares: 1 if the matches' rows differ as those of raw images do, 0 if not at all.
        share, error = explained / expected, math.sqrt(total / count / expected)
        if math.sqrt(expected / count) > RAW_ROWS and 0.5 + 3 * error < share < 1.5:
            return (
                "the images look raw, not rectified: matches keep to their rows better after "
                f"rectification by camera_info; {remedy}"
            )
        return ""


def says_raw(topic: str) -> bool:
    """Whether the name of an image topic says that its images are not rectified."""
    return "raw" in topic and "rect" not in topic


def moves_points(camera: Camera) -> bool:
    """Whether rectification moves some points of a camera's images by more than `RAW_MOVES`."""
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
    """What an image with a range of grey values shows if it shows nothing, and why."""
    if high - low >= DULL:
        return None
    values = f"grey values from {low:.0f} to {high:.0f} of 255"
    if high < DARK:
        return "dark", f"{values}: is the lens covered, or the exposure too short?"
    if low > BRIGHT:
        return "overexposed", f"{values}: is the exposure too long?"
    return "without contrast", f"{values}: a blank wall, fog, or a lens out of focus?"


def _rows_off(pairs: list[_Pair]) -> list[Finding]:
    """The rows of the rig are off; nothing if not, or if too few matches tell."""
    offsets = [pair.row_offset for pair in pairs if not math.isnan(pair.row_offset)]
    if not offsets or sum(pair.matches for pair in pairs) < ROWS_MATCHES:
        return []
    offset = float(np.median(offsets))
    if abs(offset) <= ROWS_OFF:
        return []
    words = f"the right image's rows are {offset:+.2f} px off the left's: calibrate the rig again"
    return [Finding("rows off", words)]


def _depth_doubts(recent: list[_Pair]) -> list[Finding]:
    """Depths that no scene has."""
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
    """What of the calibration is implausible for images of this size."""
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
