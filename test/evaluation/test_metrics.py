"""Metrics on made data with known results."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from made_scenes import textured

from kp_frontend.config import FrontendConfig
from kp_frontend.frontend import StereoFrontend
from kp_training.evaluation.metrics import (
    average_precision,
    mutual_nearest,
    published_metrics,
    scene_metrics,
    squared_distances,
    stereo_metrics,
)
from kp_training.evaluation.results import summary, without_value, write_metrics
from kp_training.evaluation.scenes import (
    Scene,
    left_view,
    right_view,
)


def made(count: int = 40) -> tuple[Scene, tuple, tuple]:
    """A plane at disparity 10 and keypoints that match perfectly."""
    blank = np.zeros((100, 200), np.uint8)
    scene = Scene("made", blank, blank, np.full((100, 200), 10.0, np.float32))
    rng = np.random.default_rng(0)
    xy = np.column_stack([rng.permutation(np.arange(20, 180, 4))[:count],
                          rng.permutation(np.arange(5, 85, 2))[:count]])  # fmt: skip
    descriptors = np.eye(count, dtype=np.float32)
    return scene, (xy.astype(float), descriptors), (xy - [10.0, 0.0], descriptors)


SHARES = (
    "matching_accuracy",
    "disparity_accuracy",
    "repeatability",
    "repeatability_1px",
    "repeatability_unoccluded",
    "repeatability_unoccluded_1px",
)


def test_perfect_matches():
    metrics = scene_metrics(*made())
    assert metrics["total_matches"] == metrics["correct_matches"] == 40
    for name in SHARES:
        assert metrics[name] == 1.0
    assert metrics["descriptor_map"] == pytest.approx(1.0)
    assert metrics["disparity_error_px"] == 0.0


@pytest.mark.parametrize(
    ("shift", "worse", "kept"),
    [
        (
            (1.5, 0.0),
            ["repeatability_1px", "repeatability_unoccluded_1px", "disparity_error_px"],
            ["disparity_accuracy", "repeatability"],
        ),
        (
            (0.0, 2.5),
            ["matching_accuracy", "disparity_accuracy", "descriptor_map"],
            ["repeatability"],
        ),
        (
            (5.0, 0.0),
            ["disparity_accuracy", "repeatability", "repeatability_unoccluded"],
            ["matching_accuracy", "total_matches"],
        ),
    ],
)
def test_each_metric_detects_its_error(shift, worse, kept):
    scene, left, (xy, descriptors) = made()
    moved = xy.copy()
    moved[:21] += shift
    perfect = scene_metrics(*made())
    metrics = scene_metrics(scene, left, (moved, descriptors))
    for name in worse:
        assert metrics[name] != perfect[name], name
    if "disparity_accuracy" in worse:
        assert metrics["disparity_accuracy"] == 19 / 40
        assert metrics["correct_matches"] == 19
    if "disparity_error_px" in worse:
        assert metrics["disparity_error_px"] == 1.5
    for name in kept:
        assert metrics[name] == perfect[name], name


def test_swapped_descriptors_lower_accuracy_and_map():
    scene, left, (xy, descriptors) = made()
    swapped = descriptors[np.r_[1:40, 0]]  # each keypoint looks like its neighbour
    metrics = scene_metrics(scene, left, (xy, swapped))
    assert metrics["total_matches"] == 40 and metrics["repeatability"] == 1.0
    assert metrics["descriptor_map"] < 0.1 and metrics["disparity_accuracy"] < 0.1


def test_unknown_disparity_does_not_count():
    scene, left, right = made()
    scene.disparity[:, :100] = np.nan
    metrics = scene_metrics(scene, left, right)
    assert metrics["total_matches"] == 40
    assert metrics["correct_matches"] == int((left[0][:, 0] >= 100).sum())
    assert metrics["disparity_accuracy"] == 1.0


def test_keypoints_outside_the_other_image_do_not_count_for_repeatability():
    scene, left, (xy, descriptors) = made()
    scene.disparity[:, :60] = 70.0  # true positions left of the right image
    gone = left[0][:, 0] < 60
    kept = xy[~gone]
    metrics = scene_metrics(scene, left, (kept, descriptors[~gone]))
    assert metrics["repeatability"] == 1.0
    without = scene_metrics(scene, left, (kept[1:], descriptors[~gone][1:]))
    assert without["repeatability"] == pytest.approx(1 - 1 / (~gone).sum())


def test_the_mask_excludes_occluded_keypoints():
    scene, left, (xy, descriptors) = made()
    hidden = left[0][:, 0] >= 120
    mask = np.ones((100, 200), bool)
    mask[:, 120:] = False
    masked = dataclasses.replace(scene, mask=mask)
    metrics = scene_metrics(masked, left, (xy[~hidden], descriptors[~hidden]))
    assert metrics["repeatability_unoccluded"] == 1.0
    assert metrics["repeatability"] == pytest.approx((~hidden).mean())


def test_left_right_check_and_both_directions():
    scene, left, right = made()
    back = np.full((100, 200), 10.0, np.float32)
    back[:, 100:] = 50.0  # something nearer occludes the left pixels there
    scene = dataclasses.replace(scene, right_disparity=back)
    visible = left_view(scene).visible
    assert not visible[:, :10].any()  # their positions are outside
    assert visible[:, 10:110].all() and not visible[:, 110:].any()
    assert right_view(scene).visible[:, :100].all()
    # From right to left, keypoints right of 100 belong 50 px away, where the left image has none.
    forth = scene_metrics(dataclasses.replace(scene, right_disparity=None), left, right)
    both = scene_metrics(scene, left, right)
    assert forth["repeatability"] == 1.0 and 0.5 < both["repeatability"] < 1.0


def test_average_precision():
    assert average_precision(np.array([True, True, False]), 2) == 1.0
    assert average_precision(np.array([True, False, True]), 2) == pytest.approx((1 + 2 / 3) / 2)
    assert average_precision(np.array([True]), 4) == 0.25
    assert average_precision(np.array([False]), 4) == 0.0


def test_distances_and_mutual_neighbours():
    rng = np.random.default_rng(0)
    left, right = rng.normal(size=(20, 8)), rng.normal(size=(30, 8))
    expected = np.square(left[:, None] - right).sum(-1)
    np.testing.assert_allclose(squared_distances(left, right), expected, rtol=1e-4)
    rows = mutual_nearest(np.array([[1.0, 5.0], [0.5, 3.0], [4.0, 2.0]]))
    assert rows.tolist() == [[1, 0], [2, 1]]
    assert mutual_nearest(np.zeros((0, 3))).shape == (0, 2)
    # A dark image: without keypoints, the descriptor length is unknown.
    assert squared_distances(np.zeros((0, 1)), right).shape == (0, 30)


def test_stereo_metrics():
    truth = np.full((50, 100), 8.0, np.float32)
    truth[:, 90:] = np.nan
    xy = np.array([[20, 5], [30, 10], [40, 15], [95, 20]], float)
    metrics = stereo_metrics(xy, np.array([8.5, 7.0, 12.0, 8.0]), truth)
    assert metrics == {
        "stereo_accuracy": pytest.approx(2 / 3),
        "stereo_matches": 4,
        "stereo_correct_matches": 2,
        "stereo_error_px": 0.75,
    }
    worse = stereo_metrics(xy, np.array([8.5, 3.0, 12.0, 8.0]), truth)
    assert worse["stereo_accuracy"] == pytest.approx(1 / 3) and worse["stereo_error_px"] == 0.5
    nothing = stereo_metrics(xy[:0], np.zeros(0), truth)
    assert nothing["stereo_accuracy"] == 0 and nothing["stereo_error_px"] is None


def test_published_metrics_use_the_published_disparity():
    left, right = textured(12)
    features = StereoFrontend(FrontendConfig(backend="torch", max_keypoints=300))(left, right)
    truth = np.full(left.shape, 12.0, np.float32)
    metrics = published_metrics(features, truth)
    assert metrics["stereo_matches"] == len(features) > 40
    assert metrics["stereo_accuracy"] > 0.9 and metrics["stereo_error_px"] < 0.1
    off = features.disparity.copy()
    off[: len(off) // 2] += 5
    worse = published_metrics(dataclasses.replace(features, disparity=off), truth)
    assert 0.4 < worse["stereo_accuracy"] < 0.6 and worse["stereo_matches"] == len(features)
    truth[:, :110] = np.nan
    fewer = published_metrics(features, truth)
    assert 0 < fewer["stereo_correct_matches"] < metrics["stereo_correct_matches"]
    assert fewer["stereo_accuracy"] > 0.9


def test_metrics_are_strict_json(tmp_path):
    write_metrics(tmp_path, {"limits": {"max_depth": np.inf}, "means": (1.5, float("nan"))})

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    found = json.loads((tmp_path / "metrics.json").read_text(), parse_constant=refuse)
    assert found == {"limits": {"max_depth": None}, "means": [1.5, None]}


def test_means_report_excluded_scenes():
    rows = {"a": {"x": 1.0, "y": None}, "b": {"x": 3.0, "y": 2.0}}
    found = summary(["x", "y"], rows)
    assert found["x"] == {"mean": 2.0, "std": 1.0, "per_scene": {"a": 1.0, "b": 3.0}}
    assert found["y"]["mean"] == 2.0 and found["y"]["per_scene"]["a"] is None
    assert without_value({"methods": {"m": found}}) == ["m, y: no value in 1 of 2"]
