"""StereoFrontend: computes keypoints, descriptors, matches, depth and tracks of an image pair.

The node, the evaluations and the benchmark all call `StereoFrontend`. None of them has a copy of a
step. The steps from the images to the results are one graph, `StereoPipeline`, which a backend
compiles for its device.
"""

from __future__ import annotations

import math
import time

import numpy as np
import torch

from kp_frontend.backends import BACKENDS, Backend, BackendOptions, make_backend
from kp_frontend.calibration import RawStereoCalibration, StereoCalibration, identity_maps
from kp_frontend.config import FrontendConfig
from kp_frontend.detection import block_side
from kp_frontend.features import Features, StereoFeatures
from kp_frontend.network import STRIDE, load_for_inference
from kp_frontend.pipeline import PipelineResults, StereoPipeline
from kp_frontend.quantization import require_ranges
from kp_frontend.tracking import Tracker
from kp_frontend.uncertainty import Uncertainty, load_uncertainty


class BadInput(ValueError):
    """The images or the calibration are invalid. The next pair can still be processed."""


class StereoFrontend:
    """The stereo front end. Call it with a pair of images.

    The first call for an image size compiles the pipeline for this size. Call `warm_up` to do this
    in advance. Calls must not overlap: threads that process pairs at the same time need a front end
    each.

    Raises:
        ValueError: unknown model or backend, or invalid weights.
    """

    def __init__(
        self, config: FrontendConfig | None = None, uncertainty: Uncertainty | None = None
    ) -> None:
        self.config = config or FrontendConfig()
        self.network = load_for_inference(self.config.model)
        if self.config.precision == "int8":
            require_ranges(self.network, self.config.model)
        self.uncertainty = uncertainty or load_uncertainty(self.config.model)
        self._backend: Backend | None = None
        self._built_for: tuple[int, int, bool] | None = None
        self._left_out: frozenset[str] = frozenset()  # backends that failed
        self._tracker = Tracker(self.config.max_keypoints, self.network.config.descriptor_dim)
        self._raw: RawStereoCalibration | None = None  # of the pair before

    @property
    def backend(self) -> str:
        """Name and precision of the backend in use, or `none yet`."""
        return f"{self._backend.name} {self._backend.precision}" if self._backend else "none yet"

    @property
    def engine(self) -> Backend | None:
        """The engine in use, None before the first pair."""
        return self._backend

    def reset(self) -> None:
        """Forget the previous pair: every keypoint of the next one starts a new track."""
        self._tracker.reset()

    def warm_up(self, height: int, width: int, raw: bool = False) -> None:
        """Compile for an image size, rectified or raw, and run once."""
        blank = np.zeros((height, width), np.uint8)
        maps = identity_maps(width, height)
        plain = RawStereoCalibration(1, 1, 0, 0, 1, maps=maps, width=width, height=height)
        self(blank, blank, plain if raw else None)
        self.reset()

    def configure(self, config: FrontendConfig) -> None:
        """Use other settings from the next pair on.

        Raises:
            ValueError: a setting changed that the engine is built for.
        """
        if config.compiled() != self.config.compiled():
            raise ValueError("settings that the engine is built for cannot change")
        self.config = config

    def drop_engine(self, next_best: bool = False) -> None:
        """Rebuild the engine for the next pair.

        With `next_best`, use the best backend that has not failed yet. `torch`, which runs on every
        machine, is never excluded.
        """
        if next_best and self._backend is not None and self._backend.name != BACKENDS[-1]:
            self._left_out |= {self._backend.name}
        self._backend = None

    def __call__(
        self,
        left: np.ndarray,
        right: np.ndarray,
        calibration: StereoCalibration | None = None,
    ) -> StereoFeatures:
        """Process one pair.

        Args:
            left, right: (H, W) uint8 grey images of equal size.
            calibration: gives depth, and bounds the disparity searched. The images are rectified,
                or raw if it is a `RawStereoCalibration`; then only the points are rectified.
                When a raw one changes, tracks start anew.

        Raises:
            BadInput: images of another type or shape, different, too small for
                `max_keypoints` and `border`, or of another size than a raw calibration's.
        """
        begin = time.perf_counter()
        self._check_images(left, right)
        height, width = left.shape
        maps = self._maps(calibration, width, height)
        backend = self._backend_for(height, width, bool(maps))
        settings = self._settings(width, calibration)
        raw = calibration if isinstance(calibration, RawStereoCalibration) else None
        if raw != self._raw:
            self.reset()  # rectified places of known points are those of the other calibration
            self._raw = raw
        prepared = time.perf_counter()
        outputs = backend((left, right), settings, *self._known(self._tracker.known), *maps)
        computed = time.perf_counter()
        results = PipelineResults.of(outputs, bool(maps), self.config.max_motion > 0)
        found = self._collect(results, (width, height), calibration)
        end = time.perf_counter()
        found.stage_ms.update(
            prepare=1e3 * (prepared - begin),
            compute=1e3 * (computed - prepared),
            collect=1e3 * (end - computed),
        )
        return found

    def _collect(
        self,
        results: PipelineResults,
        size: tuple[int, int],
        calibration: StereoCalibration | None,
    ) -> StereoFeatures:
        """What the pipeline found, without its empty rows, with tracks and points."""
        ids, lengths = (
            np.zeros_like(results.right_row, np.uint32),
            np.zeros_like(results.right_row, np.uint16),
        )
        if results.tracks is not None:
            ids, lengths = self._tracker.update(results, results.tracks, calibration)
        left_index = np.flatnonzero(results.right_row >= 0)
        right_index = results.right_row[left_index]
        places, disparity = results.places, results.disparity[left_index]
        if calibration is None:
            points = np.full((len(left_index), 3), np.nan, np.float32)
        else:
            points = calibration.points(places[0][left_index], disparity)
        rows_apart = places[1][right_index, 1] - places[0][left_index, 1]
        tracks = [(ids, lengths), (np.zeros_like(ids), np.zeros_like(lengths))]
        for of_left, of_right in zip(*tracks, strict=True):
            of_right[right_index] = of_left[left_index]
        given = results.xy if self.config.coordinates == "raw" else places
        features = []
        for i, (track_ids, track_lengths) in enumerate(tracks):
            n = int(np.count_nonzero(results.scores[i]))  # valid rows come first
            features.append(
                Features(
                    keypoints=given[i][:n],
                    scores=results.scores[i][:n],
                    descriptors=results.descriptors[i][:n],
                    track_ids=track_ids[:n],
                    track_lengths=track_lengths[:n],
                    sigma=results.point_sigma[i][:n],
                )
            )
        return StereoFeatures(
            width=size[0],
            height=size[1],
            left=features[0],
            right=features[1],
            left_index=left_index.astype(np.uint32),
            right_index=right_index.astype(np.uint32),
            disparity=disparity,
            disparity_sigma=results.sigma[left_index],
            similarity=results.similarity[left_index],
            confidence=results.confidence[left_index],
            points=points,
            row_offset=float(np.median(rows_apart)) if len(rows_apart) else math.nan,
            calibration=calibration,
        )

    @staticmethod
    def _maps(
        calibration: StereoCalibration | None, width: int, height: int
    ) -> tuple[np.ndarray, ...]:
        """The pipeline's last input for raw images, nothing for rectified ones."""
        if not isinstance(calibration, StereoCalibration | None):
            raise BadInput(f"calibration must be a StereoCalibration, not {calibration!r}")
        if not isinstance(calibration, RawStereoCalibration):
            return ()
        if (calibration.width, calibration.height) != (width, height):
            raise BadInput(
                f"the calibration is for {calibration.width}x{calibration.height} images, "
                f"not {width}x{height}"
            )
        return (calibration.maps,)

    def _check_images(self, left: np.ndarray, right: np.ndarray) -> None:
        for name, image in (("left", left), ("right", right)):
            if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 2:
                what = f"{getattr(image, 'dtype', type(image).__name__)} {np.shape(image)}"
                raise BadInput(f"the {name} image must be (height, width) uint8, not {what}")
        if left.shape != right.shape:
            sizes = ["{1}x{0}".format(*image.shape) for image in (left, right)]
            raise BadInput(f"left is {sizes[0]} and right {sizes[1]}: sizes must be equal")
        self.require_size(*left.shape)

    def require_size(self, height: int, width: int) -> None:
        """Check that images of a size can be processed.

        Raises:
            BadInput: too small for `max_keypoints` and `border`.
        """
        if min(height, width) < STRIDE + 2 * self.config.border:
            raise BadInput(
                f"a {width}x{height} image is too small for the network with border "
                f"{self.config.border}"
            )
        side = block_side(self.config.nms_radius)
        padded = (math.ceil(length / STRIDE) * STRIDE for length in (height, width))
        blocks = math.prod(math.ceil(length / side) for length in padded)
        if self.config.max_keypoints > blocks:
            raise BadInput(
                f"max_keypoints {self.config.max_keypoints} is more than a {width}x{height} image "
                f"can have ({blocks})"
            )

    def _known(self, known: tuple[np.ndarray, ...]) -> tuple[np.ndarray, ...]:
        """The pipeline's inputs for tracking, none if there is no tracking."""
        return known if self.config.max_motion else ()

    def blank_inputs(self, width: int) -> tuple[np.ndarray, ...]:
        """The pipeline's inputs beside the images, without calibration and previous pair."""
        return (self._settings(width, None), *self._known(self._tracker.nothing_known()))

    def pipeline(
        self, height: int, width: int, raw: bool = False
    ) -> tuple[StereoPipeline, tuple[torch.Tensor, ...]]:
        """The pipeline for an image size, rectified or raw, and blank inputs for it.

        Raises:
            BadInput: see `require_size`.
        """
        self.require_size(height, width)
        pipeline = StereoPipeline(
            self.network, self.config, height, width, raw, self.uncertainty
        ).eval()
        blank = np.zeros((2, height, width), np.uint8)
        maps = (identity_maps(width, height),) if raw else ()
        arrays = (blank, *self.blank_inputs(width), *maps)
        return pipeline, tuple(torch.from_numpy(array) for array in arrays)

    def _backend_for(self, height: int, width: int, raw: bool) -> Backend:
        if self._backend is None or self._built_for != (height, width, raw):
            pipeline, tensors = self.pipeline(height, width, raw)
            self.reset()
            c = self.config
            # If the selected backend has failed, use the best of the others.
            name, precision = ("auto", "auto") if self._left_out else (c.backend, c.precision)
            options = BackendOptions(c.threads, precision, c.device, c.engine)
            self._backend = make_backend(name, pipeline, tensors, options, self._left_out)
            self._built_for = (height, width, raw)
        return self._backend

    def _settings(self, width: int, calibration: StereoCalibration | None) -> np.ndarray:
        """Settings of the pipeline that can change between pairs without a new engine."""
        c = self.config
        nearest, farthest = float(width), 0.0
        if calibration is not None:
            nearest = min(nearest, calibration.disparity(c.min_depth) if c.min_depth else nearest)
            farthest = calibration.disparity(c.max_depth)
        slack = 1.0  # keypoints are exact to about a pixel before the refinement
        return np.array(
            [
                c.score_threshold,
                c.row_tolerance,
                farthest - slack,
                nearest + slack,
                c.min_similarity,
                c.min_margin,
                c.max_motion if c.max_motion else -1.0,
                c.track_similarity,
                c.min_correlation,
                c.track_share,
                c.min_confidence,
            ],
            np.float32,
        )
