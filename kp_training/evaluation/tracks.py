"""How long tracks live, and how exactly they follow their points."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import cv2
import numpy as np
from matplotlib.figure import Figure

from kp_frontend.features import StereoFeatures

NEAR, CLOSE = 3.0, 1.0  # pixels, of the two accuracies
LONG = 10  # observations of a long track
TRAIL = 12  # observations of a track that are drawn
LONGEST_SHOWN = 30  # observations, of the survival curve


def same_tracks(before: np.ndarray, now: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows in `before` and in `now` (N,), (M,) of the same track ids; 0 is no track."""
    ids, old, new = np.intersect1d(before, now, return_indices=True)
    return old[ids > 0], new[ids > 0]


def track_errors(
    before: StereoFeatures, now: StereoFeatures, now_from_before: np.ndarray
) -> np.ndarray:
    """Distance (M,) in pixels of tracked points from where the true motion puts them.

    The place in the left image follows from the depth in the frame before. Points without depth,
    and those that the motion takes behind the camera, are left out.

    Args:
        before, now: features with a calibration, their coordinates rectified.
        now_from_before: (4, 4) true motion of the left camera's frame.
    """
    calibration = now.calibration
    if calibration is None:
        raise ValueError("without a calibration the true motion of pixels is not known")
    points = np.full((len(before.left), 3), np.nan)
    points[before.left_index] = before.points
    old, new = same_tracks(before.left.track_ids, now.left.track_ids)
    x, y, z = (points[old] @ now_from_before[:3, :3].T + now_from_before[:3, 3]).T
    ahead = z > 0  # not where z is NaN
    x, y, z = x[ahead], y[ahead], z[ahead]
    place = [calibration.fx * x / z + calibration.cx, calibration.fy * y / z + calibration.cy]
    return np.linalg.norm(np.column_stack(place) - now.left.keypoints[new[ahead]], axis=1)


class TrackMetrics:
    """Track metrics of a sequence, frame after frame.

    `lengths` counts the observations of each track.
    """

    def __init__(self) -> None:
        self.lengths: Counter[int] = Counter()
        self._began: dict[int, int] = {}
        self._frames = 0
        self._tracked: list[int] = []
        self._errors: list[np.ndarray] = []
        self._before: tuple[StereoFeatures, np.ndarray | None] | None = None

    def add(
        self,
        features: StereoFeatures,
        pose: np.ndarray | None = None,
        goes_on: bool = True,
    ) -> dict[str, float | None]:
        """Take the next frame.

        Args:
            features: without a calibration errors are not known.
            pose: (4, 4) true pose of the left rectified camera in the world, None if unknown.
            goes_on: whether the frame before is of the same camera.

        Returns:
            Those of `values` that are about single frames, of this one.
        """
        ids = features.left.track_ids
        found = ids[ids > 0].tolist()
        self.lengths.update(found)
        for track in found:
            self._began.setdefault(track, self._frames)
        self._frames += 1
        before, self._before = self._before, (features, pose)
        if before is None or not goes_on or not ids.any():
            return {}
        tracked = len(same_tracks(before[0].left.track_ids, ids)[0])
        self._tracked.append(tracked)
        row: dict[str, float | None] = {"tracked": tracked}
        if features.calibration and pose is not None and before[1] is not None:
            errors = track_errors(before[0], features, np.linalg.inv(pose) @ before[1])
            self._errors.append(errors)
            row |= {name: _mean(v) for name, v in _accuracies(errors).items()}
            row["track_error_px"] = float(np.median(errors)) if errors.size else None
        return row

    def values(self) -> dict[str, float | None]:
        """The metrics of the sequence; None where nothing is known.

        `tracked`, the mean number of left keypoints with a track from the frame before;
        `track_length`, the median over all observations of the length that their track reaches;
        `track_share_10`, the share of observations in tracks of at least 10; `track_accuracy` and
        `track_accuracy_1px`, the share of tracked points within 3 px and 1 px of their true place,
        `track_error_px`, the median distance from it.
        """
        reached = np.array(list(self.lengths.values()), int)
        each = np.repeat(reached, reached)  # of every observation
        errors = np.concatenate([np.zeros(0), *self._errors])
        return {
            "tracked": _mean(np.array(self._tracked, float)) if self.lengths else None,
            "track_length": float(np.median(each)) if each.size else None,
            "track_share_10": _mean(each >= LONG),
            **{name: _mean(found) for name, found in _accuracies(errors).items()},
            "track_error_px": float(np.median(errors)) if errors.size else None,
        }

    def survival(self) -> list[float | None]:
        """Share of the tracks that reach 1, 2, ... observations.

        Of those only that began early enough to reach them before the sequence ended; None where
        there are none.
        """
        began = np.array(list(self._began.values()), int)
        reached = np.array([self.lengths[track] for track in self._began], int)
        most = min(LONGEST_SHOWN, self._frames)
        could = [began <= self._frames - n for n in range(1, most + 1)]
        return [_mean(reached[c] >= n) for n, c in enumerate(could, 1)]


class Trails:
    """Where the tracks of the last frame came from."""

    def __init__(self) -> None:
        self._places: dict[int, list[np.ndarray]] = {}
        self._image = np.zeros((1, 1), np.uint8)

    def add(self, features: StereoFeatures, image: np.ndarray) -> None:
        """Take the next frame: its features and its left image (H, W) uint8."""
        left = features.left
        self._image = image
        self._places = {
            track: [*self._places.get(track, [])[1 - TRAIL :], place]
            for track, place in zip(left.track_ids.tolist(), left.keypoints, strict=True)
            if track
        }

    def draw(self) -> np.ndarray:
        """The last image (H, W, 3), BGR, with the way of each track of at least two observations,
        coloured by their number: blue for two, red for `TRAIL` and more."""
        canvas = cv2.cvtColor(self._image, cv2.COLOR_GRAY2BGR)
        trails = sorted((np.array(p) for p in self._places.values() if len(p) > 1), key=len)
        levels = np.array([[255 * len(p) // TRAIL for p in trails]], np.uint8)
        if not trails:
            return canvas
        colours = cv2.applyColorMap(levels, cv2.COLORMAP_TURBO)[0].tolist()
        for places, colour in zip(trails, colours, strict=True):
            fixed = np.rint(places * 16).astype(np.int32)[:, None]
            cv2.polylines(canvas, [fixed], False, colour, 1, cv2.LINE_AA, shift=4)
            cv2.circle(canvas, fixed[-1, 0].tolist(), 32, colour, -1, cv2.LINE_AA, shift=4)
        return canvas


def _accuracies(errors: np.ndarray) -> dict[str, np.ndarray]:
    return {"track_accuracy": errors <= NEAR, "track_accuracy_1px": errors <= CLOSE}


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if values.size else None


def survival_figure(curves: Mapping[str, list[float | None]]) -> Figure:
    """Survival curves of tracks by method."""
    figure = Figure(figsize=(7, 4))
    axes = figure.subplots()
    for method, curve in curves.items():
        shares = np.array(curve, float)
        axes.plot(np.arange(1, len(shares) + 1), shares, ".-", label=method)
    axes.set(xlabel="observations", ylabel="share of tracks that reach them", ylim=(0, 1.02))
    axes.grid(alpha=0.3)
    axes.legend()
    return figure
