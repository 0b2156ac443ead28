"""StereoFrontend: a pair of grey images in, keypoints, descriptors, matches, depth and tracks out.

Everything between the images and the K-sized results is one module of fixed shapes,
`StereoPipeline`, which a backend compiles for its device. The node, the evaluators and the
benchmark all call `StereoFrontend`; none has a copy of any step.
"""

from __future__ import annotations

import hashlib
import math
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kp_frontend.backends import (
    BACKENDS,
    PRECISIONS,
    Backend,
    BackendOptions,
    make_backend,
)
from kp_frontend.calibration import RawStereoCalibration, StereoCalibration, identity_maps
from kp_frontend.detection import block_side, detect
from kp_frontend.matching import match_stereo, match_temporal, refine_disparity
from kp_frontend.network import STRIDE, KeypointNetwork, load_network
from kp_frontend.rectification import rectify
from kp_frontend.settings import check, fixed_settings, setting

COORDINATES = ("rectified", "raw")


class BadInput(ValueError):
    """Images, or a calibration, that cannot be processed; the next ones may be."""


@dataclass(frozen=True)
class FrontendConfig:
    """What a user may choose. Distances in pixels unless said."""

    model: str = setting("tiny", "released network by name, or a .safetensors file", fixed=True)
    backend: str = setting("auto", "what runs the network", choices=("auto", *BACKENDS), fixed=True)
    precision: str = setting(
        "auto", "of the network, where the backend has it", choices=PRECISIONS, fixed=True
    )
    device: str = setting("cpu", "of the backend torch: cpu, cuda, cuda:1", fixed=True)
    threads: int = setting(0, "of a CPU backend; 0: one per core", 0, 1024, fixed=True)
    max_keypoints: int = setting(1024, "keypoints per image", 2, 65536, fixed=True)
    score_threshold: float = setting(
        0.03, "lowest keypoint score; lower it for more points in dim scenes", 0.0, 1.0
    )
    nms_radius: int = setting(
        2, "pixels without a second keypoint; 3 or 4 spreads them, but fewer repeat", 2, 16,
        fixed=True,
    )  # fmt: skip
    border: int = setting(4, "pixels without keypoints along the edges", 0, 16384, fixed=True)
    row_tolerance: float = setting(
        2.0, "pixels by which a match's rows may differ; raise it for a poor calibration", 0.0, 1e5
    )
    min_depth: float = setting(
        0.1, "metres; nearest depth that is searched, when calibrated", 0.0, 1e9
    )
    max_depth: float = setting(
        math.inf, "metres; farthest depth that is searched, above 0", 0.0, math.inf
    )
    min_similarity: float = setting(0.5, "lowest cosine of matched descriptors", -1.0, 1.0)
    min_margin: float = setting(
        0.0,
        "by which a match must beat the second best; from or to 0 only by a restart",
        0.0,
        2.0,
    )
    min_correlation: float = setting(
        0.55,
        "lowest correlation of the images in the four quarters around a match; -1 keeps all",
        -1.0,
        1.0,
    )
    max_motion: float = setting(
        64.0, "pixels by which a track may move between pairs, along x or y; 0: no tracks", 0.0, 1e5
    )
    track_similarity: float = setting(0.7, "lowest cosine of descriptors along a track", -1.0, 1.0)
    coordinates: str = setting(
        "rectified", "of the keypoints of raw images that are given out", choices=COORDINATES
    )

    def __post_init__(self) -> None:
        check(self)
        if not self.max_depth > 0:
            raise ValueError(f"max_depth is {self.max_depth}, must be above 0")
        if self.min_depth > self.max_depth:
            raise ValueError(
                f"min_depth is {self.min_depth}, must be at most max_depth, {self.max_depth}"
            )

    def compiled(self) -> tuple:
        """What an engine is built for: a config with other values here needs another engine."""
        fixed = (getattr(self, name) for name in fixed_settings(type(self)))
        return (*fixed, self.min_margin > 0)


@dataclass(frozen=True)
class Features:
    """One image's keypoints, strongest first.

    `keypoints` (N, 2) float32 pixels, of the rectified or the raw image as the config's
    `coordinates` says, `scores` (N,) float32 in 0..1, `descriptors` (N, D) float32
    of unit length, `track_ids` (N,) uint32, 0 for none.
    """

    keypoints: np.ndarray
    scores: np.ndarray
    descriptors: np.ndarray
    track_ids: np.ndarray

    def __len__(self) -> int:
        return len(self.keypoints)


