"""Uncertainty of the results: standard deviations, and the probability that a match is correct.

A small model on top of the network: linear in measurements of each match and keypoint, which
`kp uncertainty` of the training package fits to scenes with true disparity. Its coefficients lie
beside the weights, in NAME.uncertainty.safetensors. Fixed shapes, no host synchronisation.
"""

from __future__ import annotations

import logging
import math
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from kp_frontend.matching import FAR, windows
from kp_frontend.network import WEIGHTS_DIR, weights_path
from kp_frontend.refinement import LIMIT, Refined

log = logging.getLogger(__name__)

SUFFIX = ".uncertainty.safetensors"
FALLBACK = "tiny"  # whose calibration serves weights without one

# Names of the measurements, in the order of the coefficients.
MATCH_MEASUREMENTS = (
    "similarity_log", "correlation", "correlation_log", "likeness_log", "good",
    "bound_log", "spread_log", "contrast_log", "move", "row", "row_own", "score_left",
    "score_right", "support", "support_log", "relief_log",
)  # fmt: skip
POINT_MEASUREMENTS = ("width_log", "peak_log", "score_log")

SPAN = 4.0  # measurements count within so many standard deviations of their mean
SUPPORT_REACH = 2.0  # half side of the square of a match's neighbours, in mean keypoint distances
SUPPORT_TOLERANCE = 3.0  # neighbours agree if their disparities differ by no more, pixels
ROW_ROUNDS = 3  # of the robust mean of the row differences
HEAT_RADIUS = 2  # of the window of the heatmap around a keypoint, pixels
LEAST, MOST = 1e-3, 3.0  # range of estimated standard deviations, pixels


class Uncertainty(nn.Module):
    """The calibrated model of a network.

    Tensors: for matches (M measurements) `match_mean`, `match_scale` (M,), `match_weight` (2, M)
    and `match_bias` (2,) of the logit of the confidence and of the logarithm of the standard
    deviation, whose floor has the logarithm `floor_log` (); for keypoints (P measurements)
    `point_mean`, `point_scale` (P,), `point_weight` (P,), `point_bias` ().
    """

    match_mean: Tensor
    match_scale: Tensor
    match_weight: Tensor
    match_bias: Tensor
    floor_log: Tensor
    point_mean: Tensor
    point_scale: Tensor
    point_weight: Tensor
    point_bias: Tensor

    def __init__(self) -> None:
        super().__init__()
        match, point = len(MATCH_MEASUREMENTS), len(POINT_MEASUREMENTS)
        for name, shape in (
            ("match_mean", (match,)),
            ("match_scale", (match,)),
            ("match_weight", (2, match)),
            ("match_bias", (2,)),
            ("floor_log", ()),
            ("point_mean", (point,)),
            ("point_scale", (point,)),
            ("point_weight", (point,)),
            ("point_bias", ()),
        ):
            start = torch.ones if name.endswith("scale") else torch.zeros
            self.register_buffer(name, start(shape))

    def of_matches(self, measurements: Tensor) -> tuple[Tensor, Tensor]:
        """Confidence (K,) 0..1 and standard deviation of the disparity (K,), pixels, of matches.

        Args:
            measurements: (K, M) from `match_measurements`.
        """
        x = ((measurements - self.match_mean) / self.match_scale).clamp(-SPAN, SPAN)
        # No matrix product: an engine may use half precision for that and for all that leads to it.
        logit, sigma_log = (
            (x * weight).sum(1) + bias
            for weight, bias in zip(self.match_weight, self.match_bias, strict=True)
        )
        sigma = ((2 * sigma_log).exp() + (2 * self.floor_log).exp()).sqrt()
        return logit.sigmoid(), sigma

    def of_points(self, measurements: Tensor) -> Tensor:
        """Standard deviation (..., K) of the position along an axis, pixels.

        Args:
            measurements: (..., K, P) from `point_measurements`.
        """
        x = ((measurements - self.point_mean) / self.point_scale).clamp(-SPAN, SPAN)
        return ((x * self.point_weight).sum(-1) + self.point_bias).exp()


def match_measurements(
    refined: Refined,
    similarity: Tensor,
    rows_apart: Tensor,
    scores: tuple[Tensor, Tensor],
    neighbours: tuple[Tensor, Tensor],
) -> Tensor:
    """What is known of each match, (K, M), see `MATCH_MEASUREMENTS`.

    Args:
        refined: the matches after the refinement.
        similarity: (K,) cosine of the descriptors.
        rows_apart: (2, K) right minus left row, of the keypoints and after the refinement, pixels,
            without the offset that all matches share.
        scores: of the left and right keypoints, (K,) each.
        neighbours: support and relief, (K,) each, from `neighbour_agreement`.
    """
    good = refined.good.to(similarity.dtype)
    own, after = rows_apart.abs()
    support, relief = neighbours
    columns = (
        -(1.02 - similarity).log(),
        refined.correlation,
        -(1.05 - refined.correlation).log(),
        -(1.02 - refined.likeness.clamp(max=1.0)).log(),
        good,
        refined.bound.clamp(LEAST, MOST).log(),
        refined.spread.clamp(LEAST, MOST).log(),
        refined.contrast.log(),
        refined.shift.square().sum(1).sqrt().clamp(max=2 * LIMIT),
        after,
        own,
        *(score.clamp(min=1e-3).log() for score in scores),
        support,
        support.log(),
        relief.log(),
    )
    return torch.stack(columns, -1)


