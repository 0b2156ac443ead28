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

import cv2
import numpy as np

from kp_frontend.calibration import Camera, RawStereoCalibration
from kp_frontend.encodings import GreyConverter
from kp_frontend.features import StereoFeatures

Cameras = tuple[Camera, Camera]

SECONDS = 3.0  # of the newest pairs that are judged
LEAST_SECONDS, LEAST_PAIRS = 1.0, 3  # that there must be before keypoints and matches are judged
FEW_KEYPOINTS = 30
FEW_MATCHES, FEW_MATCHES_SHARE = 25, 0.04  # fewer than the number, or the share of the keypoints
# Below this share of the keypoints matches are doubted: less of them than AGREE have a disparity
# like their neighbours', or the median cosine of their descriptors is less than ALIKE. On 14 scenes
# of Middlebury wrong pairs have shares up to .15, right ones, also dim or noisy, agree.
DOUBTED_SHARE, AGREE, ALIKE = 0.15, 0.65, 0.7
NEIGHBOURS, LIKE_NEIGHBOURS = 6, (3.0, 0.1)  # pixels, share of the disparity
SAMPLES = 4096  # pixels of an image of which the grey values are looked at
PERCENTILES = (2, 98)  # of the grey values: their range
DULL = 24  # grey values; a smaller range shows nothing
DARK, BRIGHT = 48, 220  # grey values; a dull image below or above them
ROWS_PAIRS, ROWS_MATCHES = 300, 1000  # newest pairs, and matches in them, that judge the rows
ROWS_OFF = 0.5  # pixels of median row offset that are worth a warning
MOST_COMPARED = 1024  # keypoints of each image, to find out why there are few matches
SIMILAR = 0.6  # cosine of descriptors
SAME_ROW = 2.0  # pixels
CONSENSUS, CONSENSUS_SHARE = 30, 0.3  # matches that agree are no accident
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
        samples = [_sample(image) for image in (left, right)]
        ranges = [np.percentile(sample, PERCENTILES) for sample in samples]
        depth = result.points[:, 2]
        known = depth[np.isfinite(depth)]
        pair = _Pair(
            time,
            (len(result.left), len(result.right)),
            len(result),
            _doubtful(result),
            result.row_offset,
            float(np.median(known)) if len(known) else math.nan,
            (tuple(map(float, ranges[0])), tuple(map(float, ranges[1]))),
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
        if all(pair.same and not _dull(*pair.greys[0]) for pair in recent):
            words = "left and right show the same image: are both topics of one camera?"
            return [Finding("same image", words)]
        found = _calibration_doubts(result, pairs[-1].depth)
        if self._grey and (clipped := self._grey.clipped()):
            found.append(Finding("bit depth", clipped))
        raw = self._raw(result, cameras)
        enough = len(recent) >= LEAST_PAIRS and recent[-1].time - recent[0].time >= least_seconds
        if enough or least_seconds == 0:
            found += self._poor(recent, result, raw)
        if raw:
            found.append(Finding("raw", raw))
        elif not found and (rows := _rows_off(pairs)):
            found.append(rows)
        return found

    def _poor(self, recent: list[_Pair], result: StereoFeatures, raw: str) -> list[Finding]:
        """Keypoints or matches near nothing, and why."""
        keypoints = np.median([pair.keypoints for pair in recent], axis=0)
        matches = float(np.median([pair.matches for pair in recent]))
        if 2 * sum(pair.doubtful for pair in recent) <= len(recent):
            return []
        greys = np.median([pair.greys for pair in recent], axis=0)
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
        self._raw_evidence.append(_row_evidence(result, cameras))
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


def _doubtful(result: StereoFeatures) -> bool:
    """Whether matches are near nothing, or so few and unlike each other that most are wrong."""
    keypoints = min(len(result.left), len(result.right))
    count = len(result)
    if count < max(FEW_MATCHES, FEW_MATCHES_SHARE * keypoints):
        return True
    if count >= DOUBTED_SHARE * keypoints:
        return False
    if np.median(result.similarity) < ALIKE:
        return True
    place, disparity = result.left.keypoints[result.left_index], result.disparity
    apart = np.square(place[:, None] - place).sum(-1)
    np.fill_diagonal(apart, np.inf)
    near = np.argpartition(apart, NEIGHBOURS, 1)[:, :NEIGHBOURS]
    usual = np.median(disparity[near], 1)
    pixels, share = LIKE_NEIGHBOURS
    like = np.abs(disparity - usual) <= np.maximum(pixels, share * np.abs(usual))
    return bool(like.mean() < AGREE)


def _sample(image: np.ndarray) -> np.ndarray:
    step = max(1, math.ceil(math.sqrt(image.size / SAMPLES)))
    return image[::step, ::step]


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


def _rows_off(pairs: list[_Pair]) -> Finding | None:
    """The rows of the rig are off; None if not, or too few matches tell."""
    offsets = [pair.row_offset for pair in pairs if not math.isnan(pair.row_offset)]
    if not offsets or sum(pair.matches for pair in pairs) < ROWS_MATCHES:
        return None
    offset = float(np.median(offsets))
    if abs(offset) <= ROWS_OFF:
        return None
    words = f"the right image's rows are {offset:+.2f} px off the left's: calibrate the rig again"
    return Finding("rows off", words)


def _calibration_doubts(result: StereoFeatures, depth: float) -> list[Finding]:
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
    if depth < PLAUSIBLE_DEPTH[0] or depth > PLAUSIBLE_DEPTH[1]:
        return [
            Finding(
                "depth",
                f"a median depth of {depth:.3g} m is implausible: check the unit of P[3] and the "
                "principal points in P",
            )
        ]
    return []


def why_unmatched(
    result: StereoFeatures, depths: tuple[float, float] = (0.0, math.inf)
) -> tuple[str, str]:
    """The likeliest cause, and a sentence, of few matches between images with many keypoints.

    Descriptors are matched again without the limits of a rectified pair: what agrees then, and
    where, tells the cause.

    Args:
        depths: nearest and farthest that are searched, metres.
    """
    left, right = (side.keypoints[:MOST_COMPARED] for side in (result.left, result.right))
    similarity = (
        result.left.descriptors[:MOST_COMPARED] @ result.right.descriptors[:MOST_COMPARED].T
    )
    partner = similarity.argmax(1)
    mutual = similarity.argmax(0)[partner] == np.arange(len(partner))
    good = np.flatnonzero(mutual & (similarity.max(1) >= SIMILAR))
    left, right = left[good], right[partner[good]]
    infinity = result.calibration.offset if result.calibration else 0.0
    disparity = left[:, 0] - right[:, 0] - infinity
    rows = right[:, 1] - left[:, 1]
    same_row = np.abs(rows) <= SAME_ROW
    ahead = int((same_row & (disparity > 1)).sum())
    behind = int((same_row & (disparity < -1)).sum())
    if behind >= max(CONSENSUS, 3 * ahead):
        return "swapped", "left and right are swapped: many match when tried the other way round"
    if ahead >= max(CONSENSUS, 3 * behind):
        usual = float(np.median(disparity[same_row & (disparity > 1)]))
        calibration = result.calibration
        depth = calibration.fx * calibration.baseline / usual if calibration else depths[0]
        if not depths[0] <= depth <= depths[1]:
            return (
                "depth limits",
                f"many match with disparities around {usual + infinity:.0f} px, a depth of "
                f"{depth:.3g} m by camera_info, which min_depth or max_depth rules out",
            )
        return (
            "poor images",
            "the images are noisy, blurred or dim, so that few keypoints look alike in both",
        )
    enough = max(CONSENSUS, CONSENSUS_SHARE * len(good))
    if len(rows):
        agree = np.abs(rows[:, None] - rows) <= SAME_ROW
        usual = int(agree.sum(1).argmax())
        if abs(rows[usual]) > SAME_ROW and agree[usual].sum() >= enough:
            return (
                "rows apart",
                f"the right image's rows are about {rows[usual]:+.0f} px off the left's: the "
                "images are not rectified, or the calibration is of another rig",
            )
    if len(good) >= CONSENSUS:
        inside = cv2.findFundamentalMat(left, right, cv2.USAC_DEFAULT, 1.0, 0.99, 500)[1]
        if inside is not None and inside.sum() >= enough:
            return (
                "not rectified",
                "the images show the same scene, but not along the same rows: they are not "
                "rectified, or the calibration is of another rig",
            )
    return (
        "another scene",
        "the images are not rectified, or do not show the same scene (one turned or mirrored, "
        "cameras that do not look the same way, or images of different moments)",
    )


def _row_evidence(result: StereoFeatures, cameras: Cameras) -> tuple[float, float, float, int]:
    """How the rows of matches would change by rectification, and how that fits their differences.

    Returns:
        Sums over the matches: difference times expected difference of raw images, the square of
        the latter, the square of the former; and the number of matches.
    """
    places = (
        result.left.keypoints[result.left_index],
        result.right.keypoints[result.right_index],
    )
    differ = places[1][:, 1] - places[0][:, 1]
    rectified = [c.rectify(xy) for c, xy in zip(cameras, places, strict=True)]
    expected = differ - (rectified[1][:, 1] - rectified[0][:, 1])
    known = np.isfinite(expected) & (np.abs(expected) < 10 * SAME_ROW)
    differ, expected = differ[known], expected[known]
    sums = (float(differ @ expected), float(expected @ expected), float(differ @ differ))
    return *sums, len(differ)
