"""`kp uncertainty`: coefficients from made measurements whose truth is known, and the command."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kp_frontend.cli import main
from kp_frontend.uncertainty import MATCH_MEASUREMENTS, POINT_MEASUREMENTS
from kp_training.evaluation.trust import Trust, confidence_metrics, reliability
from kp_training.uncertainty import Sample, cross_validated, fit


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
