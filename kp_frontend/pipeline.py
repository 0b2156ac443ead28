"""StereoPipeline: from a pair of images to keypoints, descriptors, matches and disparity.

One module of fixed shapes, which a backend compiles for its device.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kp_frontend.config import FrontendConfig
from kp_frontend.detection import detect
from kp_frontend.matching import match_stereo, match_temporal, refine_disparity
from kp_frontend.network import STRIDE, KeypointNetwork
from kp_frontend.rectification import rectify


class PipelineResults(NamedTuple):
    """What the pipeline gives out for a pair, K rows for each image, as numpy arrays.

    Valid keypoints come first and have a score above 0; `right_row` and `before_row` are -1 where
    there is no match. See `StereoPipeline.forward` for the shapes. `places` are the rectified
    positions; of rectified images those are `xy` itself.
    """

    xy: np.ndarray
    scores: np.ndarray
    descriptors: np.ndarray
    right_row: np.ndarray
    similarity: np.ndarray
    disparity: np.ndarray
    sigma: np.ndarray
    before_row: np.ndarray
    places: np.ndarray

    @classmethod
    def of(cls, outputs: Sequence[np.ndarray]) -> PipelineResults:
        """Name the outputs of a backend; without a ninth one the images were rectified."""
        return cls._make(outputs if len(outputs) == 9 else (*outputs, outputs[0]))


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
        for module in ("pipeline", "network", "sampling", "detection", "rectification", "matching"):
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
        places, steps = xy, None
        if maps is not None:
            xy, scores, descriptors, places, steps = self._rectified(xy, scores, descriptors, maps)
        valid = scores > settings[0]
        scores = scores * valid
        right_row, similarity = match_stereo(
            places, valid, descriptors, settings[1:6], self.with_margin
        )
        disparity, sigma, correlation = self._refined(grey, xy, places, steps, right_row)
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
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Disparity, its standard deviation and the windows' correlation of each left row."""
        right = right_row.clamp(min=0)
        pair = grey[0, 0], grey[1, 0], xy[0], xy[1][right]
        if steps is None:
            return refine_disparity(*pair)
        coarse = places[0, :, 0] - places[1][right][:, 0]
        return refine_disparity(*pair, (steps[0], steps[1][right]), coarse)


def _rows(array: Tensor, order: Tensor) -> Tensor:
    """Rows (B, K, ...) of an array in another order (B, K)."""
    flat = array.flatten(2)
    index = order[..., None].expand(-1, -1, flat.shape[2])
    return flat.gather(1, index).reshape(array.shape)
