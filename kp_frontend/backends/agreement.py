"""Comparison of an engine with the reference, done before the engine is used."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from kp_frontend.pipeline import PipelineResults

# Requirements. Lower precision moves weak keypoints across the top-K limit, so only the top-scoring
# half of the reference's keypoints is compared.
NEAR = 1.0  # maximum distance of a keypoint from the reference, pixels
# Minimum share of these keypoints that the engine also finds. One missing keypoint is always
# allowed: two equal peaks can swap places, and a small image has few keypoints.
LEAST_SHARE = 0.97
LEAST_MATCHES = 0.5  # minimum share of the number of matches in the reference
RIGHT_ROW = PipelineResults._fields.index("right_row")
LEAST_COSINE = 0.98  # minimum of the median cosine similarity of their descriptors


@dataclass(frozen=True)
class Agreement:
    """Result of a comparison.

    `share` of the keypoints found again within 1 px, number of `missed` keypoints, median
    `distance` in pixels, median `cosine` similarity of the descriptors.
    """

    share: float
    missed: int
    distance: float
    cosine: float

    def __str__(self) -> str:
        return (
            f"{self.share:.1%} of keypoints within {NEAR:.0f} px, median distance "
            f"{self.distance:.3f} px, descriptors' median cosine {self.cosine:.4f}"
        )

    @property
    def good(self) -> bool:
        """Whether the engine may be used."""
        enough = self.share >= LEAST_SHARE or self.missed <= 1
        return enough and self.cosine >= LEAST_COSINE


def check_inputs(example: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Inputs of the pipeline for the check: fixed images and a score threshold of 0."""
    images, settings, *before = example
    settings = settings.clone()
    settings[0] = 0.0  # the score threshold
    return (torch.from_numpy(check_images(*images.shape[1:])), settings, *before)


def check_images(height: int, width: int) -> np.ndarray:
    """A fixed pair (2, H, W) uint8 for the check: rectangles of all sizes, disparity 8 pixels."""
    rng = np.random.default_rng(0)
    wide = np.full((height, width + 8), 128.0)
    for _ in range(max(12, height * width // 600)):
        y, x = rng.integers(height), rng.integers(width + 8)
        h, w = rng.integers(3, 24, 2)
        wide[y : y + h, x : x + w] = rng.integers(20, 236)
    wide += rng.normal(0, 2, wide.shape)
    grey = wide.clip(0, 255).astype(np.uint8)
    return np.stack([grey[:, :width], grey[:, 8:]])


def reference(pipeline: nn.Module, inputs: tuple[Tensor, ...]) -> list[np.ndarray]:
    """Result of the pipeline in plain torch, on its current device."""
    device = next(pipeline.parameters()).device
    with torch.inference_mode():
        return [out.cpu().numpy() for out in pipeline(*(tensor.to(device) for tensor in inputs))]


def agreement(expected: list[np.ndarray], found: list[np.ndarray]) -> Agreement:
    """Compare keypoints and descriptors of both images in two results of the pipeline."""
    distances, cosines = [], []
    for side in range(2):
        xy, scores, descriptors = (array[side] for array in expected[:3])
        strong = np.flatnonzero(scores > 0)
        strong = strong[: (len(strong) + 1) // 2]
        others = np.flatnonzero(found[1][side] > 0)
        if not len(strong) or not len(others):
            # If neither result has keypoints, they agree.
            distances.append(np.full(max(len(strong), len(others)), np.inf))
            cosines.append(np.zeros(len(distances[-1])))
            continue
        apart = np.linalg.norm(xy[strong, None] - found[0][side][None, others], axis=-1)
        nearest = others[apart.argmin(1)]
        distances.append(apart.min(1))
        cosines.append((descriptors[strong] * found[2][side][nearest]).sum(1))
    distance, cosine = np.concatenate(distances), np.concatenate(cosines)
    if not len(distance):
        return Agreement(1.0, 0, 0.0, 1.0)
    near = distance <= NEAR
    return Agreement(
        float(near.mean()),
        int((~near).sum()),
        float(np.median(distance)),
        float(np.median(cosine[near])) if near.any() else 0.0,
    )


def require(engine: object, expected: list[np.ndarray], found: list[np.ndarray]) -> None:
    """Raise RuntimeError unless the result of an engine agrees with the reference.

    Results that are finite in the reference must be finite, and matches must not be lost.
    """
    for ours, theirs in zip(expected, found, strict=True):
        if np.isfinite(ours).all() and not np.isfinite(theirs).all():
            raise RuntimeError(f"{engine} gives values that are not finite")
    matches = [int((result[RIGHT_ROW] >= 0).sum()) for result in (expected, found)]
    if matches[1] < LEAST_MATCHES * matches[0]:
        raise RuntimeError(f"{engine} finds {matches[1]} matches, the reference {matches[0]}")
    result = agreement(expected, found)
    if not result.good:
        raise RuntimeError(f"{engine} does not agree with the reference: {result}")
