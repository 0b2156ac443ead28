"""StereoFrontend: a pair of grey images in, keypoints, descriptors, matches, depth and tracks out.

Everything between the images and the K-sized results is one module of fixed shapes,
`StereoPipeline`, which a backend compiles for its device. The node, the evaluators and the
benchmark all call `StereoFrontend`; none has a copy of any step.
"""

from __future__ import annotations

import hashlib
import math
import time
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kp_frontend.backends import Backend, BackendOptions, make_backend
from kp_frontend.calibration import StereoCalibration
from kp_frontend.detection import block_side, detect
from kp_frontend.matching import match_stereo, match_temporal, refine_disparity
from kp_frontend.network import STRIDE, KeypointNetwork, load_network


@dataclass(frozen=True)
class FrontendConfig:
    """What a user may choose. Distances in pixels unless said."""

    model: str = "tiny"  # released network, or a .safetensors file
    backend: str = "auto"  # auto, or a name of kp_frontend.backends
    precision: str = "auto"  # of the network: auto, fp32, fp16 or bf16, where the backend has it
    device: str = "cpu"  # of the backend torch: cpu, cuda, cuda:1
    threads: int = 0  # of a CPU backend; 0: one per core
    max_keypoints: int = 1024  # per image
    score_threshold: float = 0.003  # lowest keypoint score, 0..1
    nms_radius: int = 3  # at least 2; 4 spreads keypoints more, but fewer of them match
    border: int = 4  # width of the frame without keypoints
    row_tolerance: float = 2.0  # a stereo match's rows may differ by this
    min_depth: float = 0.1  # metres; bounds the disparity when calibrated
    max_depth: float = math.inf  # metres
    min_similarity: float = 0.5  # cosine of matched descriptors
    min_margin: float = 0.0  # by which a match must beat the second best
    max_motion: float = 64.0  # a track may move by this between pairs, along x or y; 0: no tracks
    track_similarity: float = 0.7  # cosine of descriptors along a track

    def __post_init__(self) -> None:
        for f in fields(self):
            value, kind = getattr(self, f.name), type(f.default)
            allowed = (int, float) if kind is float else kind
            if not isinstance(value, allowed) or isinstance(value, bool):
                raise ValueError(f"{f.name} is {value!r}, must be a {kind.__name__}")
        if not self.max_depth > 0:
            raise ValueError(f"max_depth is {self.max_depth}, must be above 0")
        for name, low, high in (
            ("max_keypoints", 2, 65536),
            ("score_threshold", 0, 1),
            ("nms_radius", 2, 16),
            ("border", 0, math.inf),
            ("threads", 0, 1024),
            ("row_tolerance", 0, 1e5),
            ("min_depth", 0, self.max_depth),
            ("min_similarity", -1, 1),
            ("min_margin", 0, 2),
            ("max_motion", 0, 1e5),
            ("track_similarity", -1, 1),
        ):
            if not low <= getattr(self, name) <= high:
                raise ValueError(
                    f"{name} is {getattr(self, name)}, must be between {low} and {high}"
                )


