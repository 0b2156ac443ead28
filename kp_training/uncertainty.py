"""`kp uncertainty`: fit what the front end says about its own errors to scenes with true disparity.

The front end runs on each scene without limits on the confidence. Three small models are fitted to
what `Uncertainty` measures: the probability that a match is right (logistic regression), the
standard deviation of its disparity, and that of a keypoint's position (both with the likelihood of
Student's t distribution, because a few errors are far larger than the others). Scenes count alike,
however many matches they have.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.progress import track
from scipy import stats
from torch import Tensor

from kp_frontend.config import FrontendConfig
from kp_frontend.frontend import StereoFrontend
from kp_frontend.pipeline import PipelineResults, StereoPipeline
from kp_frontend.refinement import LIMIT, refine_disparity
from kp_frontend.uncertainty import SPAN, Uncertainty
from kp_training.evaluation.image_pairs import load_usable
from kp_training.evaluation.layouts import find_scenes
from kp_training.evaluation.metrics import DISPARITY_TOLERANCE, at_pixels
from kp_training.evaluation.scenes import Scene, load_scene
from kp_training.evaluation.trust import Trust

KEYPOINTS = 2048
SHRINKAGE = 1e-3  # of the coefficients, on the scale of the mean loss of a match
FREEDOM = 6.0  # degrees of freedom of Student's t distribution
# Third quartile of a normal distribution over that of Student's t.
SHARPNESS = float(stats.norm.ppf(0.75) / stats.t.ppf(0.75, FREEDOM))
# Scenes of Middlebury in other light or exposure and at other sizes: ArtL_Q is Art.
VARIANT = re.compile(r"(?<=[a-z0-9])[ELP]?(_.*)?$")


class Recorder(Uncertainty):
    """An uncalibrated model that keeps the measurements it is asked about."""

    matches: Tensor
    points: Tensor

    def of_matches(self, measurements: Tensor) -> tuple[Tensor, Tensor]:
        """Keep them."""
        self.matches = measurements
        return super().of_matches(measurements)

    def of_points(self, measurements: Tensor) -> Tensor:
        """Keep them."""
        self.points = measurements
        return super().of_points(measurements)


@dataclass(frozen=True)
class Sample:
    """The candidate matches of a scene, N rows, all with true disparity.

    `matches` (N, M) and `points` (N, 2, P) measurements, left and right; `error` (N,) of the
    refined disparity; `point_error` (N, 2) how far the right keypoint lies from what the left one
    shows, by the refinement, pixels; `precise`: the truth is known to fractions of a pixel.
    """

    name: str
    matches: Tensor
    points: Tensor
    error: Tensor
    point_error: Tensor
    precise: bool

    @property
    def right(self) -> Tensor:
        """Which matches are right, (N,) bool."""
        return self.error.abs() <= DISPARITY_TOLERANCE

    @property
    def group(self) -> str:
        """The scene that this is, whatever its size and light."""
        return VARIANT.sub("", self.name)


def collect(model: str, scene: Scene, precise: bool) -> Sample:
    """Run the front end on a scene and keep what it measures of each candidate match."""
    height, width = scene.left.shape
    config = FrontendConfig(
        model=model,
        backend="torch",
        max_keypoints=min(KEYPOINTS, height * width // 16),
        max_motion=0.0,
        min_confidence=0.0,
    )
    recorder = Recorder()
    frontend = StereoFrontend(config, recorder)
    pipeline = StereoPipeline(frontend.network, config, height, width, uncertainty=recorder).eval()
    inputs = (np.stack([scene.left, scene.right]), *frontend.blank_inputs(width))
    with torch.inference_mode():
        outputs = pipeline(*(torch.from_numpy(array) for array in inputs))
    found = PipelineResults.of([tensor.numpy() for tensor in outputs], raw=False, tracked=False)
    left = np.flatnonzero(found.right_row >= 0)
    right = found.right_row[left]
    truth = at_pixels(scene.disparity, found.xy[0][left])
    known = np.isfinite(truth)
    left, right, truth = left[known], right[known], truth[known]
    again = refine_disparity(
        torch.from_numpy(scene.left).float(),
        torch.from_numpy(scene.right).float(),
        torch.from_numpy(found.xy[0][left]),
        torch.from_numpy(found.xy[1][right]),
    )
    return Sample(
        scene.name,
        recorder.matches[left],
        torch.stack([recorder.points[0][left], recorder.points[1][right]], 1),
        torch.from_numpy(found.disparity[left] - truth),
        again.shift,
        precise,
    )


def collect_scenes(
    model: str, folder: Path, left_out: Sequence[str] = ()
) -> tuple[list[Sample], list[str]]:
    """Samples of the scenes of a folder, and what was left out and why.

    Args:
        left_out: names of scenes that are not used.

    Raises:
        ValueError: no scenes, or fewer than two that can be used.
    """
    found, skipped = find_scenes(folder)
    unknown = set(left_out) - {files.name for files in found}
    if unknown:
        raise ValueError(f"no scene {', '.join(sorted(unknown))} in {folder}")
    samples = []
    chosen = [files for files in found if files.name not in left_out]
    for files, scene in load_usable(chosen, load_scene, skipped, "scenes"):
        sample = collect(model, scene, files.truth.suffix == ".pfm")
        if 0 < int(sample.right.sum()) < len(sample.right):
            samples.append(sample)
        else:
            skipped.append(f"{files.name}: its matches are all right or all wrong")
    if len({sample.group for sample in samples}) < 2:
        raise ValueError(f"{folder} has fewer than two scenes that can be used")
    return samples, skipped


def fit(samples: Sequence[Sample]) -> Uncertainty:
    """Fit a calibration.

    Standard deviations are fitted to the right matches that are published by default, of scenes
    whose truth is known to fractions of a pixel; where there is none, of all.
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
    _fit_points(result, samples)
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


def _fit_points(result: Uncertainty, samples: Sequence[Sample]) -> None:
    used = [s.right & (s.point_error.abs().amax(1) <= LIMIT) for s in samples]
    points = torch.cat([s.points[u] for s, u in zip(samples, used, strict=True)])
    error = torch.cat([s.point_error[u] for s, u in zip(samples, used, strict=True)])
    weights = _weights(samples, [int(u.sum()) for u in used])
    result.point_mean, result.point_scale = _moments(points.flatten(0, 1))
    x = _standard(points, result.point_mean, result.point_scale)

    def loss(c: Tensor) -> Tensor:
        # The difference of two positions has the sum of their variances.
        log_sigma = torch.logsumexp(2 * (x @ c[:-1] + c[-1]), 1) / 2
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
