"""StereoPipeline: from a pair of images to keypoints, descriptors, matches and disparity.

One module of fixed shapes, which a backend compiles for its device.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kp_frontend.config import FrontendConfig
from kp_frontend.detection import heatmap, keypoints
from kp_frontend.matching import match_stereo
from kp_frontend.network import STRIDE, KeypointNetwork
from kp_frontend.recovery import (
    RIGHT_CORRELATION,
    Found,
    Known,
    find_known,
    inside_border,
    merge,
)
from kp_frontend.rectification import rectify
from kp_frontend.refinement import Refined, refine_disparity
from kp_frontend.registration import stored_windows
from kp_frontend.uncertainty import (
    Uncertainty,
    centred_rows,
    match_measurements,
    neighbour_agreement,
    point_measurements,
)

# What the results depend on.
MODULES = (
    "pipeline", "network", "sampling", "detection", "rectification", "matching", "registration",
    "recovery", "refinement", "uncertainty",
)  # fmt: skip
Describe = Callable[[int, Tensor], Tensor]  # number of an image, pixels (N, 2) -> (N, D)


class TrackResults(NamedTuple):
    """What the pipeline gives of the left keypoints for their tracks, as numpy arrays."""

    known_row: np.ndarray  # (K,) the row of `Known` that the keypoint is, or -1
    stored: np.ndarray  # (K, PATCH_SIDE, PATCH_SIDE) windows by which to find it again
    scale: np.ndarray  # (K,) how large that window is in this image
    expected: np.ndarray  # (R, 2) pixels, where each known point was expected


class PipelineResults(NamedTuple):
    """What the pipeline gives out for a pair, K rows for each image, as numpy arrays.

    Valid keypoints come first and have a score above 0. `places` are the rectified positions; of
    rectified images those are `xy` itself.
    """

    xy: np.ndarray  # (2, K, 2) pixels
    scores: np.ndarray  # (2, K)
    descriptors: np.ndarray  # (2, K, D)
    point_sigma: np.ndarray  # (2, K) standard deviation of xy along an axis, pixels
    right_row: np.ndarray  # (K,) of each left row, -1 where there is no match
    similarity: np.ndarray  # (K,)
    disparity: np.ndarray  # (K,) pixels
    sigma: np.ndarray  # (K,) its standard deviation, pixels
    confidence: np.ndarray  # (K,) 0..1
    places: np.ndarray  # (2, K, 2) pixels
    tracks: TrackResults | None

    @classmethod
    def of(cls, outputs: Sequence[np.ndarray], raw: bool, tracked: bool) -> PipelineResults:
        """Name the outputs of a backend."""
        found = list(outputs)
        tracks = TrackResults(*found[-4:]) if tracked else None
        places = found[9] if raw else found[0]
        return cls._make((*found[:9], places, tracks))


class StereoPipeline(nn.Module):
    """The front end as one graph of fixed shapes: what a backend compiles.

    Without `max_motion` in the config points are not tracked, and nothing of it is computed.
    `uncertainty` is the calibration of the network; None stands for a new one, which knows nothing.
    """

    def __init__(
        self,
        network: KeypointNetwork,
        config: FrontendConfig,
        height: int,
        width: int,
        raw: bool = False,
        uncertainty: Uncertainty | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.uncertainty = uncertainty or Uncertainty()
        self.raw = raw
        self.size = (height, width)
        self.pad = (0, -width % STRIDE, 0, -height % STRIDE)  # right and below: positions stay
        self.count, self.radius, self.border = (
            config.max_keypoints,
            config.nms_radius,
            config.border,
        )
        self.with_margin = config.min_margin > 0
        self.tracked = config.max_motion > 0

    def fingerprint(self) -> str:
        """Digest of all that the results depend on but the inputs: weights, shapes and code."""
        digest = hashlib.sha256(
            repr(
                (
                    self.size,
                    self.count,
                    self.radius,
                    self.border,
                    self.with_margin,
                    self.raw,
                    self.tracked,
                )
            ).encode()
        )
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
        for module in MODULES:
            digest.update((Path(__file__).parent / f"{module}.py").read_bytes())
        return digest.hexdigest()

    def features(self, grey: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Keypoints of grey images (B, 1, H, W), as `detect` returns them, with their unit
        descriptors (B, K, D); padding is done here."""
        return self._detected(grey)[:3]

    def _detected(self, grey: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Describe]:
        """The same, the heat (B, H, W), and what describes other pixels of an image by number."""
        logits, features = self.network(F.pad(grey, self.pad, mode="replicate"))
        heat = heatmap(logits)
        xy, scores = keypoints(heat, self.size, self.count, self.radius, self.border)

        def describe(side: int, xy: Tensor) -> Tensor:
            coarse, fine = features
            of_side = coarse[side : side + 1], fine[side : side + 1]
            return self.network.describe(of_side, xy[None])[0]

        return xy, scores, self.network.describe(features, xy), heat, describe

    def forward(self, images: Tensor, settings: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        """Run on one pair.

        Args:
            images: (2, H, W) uint8, left and right.
            settings: (11,) float32, see `StereoFrontend._settings`.
            others: where points are tracked, the three tensors of `Known`; of raw images, last,
                the maps of `RawStereoCalibration` (2, 2, h, w).

        Returns:
            The tensors of `PipelineResults`, without `places` where the images are rectified, and
            without those of tracks where points are not tracked.
        """
        grey = images.float()[:, None]
        maps = others[-1] if self.raw else None
        xy, scores, descriptors, heat, describe = self._detected(grey)
        places, steps = xy, None
        if maps is not None:
            xy, scores, descriptors, places, steps = self._rectified(xy, scores, descriptors, maps)
        scores = scores * (scores > settings[0])
        tracks: tuple[Tensor, ...] = ()
        if self.tracked:
            known = Known(*others[:3])
            detections = (xy, scores, descriptors)
            xy, scores, descriptors, tracks = self._continued(
                grey, known, detections, heat, describe, settings, maps
            )
            places = xy
            if maps is not None:
                places, steps, _ = rectify(xy, maps)
        right_row, similarity = match_stereo(
            places, scores > 0, descriptors, settings[1:6], self.with_margin
        )
        refined = self._refined(grey, xy, places, steps, right_row)
        confidence, sigma = self._judged(refined, places, scores, right_row, similarity)
        trusted = (refined.correlation >= settings[8]) & (confidence >= settings[10])
        right_row = torch.where(trusted, right_row, -1)
        # Indices leave as int32: 64 bits would make some engines convert them.
        matches = (right_row.int(), similarity, refined.disparity, sigma, confidence)
        results = (xy, scores, descriptors, self._point_sigma(heat, xy, scores), *matches)
        return (*results, *(() if maps is None else (places,)), *tracks)

    def _continued(
        self,
        grey: Tensor,
        known: Known,
        detections: tuple[Tensor, Tensor, Tensor],
        heat: Tensor,
        describe: Describe,
        settings: Tensor,
        maps: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...]]:
        """Detections of both images and the known points that are found again.

        Returns:
            Positions (2, K, 2), scores (2, K), descriptors (2, K, D), and of tracks what
            `PipelineResults` has.
        """
        xy, scores, descriptors = detections
        left, right = ((xy[i], scores[i], descriptors[i]) for i in range(2))
        found = find_known(
            grey[0, 0],
            lambda places: describe(0, places),
            (left[0], left[1] > 0, left[2]),
            known,
            settings[6:8],
            self.border,
        )
        if maps is not None:
            found = found._replace(here=found.here & rectify(found.xy[None], maps[:1])[2][0])
        *new_left, row = merge(found, heat[0], left, settings[9])
        known_row = row.clamp(min=0)
        kept = (row >= 0) & found.kept[known_row]
        stored = torch.where(
            kept[:, None, None], known.stored[known_row], stored_windows(grey[0, 0], new_left[0])
        )
        scale = torch.where(kept, found.scale[known_row], 1.0)
        seen_right = self._right_again(grey, new_left[0], row, known, describe, maps)
        *new_right, _ = merge(seen_right, heat[1], right, torch.ones_like(settings[9]))
        merged = [torch.stack(pair) for pair in zip(new_left, new_right, strict=True)]
        return merged[0], merged[1], merged[2], (row.int(), stored, scale, found.expected)

    def _right_again(
        self,
        grey: Tensor,
        left_xy: Tensor,
        row: Tensor,
        known: Known,
        describe: Describe,
        maps: Tensor | None,
    ) -> Found:
        """Known points in the right image: registered from where they are expected.

        Args:
            row: (K,) the known row of each left keypoint or -1.
        """
        rows = known.rows[row.clamp(min=0)]
        guess = left_xy + rows[:, 4:6]
        steps: tuple[Tensor, Tensor] | tuple[None, None] = (None, None)
        if maps is not None:
            steps_left = rectify(left_xy[None], maps[:1])[1][0]
            steps = (steps_left, rectify(guess[None], maps[1:])[1][0])
        zero = torch.zeros_like(guess[:, 0])
        refined = refine_disparity(grey[0, 0], grey[1, 0], left_xy, guess, steps, zero)
        moved = refined.shift
        if steps[1] is not None:
            moved = (steps[1] @ moved[..., None])[..., 0]
        xy = guess + moved
        here = (row >= 0) & (rows[:, 7] > 1) & (refined.correlation >= RIGHT_CORRELATION)
        here = here & inside_border(xy, self.size, self.border)
        if maps is not None:
            here = here & rectify(xy[None], maps[1:])[2][0]
        return Found(xy, here, torch.full_like(row, -1), here, zero, describe(1, xy), xy)

    def _rectified(
        self, xy: Tensor, scores: Tensor, descriptors: Tensor, maps: Tensor
    ) -> tuple[Tensor, ...]:
        """Keypoints of raw images with their rectified places and steps, as `rectify` has them.

        What has no rectified place goes to the end and gets score 0, so that valid keypoints come
        first, in their order: several may have score 1.
        """
        places, steps, inside = rectify(xy, maps)
        rank = torch.arange(self.count, 0, -1, device=scores.device, dtype=scores.dtype)
        order = (rank * inside).topk(self.count, dim=1).indices
        scores = (scores * inside).gather(1, order)
        xy, places, descriptors, steps = (
            _rows(array, order) for array in (xy, places, descriptors, steps)
        )
        return xy, scores, descriptors, places, steps

    def _refined(
        self, grey: Tensor, xy: Tensor, places: Tensor, steps: Tensor | None, right_row: Tensor
    ) -> Refined:
        """The match of each left row after the refinement."""
        right = right_row.clamp(min=0)
        pair = grey[0, 0], grey[1, 0], xy[0], xy[1][right]
        if steps is None:
            return refine_disparity(*pair)
        coarse = places[0, :, 0] - places[1][right][:, 0]
        return refine_disparity(*pair, (steps[0], steps[1][right]), coarse)

    def _judged(
        self,
        refined: Refined,
        places: Tensor,
        scores: Tensor,
        right_row: Tensor,
        similarity: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Confidence and standard deviation of the disparity of each left row."""
        matched, right = right_row >= 0, right_row.clamp(min=0)
        own = places[1][right][:, 1] - places[0, :, 1]
        after = own + torch.where(refined.good, refined.shift[:, 1], 0.0)
        measurements = match_measurements(
            refined,
            similarity,
            centred_rows(torch.stack([own, after]), matched),
            (scores[0], scores[1][right]),
            neighbour_agreement(places[0], refined.disparity, matched, self.size),
        )
        return self.uncertainty.of_matches(measurements)

    def _point_sigma(self, heat: Tensor, xy: Tensor, scores: Tensor) -> Tensor:
        """Standard deviation of the position of each keypoint of both images."""
        measurements = [point_measurements(heat[i], xy[i], scores[i]) for i in range(2)]
        return self.uncertainty.of_points(torch.stack(measurements))


def _rows(array: Tensor, order: Tensor) -> Tensor:
    """Rows (B, K, ...) of an array in another order (B, K)."""
    flat = array.flatten(2)
    index = order[..., None].expand(-1, -1, flat.shape[2])
    return flat.gather(1, index).reshape(array.shape)