def centred_rows(rows_apart: Tensor, matched: Tensor) -> Tensor:
    """Row differences (2, K) without the offset that most matches share: a rig's rows may differ.

    The offset is a mean with Cauchy weights, by iteratively reweighted least squares.

    Args:
        rows_apart: (2, K) pixels, of the keypoints and after the refinement.
        matched: (K,) bool.
    """
    after = rows_apart[1]
    offset = torch.zeros_like(after[:1])
    for _ in range(ROW_ROUNDS):
        weight = matched / (1 + (2 * (after - offset)).square())
        offset = (weight * after).sum() / weight.sum().clamp(min=1e-6)
    return rows_apart - offset


def neighbour_agreement(
    xy: Tensor, disparity: Tensor, matched: Tensor, size: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """How the disparity of each match fits those around it.

    Args:
        xy: (K, 2) left positions, pixels.
        disparity: (K,) pixels.
        matched: (K,) bool; other rows are nobody's neighbours.
        size: height and width of the image.

    Returns:
        Support (K,), the share of neighbours with a like disparity, above 0 and below 1; and
        relief (K,), the mean difference of disparity to the nearer neighbours, which is large at
        depth edges, pixels.
    """
    reach = SUPPORT_REACH * math.sqrt(size[0] * size[1] / len(xy))
    x, y = torch.where(matched[:, None], xy, FAR).unbind(-1)
    apart = torch.maximum((x[:, None] - x).abs(), (y[:, None] - y).abs())
    difference = (disparity[:, None] - disparity).abs().clamp(max=SUPPORT_TOLERANCE)
    # One sum over the matrix gives a count and another sum, for memory traffic dominates.
    alike = (difference < SUPPORT_TOLERANCE).to(xy.dtype)
    near, alike = _counted(apart <= reach, alike)
    # Steps of 1/64 pixel keep the sums exact, the same on every engine.
    close, total = _counted(apart <= reach / 2, (64 * difference + 0.5).floor() / 64)
    # Each match counts itself; half a neighbour stands for what is not known of lonely ones.
    support = (alike - 0.5) / near.clamp(min=1.0)
    return support.clamp(min=1e-3), (total + 0.5) / close.clamp(min=1.0)


def _counted(chosen: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """The number of chosen elements in each row of a matrix (K, K), (K,), and the sum of their
    values, which are at most 3."""
    unit = 4.0 * chosen.shape[1]  # more than any sum of the values
    both = torch.where(chosen, unit + values, 0.0).sum(1)
    count = (both / unit).floor()
    return count, both - count * unit


def point_measurements(heat: Tensor, xy: Tensor, scores: Tensor) -> Tensor:
    """What is known of the position of each keypoint, (K, P), see `POINT_MEASUREMENTS`.

    Args:
        heat: (H, W) keypoint probability of each pixel of the image.
        xy: (K, 2) pixels.
        scores: (K,).
    """
    window = windows(heat, xy, HEAT_RADIUS, rows=HEAT_RADIUS)
    total = window.sum((1, 2)).clamp(min=1e-6)
    place = torch.arange(-HEAT_RADIUS, HEAT_RADIUS + 1, device=heat.device, dtype=heat.dtype)
    distance = place.square()[:, None] + place.square()
    width = (window * distance).sum((1, 2)) / total
    peak = window.amax((1, 2)).clamp(min=1e-3)
    return torch.stack([(width + 0.05).log(), peak.log(), scores.clamp(min=1e-3).log()], -1)


def uncertainty_path(model: str | Path) -> Path:
    """Where the calibration of a network lies, by released name or weights file."""
    return weights_path(model).with_suffix(SUFFIX)


def save_uncertainty(uncertainty: Uncertainty, path: str | Path) -> None:
    """Write the coefficients to a safetensors file, with the names of the measurements."""
    state = {k: v.detach().cpu().contiguous() for k, v in uncertainty.state_dict().items()}
    names = {"match": " ".join(MATCH_MEASUREMENTS), "point": " ".join(POINT_MEASUREMENTS)}
    Path(path).write_bytes(save(state, names))


def load_uncertainty(model: str | Path) -> Uncertainty:
    """Load the calibration of a network by released name or weights file.

    Weights without one get that of `FALLBACK`, with a warning: its standard deviations hold about,
    its confidence less so, for descriptors of another network differ in similarity.

    Raises:
        ValueError: the file is broken, or of another version of this package.
    """
    path = uncertainty_path(model)
    if not path.is_file():
        log.warning(
            "%s is missing: the calibration of %s is used. Make one with `kp uncertainty`.",
            path,
            FALLBACK,
        )
        path = WEIGHTS_DIR / f"{FALLBACK}{SUFFIX}"
    uncertainty = Uncertainty()
    expected = {name: tensor.shape for name, tensor in uncertainty.state_dict().items()}
    try:
        state = load_file(str(path))
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from error
    if expected != {name: tensor.shape for name, tensor in state.items()}:
        raise ValueError(f"{path} is no calibration of this version: run `kp uncertainty` again")
    if not all(tensor.isfinite().all() for tensor in state.values()):
        raise ValueError(f"{path} has values that are not finite: run `kp uncertainty` again")
    uncertainty.load_state_dict(state)
    return uncertainty.eval()
