"""Metrics on made data with known answers, and the loader on real scenes where they are."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from kp_training.evaluation.metrics import average_precision, scene_metrics
from kp_training.evaluation.middlebury import evaluate_middlebury
from kp_training.evaluation.scenes import Scene, load_scenes, read_disparity

MIDDLEBURY = Path(__file__).parents[2] / "shared/data/middlebury"


def made(count: int = 40) -> tuple[Scene, tuple, tuple]:
    """A plane at disparity 10 and keypoints that match perfectly."""
    blank = np.zeros((100, 200), np.uint8)
    scene = Scene("made", blank, blank, np.full((100, 200), 10.0, np.float32))
    rng = np.random.default_rng(0)
    xy = np.column_stack([rng.permutation(np.arange(20, 180, 4))[:count],
                          rng.permutation(np.arange(5, 85, 2))[:count]])  # fmt: skip
    descriptors = np.eye(count, dtype=np.float32)
    return scene, (xy.astype(float), descriptors), (xy - [10.0, 0.0], descriptors)


def test_perfect_matches():
    metrics = scene_metrics(*made())
    assert metrics["total_matches"] == metrics["correct_matches"] == 40
    for name in ("matching_accuracy", "disparity_accuracy", "repeatability", "repeatability_1px"):
        assert metrics[name] == 1.0
    assert metrics["descriptor_map"] == pytest.approx(1.0)
    assert metrics["disparity_error_px"] == 0.0


@pytest.mark.parametrize(
    ("shift", "worse", "kept"),
    [
        ((1.5, 0.0), ["repeatability_1px", "disparity_error_px"], ["disparity_accuracy"]),
        ((0.0, 2.5), ["matching_accuracy", "disparity_accuracy"], ["repeatability"]),
        ((5.0, 0.0), ["disparity_accuracy", "repeatability"], ["matching_accuracy"]),
    ],
)
def test_each_metric_notices_its_error(shift, worse, kept):
    scene, left, (xy, descriptors) = made()
    moved = xy.copy()
    moved[:20] += shift
    perfect = scene_metrics(*made())
    metrics = scene_metrics(scene, left, (moved, descriptors))
    for name in worse:
        assert metrics[name] != perfect[name], name
    if "disparity_accuracy" in worse:
        assert metrics["disparity_accuracy"] == 0.5
        assert metrics["correct_matches"] == 20
    for name in kept:
        assert metrics[name] == perfect[name], name


def test_unknown_disparity_counts_for_nothing():
    scene, left, right = made()
    scene.disparity[:, :100] = np.nan
    metrics = scene_metrics(scene, left, right)
    assert metrics["total_matches"] == 40
    assert metrics["correct_matches"] == int((left[0][:, 0] >= 100).sum())
    assert metrics["disparity_accuracy"] == 1.0


def test_average_precision():
    assert average_precision(np.array([True, True, False]), 2) == 1.0
    assert average_precision(np.array([True, False, True]), 2) == pytest.approx((1 + 2 / 3) / 2)
    assert average_precision(np.array([True]), 4) == 0.25
    assert average_precision(np.array([False]), 4) == 0.0


def write_pfm(path: Path, values: np.ndarray) -> None:
    header = f"Pf\n{values.shape[1]} {values.shape[0]}\n-0.0039\n".encode()
    path.write_bytes(header + values[::-1].astype("<f4").tobytes())


def test_disparity_maps_are_read(tmp_path):
    values = np.array([[1.5, np.inf, 3.25], [4.0, 5.0, 6.0]], np.float32)
    write_pfm(tmp_path / "d.pfm", values)
    expected = np.where(np.isfinite(values), values, np.nan)
    np.testing.assert_array_equal(read_disparity(tmp_path / "d.pfm", 1), expected)
    cv2.imwrite(str(tmp_path / "d.png"), np.array([[0, 40], [80, 20]], np.uint8))
    np.testing.assert_array_equal(read_disparity(tmp_path / "d.png", 4), [[np.nan, 10], [20, 5]])


def test_what_cannot_be_evaluated_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"scenes\.json is missing"):
        load_scenes(tmp_path)
    entry = {"dir": "a", "left": "l.png", "right": "r.png", "gt": "d.png", "scale": 1}
    (tmp_path / "scenes.json").write_text(json.dumps([entry]))
    scenes, skipped = load_scenes(tmp_path)
    assert scenes == [] and skipped == ["a: an image cannot be read"]
    with pytest.raises(ValueError, match="no usable scene"):
        evaluate_middlebury(tmp_path, ["sift"])


@pytest.mark.skipif(not MIDDLEBURY.is_dir(), reason="no Middlebury scenes beside the repository")
def test_real_scenes_load():
    scenes, skipped = load_scenes(MIDDLEBURY)
    listed = json.loads((MIDDLEBURY / "scenes.json").read_text())
    assert len(scenes) + len(skipped) == len(listed)
    assert len(scenes) >= 30
    for scene in scenes:
        known = scene.disparity[np.isfinite(scene.disparity)]
        assert known.size > 0.2 * scene.disparity.size, scene.name
        assert 0 < known.max() < scene.left.shape[1] / 2, scene.name
