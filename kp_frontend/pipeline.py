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
from kp_frontend.matching import match_stereo, permitted
from kp_frontend.network import STRIDE, KeypointNetwork
from kp_frontend.recovery import (
    NEAR,
    RIGHT_CORRELATION,
    RIGHT_SHARE,
    Found,
    Keypoints,
    Known,
    expected_right,
    find_known,
    first_rows,
    heat_score,
    inside_border,
    kept_windows,
    merge,
    merge_right,
)
from kp_frontend.rectification import rectify
from kp_frontend.refinement import Refined, refine_disparity
from kp_frontend.registration import stored_windows
from kp_frontend.sampling import pixel_rows
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


class ImageFeatures(NamedTuple):
    """What is found in each of B images alone.

    Keypoints `xy` (B, K, 2) in pixels with `scores` (B, K) as `detect` returns them, and unit
    `descriptors` (B, K, D); `heat` (B, H, W) of `heatmap`; and `maps`, the features of the network
    by `pixel_rows`, which describe other pixels. They are empty where points are not tracked.
    """

    xy: Tensor
    scores: Tensor
    descriptors: Tensor
    heat: Tensor
    maps: tuple[Tensor, ...]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All of them, for `of`."""
        return (*self[:4], *self.maps)

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> ImageFeatures:
        """Name the tensors."""
        xy, scores, descriptors, heat, *maps = tensors
        return cls(xy, scores, descriptors, heat, tuple(maps))


class TrackResults(NamedTuple):
    """What the pipeline gives of the left keypoints for their tracks, as numpy arrays."""

    known_row: np.ndarray  # (K,) the row of `Known` that the keypoint is, or -1
    stored: np.ndarray  # (K, PATCH_SIDE, PATCH_SIDE) windows by which to find it again
    scale: np.ndarray  # (K,) how large that window is in this image
    expected: np.ndarray  # (R, 2) pixels, where each known point was expected


class Matches(NamedTuple):
    """Stereo matches of the left keypoints, K rows.

    `right` the keypoints of the right image; `row` (K,) the right row or -1; `similarity` (K,);
    `refined`; `places` (K, 2) rectified left positions. `sought` (K,) bool, points of tracks
    without a match by descriptor, and `xy` (K, 2), the right position after the refinement.
    """

    right: Keypoints
    row: Tensor
    similarity: Tensor
    refined: Refined
    places: Tensor
    sought: Tensor
    xy: Tensor


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
        self.padded_width = width + self.pad[1]
        self.count, self.radius, self.border = (
            config.max_keypoints,
            config.nms_radius,
            config.border,
        )
        self.with_margin = config.min_margin > 0
        self.tracked = config.max_motion > 0
        self.compared: nn.Module = nn.Identity()  # descriptors as they are compared

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
        found = self.image_features(grey)
        return found.xy, found.scores, found.descriptors

    def image_features(self, grey: Tensor) -> ImageFeatures:
        """What can be computed of each grey image (B, 1, H, W) alone; padding is done here."""
        logits, (coarse, fine) = self.network(F.pad(grey, self.pad, mode="replicate"))
        heat = heatmap(logits)
        xy, scores = keypoints(heat, self.size, self.count, self.radius, self.border)
        maps = pixel_rows(coarse), pixel_rows(fine)
        descriptors = self.network.describe_at(maps, xy, self.padded_width)
        return ImageFeatures(xy, scores, descriptors, heat, maps if self.tracked else ())

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
        grey = images.float()
        found = self.image_features(grey[:, None]).tensors
        sides = [ImageFeatures.of([tensor[i : i + 1] for tensor in found]) for i in range(2)]
        return self.pair(list(grey), sides, settings, *others)

    def pair(
        self,
        images: Sequence[Tensor],
        sides: Sequence[ImageFeatures],
        settings: Tensor,
        *others: Tensor,
    ) -> tuple[Tensor, ...]:
        """What `forward` returns, from the images (H, W), left and right, and the features of
        each (B is 1)."""
        grey = [image.float() for image in images]
        maps = others[-1] if self.raw else None
        left, right = (self._keypoints(side, maps, settings[0], i) for i, side in enumerate(sides))
        heat = [side.heat.squeeze(0) for side in sides]

        def describe(i: int, xy: Tensor) -> Tensor:
            coarse, fine = sides[i].maps
            return self.network.describe_at((coarse, fine), xy[None], self.padded_width).squeeze(0)

        tracks: tuple[Tensor, ...] = ()
        expected, windows = None, None
        if self.tracked:
            known = Known(*others[:3])
            found = self._found(grey[0], left, known, describe, settings, maps)
            left, row = merge(found, heat[0], left, settings[9])
            windows = stored_windows(grey[0], left.xy)
            tracks = (row.int(), *kept_windows(found, known, row, windows), found.expected)
            expected = expected_right(known, row, left.xy)
        matches = self._matched(grey, left, right, expected, windows, settings, maps)
        if expected is not None:
            matches = self._matched_again(matches, left, heat[1], describe, settings, maps)
        right = matches.right
        places = torch.stack([matches.places, _rectified(right.xy, maps, 1)[0]])
        scores = torch.stack([left.scores, right.scores])
        confidence, sigma = self._judged(matches, places, scores)
        trusted = (matches.refined.correlation >= settings[8]) & (confidence >= settings[10])
        # Indices leave as int32: 64 bits would make some engines convert them.
        right_row = torch.where(trusted, matches.row, -1).int()
        xy, descriptors = (
            torch.stack([left.xy, right.xy]),
            torch.stack([left.descriptors, right.descriptors]),
        )
        results = (
            *(xy, scores, descriptors, self._point_sigma(heat, xy, scores)),
            *(right_row, matches.similarity, matches.refined.disparity, sigma, confidence),
        )
        return (*results, *(() if maps is None else (places,)), *tracks)

    def _keypoints(
        self, found: ImageFeatures, maps: Tensor | None, threshold: Tensor, i: int
    ) -> Keypoints:
        """Keypoints of image `i` of the pair, score 0 where it is not above the threshold.

        Of a raw image, those without a rectified place get score 0 too. They go to the end, so that
        valid keypoints come first, in their order: several may have score 1.
        """
        xy, scores, descriptors = (tensor.squeeze(0) for tensor in found[:3])
        inside = _rectified(xy, maps, i)[2]
        if inside is not None:
            rank = torch.arange(self.count, 0, -1, device=scores.device, dtype=scores.dtype)
            order = (rank * inside).topk(self.count).indices
            xy, scores, descriptors = xy[order], (scores * inside)[order], descriptors[order]
        return Keypoints(xy, scores * (scores > threshold), descriptors)

    def _found(
        self,
        image: Tensor,
        left: Keypoints,
        known: Known,
        describe: Describe,
        settings: Tensor,
        maps: Tensor | None,
    ) -> Found:
        """Known points in the left image."""
        limits = settings[6:8]
        found = find_known(
            *(image, lambda places: describe(0, places), left, known, limits),
            *(self.border, self.compared),
        )
        inside = _rectified(found.xy, maps, 0)[2]
        return found if inside is None else found._replace(here=found.here & inside)

    def _matched(
        self,
        grey: Sequence[Tensor],
        left: Keypoints,
        right: Keypoints,
        expected: tuple[Tensor, Tensor] | None,
        windows: Tensor | None,
        settings: Tensor,
        maps: Tensor | None,
    ) -> Matches:
        """Matches of the keypoints by descriptor, refined.

        Where there is none near the expected position, by `expected_right`, the refinement starts
        from that.
        """
        places, steps, _ = _rectified(left.xy, maps, 0)
        row, similarity = match_stereo(
            (places, _rectified(right.xy, maps, 1)[0]),
            (left.scores > 0, right.scores > 0),
            (self.compared(left.descriptors), self.compared(right.descriptors)),
            settings[1:6],
            self.with_margin,
        )
        sought, start = torch.zeros_like(row, dtype=torch.bool), right.xy[row.clamp(min=0)]
        if expected is not None:
            off = (start - expected[1]).abs().amax(1)
            sought = expected[0] & ((row < 0) | (off > NEAR))
            row = torch.where(sought, -1, row)
            start = torch.where(sought[:, None], expected[1], start)
        start_places, right_steps, _ = _rectified(start, maps, 1)
        coarse = places[:, 0] - start_places[:, 0]
        if maps is not None:
            windows = None  # they are to be what the rectified image would show
        refined = refine_disparity(
            grey[0], grey[1], left.xy, start, (steps, right_steps), coarse, windows
        )
        shift = refined.shift
        if right_steps is not None:
            shift = (right_steps @ shift[..., None])[..., 0]
        return Matches(right, row, similarity, refined, places, sought, start + shift)

    def _matched_again(
        self,
        matches: Matches,
        left: Keypoints,
        heat: Tensor,
        describe: Describe,
        settings: Tensor,
        maps: Tensor | None,
    ) -> Matches:
        """The matches, and those of known points that were sought and found."""
        xy, refined = matches.xy, matches.refined
        places, _, inside = _rectified(xy, maps, 1)
        here = matches.sought & (refined.correlation >= RIGHT_CORRELATION)
        here = here & permitted(matches.places, places, settings[1:4])
        here = here & inside_border(xy, self.size, self.border)
        if inside is not None:
            here = here & inside
        # The strongest ones; the others have no match in this pair.
        rows = first_rows(here, max(1, int(RIGHT_SHARE * self.count)))
        xy = xy[rows]
        descriptors = describe(1, xy)
        similarity = (left.descriptors[rows] * descriptors).sum(1)
        here = here[rows] & (similarity >= settings[4])
        found = Keypoints(xy, heat_score(heat, xy) * here, descriptors)
        right, row = merge_right(found, rows, matches.right, matches.row)
        similarity = torch.where(here, similarity, matches.similarity[rows])
        return matches._replace(
            right=right,
            row=row,
            similarity=matches.similarity.scatter(0, rows, similarity),
            # The right keypoint is where the refinement ended.
            refined=refined._replace(
                shift=torch.where(matches.sought[:, None], 0.0, refined.shift)
            ),
        )

    def _judged(self, matches: Matches, places: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Confidence and standard deviation of the disparity of each left row."""
        matched, right, refined = matches.row >= 0, matches.row.clamp(min=0), matches.refined
        own = places[1][right][:, 1] - places[0, :, 1]
        after = own + torch.where(refined.good, refined.shift[:, 1], 0.0)
        measurements = match_measurements(
            refined,
            matches.similarity,
            centred_rows(torch.stack([own, after]), matched),
            (scores[0], scores[1][right]),
            neighbour_agreement(places[0], refined.disparity, matched, self.size),
        )
        return self.uncertainty.of_matches(measurements)

    def _point_sigma(self, heat: Sequence[Tensor], xy: Tensor, scores: Tensor) -> Tensor:
        """Standard deviation of the position of each keypoint of both images."""
        measurements = [point_measurements(heat[i], xy[i], scores[i]) for i in range(2)]
        return self.uncertainty.of_points(torch.stack(measurements))


def _rectified(
    xy: Tensor, maps: Tensor | None, side: int
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """What `rectify` returns of pixels (K, 2) of the left (0) or right (1) raw image; of a
    rectified image, which has no maps, the pixels themselves."""
    if maps is None:
        return xy, None, None
    places, steps, inside = rectify(xy[None], maps[side : side + 1])
    return places[0], steps[0], inside[0]
