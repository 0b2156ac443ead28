"""`kp uncertainty`: fit what the front end says about its own errors to scenes with true disparity.

The front end runs on each scene without limits on the confidence. Three small models are fitted to
what `Uncertainty` measures: the probability that a match is right (logistic regression), the
standard deviation of its disparity, and that of a keypoint's position (both with the likelihood of
Student's t distribution, because a few errors are far larger than the others). Scenes count alike,
however many matches they have. Positions are fitted to made views of images as well: there the
truth is exact, and the two keypoints do not err together as those of a stereo pair do.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import torch
from rich.progress import track
from scipy import stats
from torch import Tensor

from kp_frontend.config import FrontendConfig
from kp_frontend.uncertainty import SPAN, Uncertainty
from kp_training.evaluation.trust import Trust, sigma_metrics
from kp_training.uncertainty_samples import PointPairs, Sample

SHRINKAGE = 1e-3  # of the coefficients, on the scale of the mean loss of a match
FREEDOM = 6.0  # degrees of freedom of Student's t distribution
# Third quartile of a normal distribution over that of Student's t.
SHARPNESS = float(stats.norm.ppf(0.75) / stats.t.ppf(0.75, FREEDOM))


def fit(samples: Sequence[Sample], made: Sequence[PointPairs] = ()) -> Uncertainty:
    """Fit a calibration.

    Standard deviations of the disparity are fitted to the right matches that are published by
    default, of scenes whose truth is known to fractions of a pixel; where there is none, of all.
    Those of the positions are fitted to the right matches of all scenes and to `made`.
    """
    result = Uncertainty()
    weights = _weights(samples, [len(s.error) for s in samples])
    matches = torch.cat([s.matches for s in samples])
    result.match_mean, result.match_scale = _moments(matches)
    x = _standard(matches, result.match_mean, result.match_scale)
    right = torch.cat([s.right for s in samples]).to(x.dtype)

    def confidence_loss(c: Tensor) -> Tensor:
        logit = x @ c[:-1] + c[-1]
        losses = torch.nn.functional.binary_cross_entropy_with_logits(
            logit, right, reduction="none"
        )
        return (weights * losses).sum() + SHRINKAGE / 2 * c[:-1].square().sum()

    confidence = _minimum(confidence_loss, torch.zeros(x.shape[1] + 1))
    result.match_weight[0], result.match_bias[0] = confidence[:-1], confidence[-1]
    _fit_sigma(result, samples)
    _fit_points(result, samples, made)
    return result


def _fit_sigma(result: Uncertainty, samples: Sequence[Sample]) -> None:
    chosen = [s for s in samples if s.precise] or list(samples)
    lowest = FrontendConfig().min_confidence
    used = [s.right & (result.of_matches(s.matches)[0] >= lowest) for s in chosen]
    x = torch.cat([s.matches[u] for s, u in zip(chosen, used, strict=True)])
    x = _standard(x, result.match_mean, result.match_scale)
    error = torch.cat([s.error[u] for s, u in zip(chosen, used, strict=True)])
    weights = _weights(chosen, [int(u.sum()) for u in used])

    def loss(c: Tensor) -> Tensor:
        log_sigma = torch.logaddexp(2 * (x @ c[:-2] + c[-2]), 2 * c[-1]) / 2
        return (weights * _surprise(error, log_sigma)).sum() + SHRINKAGE * c[:-2].square().sum()

    start = torch.zeros(x.shape[1] + 2)
    start[-2:] = torch.tensor([-1.5, -3.0])
    found = _minimum(loss, start)
    result.match_weight[1], result.match_bias[1] = found[:-2], found[-2]
    result.floor_log = found[-1]


def _fit_points(result: Uncertainty, samples: Sequence[Sample], made: Sequence[PointPairs]) -> None:
    pairs = [s.point_pairs for s in samples]
    weights = _weights(samples, [len(p.error) for p in pairs])
    if made:
        # Real pairs and made ones count alike.
        each = [torch.full((len(p.error),), 1 / (max(len(p.error), 1) * len(made))) for p in made]
        weights = torch.cat([weights, *each]) / 2
    points, error, scale = (torch.cat(parts) for parts in zip(*pairs, *made, strict=True))
    result.point_mean, result.point_scale = _moments(points.flatten(0, 1))
    x = _standard(points, result.point_mean, result.point_scale)
    # A position of the first view has its error in pixels of that view.
    growth = torch.stack([scale, torch.ones_like(scale)], 1).log()

    def loss(c: Tensor) -> Tensor:
        # The difference of two positions has the sum of their variances.
        log_sigma = torch.logsumexp(2 * (x @ c[:-1] + c[-1] + growth), 1) / 2
        surprise = _surprise(error, log_sigma[:, None]).mean(1)
        return (weights * surprise).sum() + SHRINKAGE * c[:-1].square().sum()

    start = torch.zeros(x.shape[2] + 1)
    start[-1] = -1.5
    found = _minimum(loss, start)
    result.point_weight, result.point_bias = found[:-1], found[-1]


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.mean(0), x.std(0).clamp(min=1e-6)


def _standard(x: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
    """As `Uncertainty` has it."""
    return ((x - mean) / scale).clamp(-SPAN, SPAN).double()


def _weights(samples: Sequence[Sample], counts: Sequence[int]) -> Tensor:
    """Weight of each match, so that all groups count alike, and in a group all its scenes."""
    groups = Counter(s.group for s in samples)
    parts = [
        torch.full((count,), 1 / (max(count, 1) * groups[s.group] * len(groups)))
        for s, count in zip(samples, counts, strict=True)
    ]
    return torch.cat(parts).double()


def _surprise(error: Tensor, log_sigma: Tensor) -> Tensor:
    """Negative logarithm of Student's t density, up to a constant, scaled so that its central part
    is that of a normal distribution with standard deviation sigma."""
    ratio = error / log_sigma.exp()
    return log_sigma + (FREEDOM + 1) / 2 * torch.log1p(ratio.square() / (FREEDOM * SHARPNESS**2))


def _minimum(loss: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
    """Coefficients with the least loss, from `start`."""
    found = start.double().requires_grad_()
    optimiser = torch.optim.LBFGS([found], max_iter=500, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        value = loss(found)
        value.backward()
        return value

    optimiser.step(closure)
    return found.detach().float()


def point_metrics(uncertainty: Uncertainty, pairs: Sequence[PointPairs]) -> dict[str, float | None]:
    """`sigma_ratio` and `sigma_within_2` of positions, along the axes of the image."""
    points, error, scale = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    first, second = uncertainty.of_points(points).unbind(1)
    sigma = ((first * scale).square() + second.square()).sqrt()
    return sigma_metrics((error / sigma[:, None]).flatten().numpy())


def cross_validated(samples: Sequence[Sample]) -> dict[str, dict[str, float | None]]:
    """Metrics of each scene by a calibration that was fitted without it and its variants.

    Returns:
        For each scene the metrics of `evaluation.trust`, of the matches published by default.
    """
    lowest = FrontendConfig().min_confidence
    found: dict[str, dict[str, float | None]] = {}
    for group in track(sorted({s.group for s in samples}), "cross-validation"):
        fitted = fit([s for s in samples if s.group != group])
        for sample in (s for s in samples if s.group == group):
            confidence, sigma = fitted.of_matches(sample.matches)
            kept = confidence >= lowest
            trust = Trust(
                sample.error[kept].numpy(),
                sigma[kept].numpy(),
                confidence[kept].numpy(),
                sample.precise,
            )
            found[sample.name] = trust.metrics()
    return found
