"""Metrics of the uncertainties that the front end publishes: standard deviations and confidence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import rankdata

from kp_training.evaluation.metrics import DISPARITY_TOLERANCE, SIGMA, TRUST

CONFIDENCE_BINS = 10


@dataclass(frozen=True)
class Trust:
    """Published matches with true disparity, N of them.

    `error` (N,) of the disparity and `sigma` (N,), its standard deviation, pixels; `confidence`
    (N,), NaN where it is not known; `precise`: the truth is known to fractions of a pixel.
    """

    error: np.ndarray
    sigma: np.ndarray
    confidence: np.ndarray
    precise: bool

    @property
    def right(self) -> np.ndarray:
        """Which matches are right, (N,) bool."""
        return np.abs(self.error) <= DISPARITY_TOLERANCE

    @property
    def ratios(self) -> np.ndarray:
        """Error over standard deviation of the right matches; empty without a precise truth."""
        right = self.right & self.precise
        return self.error[right] / self.sigma[right]

    def metrics(self) -> dict[str, float | None]:
        """`TRUST`, None where it is not known."""
        found = dict.fromkeys(TRUST) | sigma_metrics(self.ratios)
        if np.isfinite(self.confidence).all():
            found |= confidence_metrics(self.confidence, self.right)
        return found


def together(parts: Sequence[Trust]) -> Trust:
    """All matches of several scenes as one; precise ones alone if there are any."""
    chosen = [part for part in parts if part.precise] or list(parts)
    return Trust(
        np.concatenate([part.error for part in chosen]),
        np.concatenate([part.sigma for part in chosen]),
        np.concatenate([part.confidence for part in chosen]),
        chosen[0].precise,
    )


def sigma_metrics(ratios: np.ndarray) -> dict[str, float | None]:
    """How well standard deviations fit errors.

    Args:
        ratios: (N,) error over standard deviation.

    Returns:
        `sigma_ratio`, the median of the absolute ratio (a unit normal has .674), and
        `sigma_within_2`, the share within two sigma (.954). None of nothing.
    """
    if not len(ratios):
        return dict.fromkeys(SIGMA)
    size = np.abs(ratios)
    return {"sigma_ratio": float(np.median(size)), "sigma_within_2": float((size <= 2).mean())}


def confidence_metrics(confidence: np.ndarray, right: np.ndarray) -> dict[str, float | None]:
    """How well confidence tells right matches from wrong ones.

    Args:
        confidence: (N,) 0..1.
        right: (N,) bool.

    Returns:
        `confidence_auc`, the area under the ROC curve (None without both kinds), and
        `confidence_error`, the expected calibration error: the mean difference of confidence and
        share of right matches in ten bins, weighted by their matches (None of nothing).
    """
    count = len(right)
    rows = reliability(confidence, right)
    error = float((rows[:, 0] * np.abs(rows[:, 1] - rows[:, 2])).sum() / count) if count else None
    return {"confidence_auc": auc(confidence, right), "confidence_error": error}


def auc(values: np.ndarray, right: np.ndarray) -> float | None:
    """Area under the ROC curve of values (N,) that tell right (N,) bool; None without both kinds.

    It is computed as the Mann-Whitney statistic.
    """
    count, rights = len(right), int(right.sum())
    if not 0 < rights < count:
        return None
    ranks = rankdata(values)[right].sum() - rights * (rights + 1) / 2
    return float(ranks / (rights * (count - rights)))


def reliability(confidence: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Rows of a reliability diagram, (B, 3): matches, mean confidence and share of right ones in
    each of ten equal bins of confidence that is not empty."""
    bins = np.minimum((confidence * CONFIDENCE_BINS).astype(int), CONFIDENCE_BINS - 1)
    rows = [
        (inside.sum(), confidence[inside].mean(), right[inside].mean())
        for inside in (bins == i for i in range(CONFIDENCE_BINS))
        if inside.any()
    ]
    return np.array(rows, np.float64).reshape(-1, 3)