@dataclass(frozen=True)
class StereoFeatures:
    """Everything about one pair.

    Match i pairs left keypoint `left_index[i]` with right keypoint `right_index[i]` (uint32).
    `disparity` and `disparity_sigma` (M,) float32 pixels, `similarity` (M,) float32, `points`
    (M, 3) float32 metres in the left rectified optical frame, NaN without calibration.
    `row_offset` is the median of the matches' right row minus left row, rectified pixels, NaN
    without matches: what it differs from 0 the rig's calibration is off. `stage_ms` is the time
    each stage took.
    """

    width: int
    height: int
    left: Features
    right: Features
    left_index: np.ndarray
    right_index: np.ndarray
    disparity: np.ndarray
    disparity_sigma: np.ndarray
    similarity: np.ndarray
    points: np.ndarray
    row_offset: float
    calibration: StereoCalibration | None
    stage_ms: dict[str, float] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.left_index)


class StereoPipeline(nn.Module):
    """The front end as one graph of fixed shapes: what a backend compiles.

    A pipeline for rectified images takes five inputs; one for raw images a sixth, the maps of
    `RawStereoCalibration`, and has a ninth output.
    """

    def __init__(
        self,
        network: KeypointNetwork,
        config: FrontendConfig,
        height: int,
        width: int,
        raw: bool = False,
    ) -> None:
        super().__init__()
        self.network = network
        self.raw = raw
        self.size = (height, width)
        self.pad = (0, -width % STRIDE, 0, -height % STRIDE)  # right and below: positions stay
        self.count, self.radius, self.border = (
            config.max_keypoints,
            config.nms_radius,
            config.border,
        )
        self.with_margin = config.min_margin > 0

    def fingerprint(self) -> str:
        """Digest of all that the results depend on but the inputs: weights, shapes and code."""
        digest = hashlib.sha256(
            repr(
                (self.size, self.count, self.radius, self.border, self.with_margin, self.raw)
            ).encode()
        )
        for name, tensor in sorted(self.network.state_dict().items()):
            digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
        for module in ("frontend", "network", "sampling", "detection", "rectification", "matching"):
            digest.update((Path(__file__).parent / f"{module}.py").read_bytes())
        return digest.hexdigest()

    def features(self, grey: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Keypoints of grey images (B, 1, H, W), as `detect` returns them, with their unit
        descriptors (B, K, D); padding is done here."""
        logits, features = self.network(F.pad(grey, self.pad, mode="replicate"))
        xy, scores = detect(logits, self.size, self.count, self.radius, self.border)
        return xy, scores, self.network.describe(features, xy)

    def forward(
        self,
        images: Tensor,
        settings: Tensor,
        before_xy: Tensor,
        before_scores: Tensor,
        before_descriptors: Tensor,
        maps: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Run on one pair.

        Args:
            images: (2, H, W) uint8, left and right.
            settings: (9,) float32, see `StereoFrontend._settings`.
            before_xy, before_scores, before_descriptors: (K, 2), (K,), (K, D), the previous left
                image's results, scores 0 where there was none.
            maps: (2, 2, h, w) of raw images.

        Returns:
            xy (2, K, 2), scores (2, K), descriptors (2, K, D), right row of each left row or -1
            (K,), similarity (K,), disparity (K,), its standard deviation (K,), previous row of
            each left row or -1 (K,); of raw images also xy rectified (2, K, 2).
        """
        grey = images.float()[:, None]
        xy, scores, descriptors = self.features(grey)
        if maps is not None:
            places, steps, inside = rectify(xy, maps)
            # What has no rectified place goes to the end, so that real keypoints come first, in
            # their order: several may have score 1.
            rank = torch.arange(self.count, 0, -1, device=scores.device, dtype=scores.dtype)
            order = (rank * inside).topk(self.count, dim=1).indices
            scores = (scores * inside).gather(1, order)
            xy, places, descriptors, steps = (
                _rows(array, order) for array in (xy, places, descriptors, steps)
            )
        valid = scores > settings[0]
        scores = scores * valid
        matched = xy if maps is None else places
        right_row, similarity = match_stereo(
            matched, valid, descriptors, settings[1:6], self.with_margin
        )
        right_of_left = right_row.clamp(min=0)
        if maps is None:
            disparity, sigma, correlation = refine_disparity(
                grey[0, 0], grey[1, 0], xy[0], xy[1][right_of_left]
            )
        else:
            disparity, sigma, correlation = refine_disparity(
                grey[0, 0],
                grey[1, 0],
                xy[0],
                xy[1][right_of_left],
                (steps[0], steps[1][right_of_left]),
                places[0, :, 0] - places[1][right_of_left][:, 0],
            )
        right_row = torch.where(correlation >= settings[8], right_row, -1)
        before_row = match_temporal(
            xy[0],
            valid[0],
            descriptors[0],
            before_xy,
            before_scores > 0,
            before_descriptors,
            settings[6:8],
        )
        results = (xy, scores, descriptors, right_row, similarity, disparity, sigma, before_row)
        return results if maps is None else (*results, places)


def _rows(array: Tensor, order: Tensor) -> Tensor:
    """Rows (B, K, ...) of an array in another order (B, K)."""
    flat = array.flatten(2)
    index = order[..., None].expand(-1, -1, flat.shape[2])
    return flat.gather(1, index).reshape(array.shape)


class StereoFrontend:
    """The product's heart: call it with a pair of images.

    The first call for an image size compiles the pipeline for it; `warm_up` does so ahead of time.

    Raises:
        ValueError: no such model or backend, or weights that cannot be used.
    """

    def __init__(self, config: FrontendConfig | None = None) -> None:
        self.config = config or FrontendConfig()
        self.network = load_network(self.config.model)
        self._backend: Backend | None = None
        self._built_for: tuple[int, int, bool] | None = None
        self._left_out: frozenset[str] = frozenset()  # backends that failed
        self._next_track = 1
        self.reset()

    @property
    def backend(self) -> str:
        """Name and precision of the backend in use, once it is known."""
        return f"{self._backend.name} {self._backend.precision}" if self._backend else "none yet"

    def reset(self) -> None:
        """Forget the previous pair: every keypoint of the next one starts a new track."""
        self._before = self._nothing_before()
        self._before_tracks = np.zeros(self.config.max_keypoints, np.uint32)

    def _nothing_before(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The results of a previous pair that had no keypoints."""
        count, dim = self.config.max_keypoints, self.network.config.descriptor_dim
        return (
            np.zeros((count, 2), np.float32),
            np.zeros(count, np.float32),
            np.zeros((count, dim), np.float32),
        )

    def warm_up(self, height: int, width: int, raw: bool = False) -> None:
        """Compile for an image size, rectified or raw, and run once."""
        blank = np.zeros((height, width), np.uint8)
        maps = identity_maps(width, height)
        size = {"maps": maps, "width": width, "height": height}
        self(blank, blank, RawStereoCalibration(1, 1, 0, 0, 1, **size) if raw else None)
        self.reset()

    def configure(self, config: FrontendConfig) -> None:
        """Take other settings from the next pair on.

        Raises:
            ValueError: a setting that the engine is built for differs.
        """
        if config.compiled() != self.config.compiled():
            raise ValueError("settings that the engine is built for cannot change")
        self.config = config

    def drop_engine(self, next_best: bool = False) -> None:
        """Build the engine anew for the next pair.

        With `next_best` of the best backend that has not failed yet; `torch`, the last, which
        runs anywhere, is never given up.
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

        Raises:
            BadInput: images of another type or shape, different, too small for
                `max_keypoints` and `border`, or of another size than a raw calibration's.
        """
        begin = time.perf_counter()
        self._check_images(left, right)
        if not isinstance(calibration, StereoCalibration | None):
            raise BadInput(f"calibration must be a StereoCalibration, not {calibration!r}")
        height, width = left.shape
        maps = ()
        if isinstance(calibration, RawStereoCalibration):
            if (calibration.width, calibration.height) != (width, height):
                raise BadInput(
                    f"the calibration is for {calibration.width}x{calibration.height} images, "
                    f"not {width}x{height}"
                )
            maps = (calibration.maps,)
        backend = self._backend_for(height, width, bool(maps))
        settings = self._settings(width, calibration)
        images = np.stack([left, right], out=backend.images)  # the only copy of them on the CPU
        prepared = time.perf_counter()
        outputs = backend(images, settings, *self._before, *maps)
        computed = time.perf_counter()
        xy, scores, descriptors, right_row, similarity, disparity, sigma, before_row = outputs[:8]
        places = outputs[8] if maps else xy  # rectified

        tracks = self._tracks(scores[0], before_row)
        # Copies: what the caller does to the results must not reach the next pair's tracks.
        self._before = (xy[0].copy(), scores[0].copy(), descriptors[0].copy())
        self._before_tracks = tracks.copy()
        left_index = np.flatnonzero(right_row >= 0)
        right_index = right_row[left_index]
        right_tracks = np.zeros_like(tracks)
        right_tracks[right_index] = tracks[left_index]
        if calibration is None:
            points = np.full((len(left_index), 3), np.nan, np.float32)
        else:
            points = calibration.points(places[0][left_index], disparity[left_index])
        rows_apart = places[1][right_index, 1] - places[0][left_index, 1]
        given = xy if self.config.coordinates == "raw" else places
        found = []
        for i, ids in enumerate((tracks, right_tracks)):
            n = int(np.count_nonzero(scores[i]))  # valid rows come first
            found.append(Features(given[i][:n], scores[i][:n], descriptors[i][:n], ids[:n]))
        end = time.perf_counter()
        return StereoFeatures(
            width,
            height,
            *found,
            left_index.astype(np.uint32),
            right_index.astype(np.uint32),
            disparity[left_index],
            sigma[left_index],
            similarity[left_index],
            points,
            float(np.median(rows_apart)) if len(rows_apart) else math.nan,
            calibration,
            {
                "prepare": 1e3 * (prepared - begin),
                "compute": 1e3 * (computed - prepared),
                "collect": 1e3 * (end - computed),
            },
        )

    def _check_images(self, left: np.ndarray, right: np.ndarray) -> None:
        for name, image in (("left", left), ("right", right)):
            if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 2:
                what = f"{getattr(image, 'dtype', type(image).__name__)} {np.shape(image)}"
                raise BadInput(f"the {name} image must be (height, width) uint8, not {what}")
        if left.shape != right.shape:
            raise BadInput(f"left is {left.shape} and right {right.shape}: sizes must be equal")
        height, width = left.shape
        if min(height, width) < STRIDE + 2 * self.config.border:
            raise BadInput(f"a {width}x{height} image is too small for the network")
        side = block_side(self.config.nms_radius)
        padded = (math.ceil(length / STRIDE) * STRIDE for length in (height, width))
        blocks = math.prod(math.ceil(length / side) for length in padded)
        if self.config.max_keypoints > blocks:
            raise BadInput(
                f"max_keypoints {self.config.max_keypoints} is more than a {width}x{height} image "
                f"can have ({blocks})"
            )

    def blank_inputs(self, width: int) -> tuple[np.ndarray, ...]:
        """The pipeline's inputs beside the images, without calibration and previous pair."""
        return (self._settings(width, None), *self._nothing_before())

    def _backend_for(self, height: int, width: int, raw: bool) -> Backend:
        if self._backend is None or self._built_for != (height, width, raw):
            pipeline = StereoPipeline(self.network, self.config, height, width, raw).eval()
            self.reset()
            blank = np.zeros((2, height, width), np.uint8)
            maps = (identity_maps(width, height),) if raw else ()
            arrays = (blank, *self.blank_inputs(width), *maps)
            tensors = tuple(torch.from_numpy(array) for array in arrays)
            c = self.config
            # A named backend that failed is replaced by the best of the others.
            name, precision = ("auto", "auto") if self._left_out else (c.backend, c.precision)
            options = BackendOptions(c.threads, precision, c.device)
            self._backend = make_backend(name, pipeline, tensors, options, self._left_out)
            self._built_for = (height, width, raw)
        return self._backend

    def _settings(self, width: int, calibration: StereoCalibration | None) -> np.ndarray:
        """The pipeline's numbers that may change between pairs without compiling again."""
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
            ],
            np.float32,
        )

    def _tracks(self, scores: np.ndarray, before_row: np.ndarray) -> np.ndarray:
        """Track ids of the left rows: the previous row's, or new ones; 0 without tracking."""
        tracks = np.zeros(len(scores), np.uint32)
        if not self.config.max_motion:
            return tracks
        known = before_row >= 0
        tracks[known] = self._before_tracks[before_row[known]]
        new = np.flatnonzero(~known & (scores > 0))
        most = 2**32 - 1  # then ids start again from 1; 0 stays free
        ids = self._next_track - 1 + np.arange(len(new), dtype=np.uint64)
        tracks[new] = ids % most + 1
        self._next_track = (self._next_track - 1 + len(new)) % most + 1
        return tracks