@dataclass(frozen=True)
class Features:
    """One image's keypoints, strongest first.

    `keypoints` (N, 2) float32 pixels, `scores` (N,) float32 in 0..1, `descriptors` (N, D) float32
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
    (M, 3) float32 metres in the left rectified optical frame, NaN without calibration. `stage_ms`
    is the time each stage took.
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
    calibration: StereoCalibration | None
    stage_ms: dict[str, float] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.left_index)


class StereoPipeline(nn.Module):
    """The front end as one graph of fixed shapes: what a backend compiles."""

    def __init__(
        self, network: KeypointNetwork, config: FrontendConfig, height: int, width: int
    ) -> None:
        super().__init__()
        self.network = network
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
            repr((self.size, self.count, self.radius, self.border, self.with_margin)).encode()
        )
        for name, tensor in sorted(self.network.state_dict().items()):
            digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
        for module in ("frontend", "network", "detection", "matching"):
            digest.update((Path(__file__).parent / f"{module}.py").read_bytes())
        return digest.hexdigest()

    def features(self, grey: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Keypoints of grey images (B, 1, H, W), as `detect` returns them; padding is done here."""
        logits, dense = self.network(F.pad(grey, self.pad, mode="replicate"))
        return detect(logits, dense, self.size, self.count, self.radius, self.border)

    def forward(
        self,
        images: Tensor,
        settings: Tensor,
        before_xy: Tensor,
        before_scores: Tensor,
        before_descriptors: Tensor,
    ) -> tuple[Tensor, ...]:
        """Run on one pair.

        Args:
            images: (2, H, W) uint8, left and right.
            settings: (8,) float32, see `StereoFrontend._settings`.
            before_xy, before_scores, before_descriptors: (K, 2), (K,), (K, D), the previous left
                image's results, scores 0 where there was none.

        Returns:
            xy (2, K, 2), scores (2, K), descriptors (2, K, D), right row of each left row or -1
            (K,), similarity (K,), disparity (K,), its standard deviation (K,), previous row of
            each left row or -1 (K,).
        """
        grey = images.float()[:, None]
        xy, scores, descriptors = self.features(grey)
        valid = scores > settings[0]
        scores = scores * valid
        right_row, similarity = match_stereo(
            xy, valid, descriptors, settings[1:6], self.with_margin
        )
        disparity, sigma = refine_disparity(
            grey[0, 0], grey[1, 0], xy[0], xy[1][right_row.clamp(min=0)]
        )
        before_row = match_temporal(
            xy[0],
            valid[0],
            descriptors[0],
            before_xy,
            before_scores > 0,
            before_descriptors,
            settings[6:8],
        )
        return xy, scores, descriptors, right_row, similarity, disparity, sigma, before_row


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
        self._size: tuple[int, int] | None = None
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

    def warm_up(self, height: int, width: int) -> None:
        """Compile for an image size and run once."""
        blank = np.zeros((height, width), np.uint8)
        self(blank, blank)
        self.reset()

    def __call__(
        self,
        left: np.ndarray,
        right: np.ndarray,
        calibration: StereoCalibration | None = None,
    ) -> StereoFeatures:
        """Process one rectified pair.

        Args:
            left, right: (H, W) uint8 grey images of equal size.
            calibration: gives depth, and bounds the disparity searched.

        Raises:
            ValueError: images of another type or shape, different, or too small for
                `max_keypoints` and `border`.
        """
        begin = time.perf_counter()
        images = self._images(left, right)
        if not isinstance(calibration, StereoCalibration | None):
            raise ValueError(f"calibration must be a StereoCalibration, not {calibration!r}")
        height, width = images.shape[1:]
        backend = self._backend_for(height, width)
        settings = self._settings(width, calibration)
        prepared = time.perf_counter()
        outputs = backend(images, settings, *self._before)
        computed = time.perf_counter()
        xy, scores, descriptors, right_row, similarity, disparity, sigma, before_row = outputs

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
            points = calibration.points(xy[0][left_index], disparity[left_index])
        found = []
        for i, ids in enumerate((tracks, right_tracks)):
            n = int(np.count_nonzero(scores[i]))  # valid rows come first
            found.append(Features(xy[i][:n], scores[i][:n], descriptors[i][:n], ids[:n]))
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
            calibration,
            {
                "prepare": 1e3 * (prepared - begin),
                "compute": 1e3 * (computed - prepared),
                "collect": 1e3 * (end - computed),
            },
        )

    def _images(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        for name, image in (("left", left), ("right", right)):
            if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 2:
                what = f"{getattr(image, 'dtype', type(image).__name__)} {np.shape(image)}"
                raise ValueError(f"the {name} image must be (height, width) uint8, not {what}")
        if left.shape != right.shape:
            raise ValueError(f"left is {left.shape} and right {right.shape}: sizes must be equal")
        height, width = left.shape
        if min(height, width) < STRIDE + 2 * self.config.border:
            raise ValueError(f"a {width}x{height} image is too small for the network")
        in_cell = (STRIDE // block_side(self.config.nms_radius)) ** 2
        blocks = math.ceil(height / STRIDE) * math.ceil(width / STRIDE) * in_cell
        if self.config.max_keypoints > blocks:
            raise ValueError(
                f"max_keypoints {self.config.max_keypoints} is more than a {width}x{height} image "
                f"can have ({blocks})"
            )
        return np.stack([left, right])

    def blank_inputs(self, width: int) -> tuple[np.ndarray, ...]:
        """The pipeline's inputs beside the images, without calibration and previous pair."""
        return (self._settings(width, None), *self._nothing_before())

    def _backend_for(self, height: int, width: int) -> Backend:
        if self._backend is None or self._size != (height, width):
            pipeline = StereoPipeline(self.network, self.config, height, width).eval()
            self.reset()
            blank = np.zeros((2, height, width), np.uint8)
            tensors = tuple(torch.from_numpy(a) for a in (blank, *self.blank_inputs(width)))
            c = self.config
            options = BackendOptions(c.threads, c.precision, c.device)
            self._backend = make_backend(self.config.backend, pipeline, tensors, options)
            self._size = (height, width)
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
