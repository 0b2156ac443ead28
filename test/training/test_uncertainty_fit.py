"""`kp uncertainty`: coefficients from made measurements whose truth is known, and the command."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch

from kp_frontend.cli import main
from kp_frontend.uncertainty import MATCH_MEASUREMENTS, POINT_MEASUREMENTS
from kp_training.evaluation.trust import Trust, confidence_metrics, reliability
from kp_training.uncertainty import cross_validated, fit, point_metrics
from kp_training.uncertainty_samples import PointPairs, Sample, made_view


def made_sample(name: str, seed: int, count: int = 1500) -> Sample:
    """Matches that are right with a known probability, with errors of a known deviation."""
    generator = torch.Generator().manual_seed(seed)
    matches = torch.randn(count, len(MATCH_MEASUREMENTS), generator=generator)
    points = torch.randn(count, 2, len(POINT_MEASUREMENTS), generator=generator)
    probability = (3 + 1.5 * matches[:, 0] - matches[:, 3]).sigmoid()
    sigma = (-2 + 0.5 * matches[:, 1]).exp()
    right = torch.rand(count, generator=generator) < probability
    error = torch.where(right, sigma * torch.randn(count, generator=generator), 20.0)
    spread = (-2 + 0.3 * points[..., 0]).exp().square().sum(1).sqrt()
    offset = spread[:, None] * torch.randn(count, 2, generator=generator)
    return Sample(name, matches, points, error, offset, True)


def test_a_known_model_is_found():
    samples = [made_sample(name, i) for i, name in enumerate(("Art_F", "Bull_Q", "Cloth_H"))]
    fitted, fresh = fit(samples), made_sample("Dolls", 9)
    confidence, sigma = fitted.of_matches(fresh.matches)
    expected = (3 + 1.5 * fresh.matches[:, 0] - fresh.matches[:, 3]).sigmoid()
    assert (confidence - expected).abs().mean() < 0.025
    ratio = sigma / (-2 + 0.5 * fresh.matches[:, 1]).exp()
    assert 0.85 < ratio.median() < 1.25 and ratio.log().std() < 0.2
    of_points = fitted.of_points(fresh.points) / (-2 + 0.3 * fresh.points[..., 0]).exp()
    assert 0.85 < of_points.median() < 1.25
    metrics = Trust(fresh.error.numpy(), sigma.numpy(), confidence.numpy(), True).metrics()
    assert 0.55 < metrics["sigma_ratio"] < 0.8 and metrics["sigma_within_2"] > 0.9
    assert metrics["confidence_auc"] > 0.8 and metrics["confidence_error"] < 0.02


def test_positions_are_fitted_to_made_views_as_well():
    """The made views say twice as much as the scenes: the calibration lies between them."""
    samples = [made_sample(name, i) for i, name in enumerate(("Art_F", "Bull_Q"))]
    alone = fit(samples)
    scene = samples[0].point_pairs
    scale = torch.full_like(scene.scale, 1.3)
    first, second = (-2 + 0.3 * scene.points[..., 0]).exp().unbind(1)
    spread = 2 * ((1.3 * first).square() + second.square()).sqrt()
    generator = torch.Generator().manual_seed(5)
    error = spread[:, None] * torch.randn(len(spread), 2, generator=generator)
    made = [PointPairs(scene.points, error, scale)]
    assert point_metrics(alone, made)["sigma_ratio"] == pytest.approx(2 * 0.674, rel=0.1)
    both = fit(samples, made)
    assert 0.674 < point_metrics(both, made)["sigma_ratio"] < 1.2
    assert 0.35 < point_metrics(both, [scene])["sigma_ratio"] < 0.674
    grown = both.of_points(scene.points) / alone.of_points(scene.points)
    assert 1.1 < grown.median() < 2


def test_a_made_view_shows_what_its_homography_says():
    y, x = np.mgrid[:120, :160]
    image = np.uint8(60 + 60 * np.exp(-((x - 70) ** 2 + (y - 50) ** 2) / 40))
    first, second, homography = made_view(image, np.random.default_rng(3))
    assert first.shape == second.shape == image.shape
    there = cv2.perspectiveTransform(np.float64([[[70, 50]]]), homography)[0, 0]
    peak = cv2.GaussianBlur(np.float32(second), (0, 0), 3)
    row, column = np.unravel_index(peak.argmax(), peak.shape)
    assert abs(column - there[0]) < 1.5 and abs(row - there[1]) < 1.5


def test_the_same_scene_does_not_calibrate_itself():
    """ArtL and Art_F are one scene: without Bull nothing would be left to fit."""
    samples = [made_sample("ArtL_Q", 0, 300), made_sample("Art_F", 1, 300)]
    assert samples[0].group == samples[1].group == "Art"
    other = made_sample("Bull", 2, 300)
    assert set(cross_validated([*samples, other])) == {"ArtL_Q", "Art_F", "Bull"}


def test_metrics_of_confidence_by_definition():
    rng = np.random.default_rng(0)
    confidence = rng.random(400)
    right = rng.random(400) < confidence
    found = confidence_metrics(confidence, right)
    pairs = confidence[right][:, None] - confidence[~right]
    auc = ((pairs > 0) + 0.5 * (pairs == 0)).mean()
    assert found["confidence_auc"] == pytest.approx(auc)
    error = sum(
        abs(confidence[inside].mean() - right[inside].mean()) * inside.mean()
        for inside in ((confidence >= i / 10) & (confidence < (i + 1) / 10) for i in range(10))
    )
    assert found["confidence_error"] == pytest.approx(error)
    assert reliability(confidence, right)[:, 0].sum() == 400
    assert confidence_metrics(np.ones(3), np.ones(3, bool))["confidence_auc"] is None
    nothing = confidence_metrics(np.zeros(0), np.zeros(0, bool))
    assert nothing == {"confidence_auc": None, "confidence_error": None}


def test_matches_without_confidence_or_precise_truth_have_no_such_metric():
    error, sigma = np.array([0.1, 5.0, -0.4]), np.full(3, 0.2)
    unknown = np.full(3, np.nan)
    metrics = Trust(error, sigma, unknown, True).metrics()
    assert metrics["sigma_ratio"] == pytest.approx(1.25) and metrics["sigma_within_2"] == 1.0
    assert metrics["confidence_auc"] is None and metrics["confidence_error"] is None
    metrics = Trust(error, sigma, np.array([0.9, 0.2, 0.8]), False).metrics()
    assert metrics["sigma_ratio"] is None and metrics["confidence_auc"] == 1.0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["no-such-model", "--scenes", "."], "no weights"),
        (["tiny", "--scenes", "no/such/folder"], "no/such/folder"),
    ],
)
def test_wrong_arguments_end_in_one_line(arguments, words, capsys):
    assert main(["uncertainty", *arguments]) == 1
    message = capsys.readouterr().err
    assert words in message and message.count("\n") == 1
