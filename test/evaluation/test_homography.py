"""Homography metrics on synthetic data with known results, and the layouts of sequences."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from kp_frontend.cli import main
from kp_training.evaluation.homography.evaluation import (
    Pair,
    corner_error,
    find_pairs,
    load_pair,
    pair_map,
    pair_metrics,
    warp,
)
from kp_training.evaluation.method import Found

OXFORD = Path(__file__).parents[3] / "shared/data/homography"
SHEAR = np.array([[1.0, 0.05, 6.0], [-0.02, 0.98, 4.0], [1e-5, 0, 1]])


def made(count: int = 40) -> tuple[Pair, Found, Found, np.ndarray]:
    """Keypoints with exact positions in both images that match perfectly."""
    rng = np.random.default_rng(0)
    grid = np.stack(np.meshgrid(np.arange(20, 180, 15), np.arange(20, 130, 15)), -1)
    xy = rng.permutation(grid.reshape(-1, 2))[:count].astype(float)
    blank = np.zeros((150, 200), np.uint8)
    descriptors = np.eye(count, dtype=np.float32)
    found = Found(xy, descriptors), Found(warp(xy, SHEAR), descriptors)
    return Pair("made", blank, blank, SHEAR), *found, np.arange(count)[:, None].repeat(2, 1)


def test_perfect_matches():
    pair, first, second, matches = made()
    metrics = pair_metrics(pair, first, second, matches)
    for name, value in metrics.items():
        if name.endswith("matches"):
            assert value == 40
        else:
            assert value == 1.0, name
    assert pair_map(pair, first, second) == pytest.approx(1.0)
    assert corner_error(pair, first.xy, second.xy) < 1e-3


@pytest.mark.parametrize(
    ("shift", "worse", "kept"),
    [
        (2.0, ["repeatability_1px", "homography_accuracy_1px"],
         ["repeatability", "matching_score", "homography_accuracy_3px"]),
        (4.0, ["repeatability", "matching_score", "matching_accuracy", "homography_accuracy_3px"],
         ["homography_accuracy_5px", "total_matches"]),
        (6.0, ["homography_accuracy_5px"], ["total_matches"]),
    ],
)  # fmt: skip
def test_each_metric_detects_its_error(shift, worse, kept):
    pair, first, second, matches = made()
    perfect = pair_metrics(pair, first, second, matches)
    moved = second._replace(xy=second.xy + np.array([shift, 0.0]))
    metrics = pair_metrics(pair, first, moved, matches)
    for name in worse:
        assert metrics[name] == 0.0, name
    for name in kept:
        assert metrics[name] == perfect[name], name
    assert corner_error(pair, first.xy, moved.xy) == pytest.approx(shift, abs=1e-3)


def test_half_of_the_matches_wrong():
    pair, first, second, matches = made()
    wrong = matches.copy()
    wrong[:20, 1] = np.roll(wrong[:20, 1], 1)
    metrics = pair_metrics(pair, first, second, wrong)
    assert metrics["matching_accuracy"] == metrics["matching_score"] == 0.5
    assert metrics["homography_accuracy_1px"] == 1.0  # RANSAC finds the correct half
    swapped = second._replace(descriptors=np.roll(second.descriptors, 1, 0))
    assert pair_map(pair, first, swapped) < 0.1


def test_keypoints_outside_the_shared_area_do_not_count():
    pair, first, second, matches = made()
    far = Found(np.vstack([first.xy, [[199.0, 0.0]]]), np.eye(41, dtype=np.float32))
    # The shift moves the last keypoint outside.
    shifted = pair.matrix + np.array([[0, 0, 40], [0, 0, 0], [0, 0, 0]])
    moved = Pair("moved", pair.first, np.zeros((150, 260), np.uint8), shifted)
    inside = second._replace(xy=warp(first.xy, shifted))
    assert pair_metrics(moved, first, inside, matches)["repeatability"] == 1.0
    narrow = Pair("narrow", pair.first, np.zeros((150, 230), np.uint8), shifted)
    metrics = pair_metrics(narrow, far, inside, matches)
    assert warp(far.xy[-1:], shifted)[0, 0] > 229
    assert metrics["repeatability"] == metrics["matching_score"] == 1.0


def test_too_few_matches_count_as_a_wrong_homography():
    pair, first, second, matches = made()
    assert corner_error(pair, first.xy[:3], second.xy[:3]) == np.inf
    metrics = pair_metrics(pair, first, second, matches[:3])
    assert metrics["homography_accuracy_5px"] == 0.0
    nothing = Found(np.zeros((0, 2)), np.zeros((0, 4)))
    empty = pair_metrics(pair, nothing, nothing, np.zeros((0, 2), int))
    assert empty["repeatability"] == empty["matching_score"] == 0.0
    assert pair_map(pair, first, nothing) == 0.0


def test_points_behind_the_camera_are_nan():
    tilted = np.array([[1, 0, 0], [0, 1, 0], [-0.01, 0, 1.0]])
    places = warp(np.array([[50.0, 10.0], [150.0, 10.0]]), tilted)
    np.testing.assert_allclose(places[0], [100, 20])
    assert np.isnan(places[1]).all()


def write_sequence(
    place: Path, image: str, matrix: str, size: tuple[int, int] = (200, 150)
) -> None:
    """An image of blurred noise, and the same image transformed by SHEAR."""
    place.mkdir(parents=True)
    noise = np.random.default_rng(2).integers(0, 256, size[::-1], np.uint8)
    first = cv2.normalize(cv2.GaussianBlur(noise, (0, 0), 2), None, 0, 255, cv2.NORM_MINMAX)
    for number, view in ((1, first), (2, cv2.warpPerspective(first, SHEAR, size))):
        colour = cv2.cvtColor(view, cv2.COLOR_GRAY2BGR)
        assert cv2.imwrite(str(place / image.format(number)), colour)
    np.savetxt(place / matrix, SHEAR)


def test_layouts_and_missing_files(tmp_path):
    write_sequence(tmp_path / "v_wall", "{}.ppm", "H_1_2")
    write_sequence(tmp_path / "graf", "img{}.png", "H1to2p")
    np.savetxt(tmp_path / "graf/H1to3p", SHEAR)
    pairs, skipped = find_pairs(tmp_path)
    assert [pair.name for pair in pairs] == ["graf/1-2", "v_wall/1-2"]
    assert skipped == ["graf/1-3: image 3 missing"]
    for pair in pairs:
        np.testing.assert_allclose(load_pair(pair).matrix, SHEAR)
    scaled = load_pair(pairs[0], (400, 150))
    first = np.array([[10.0, 20.0]])
    expected = warp(first, SHEAR) * [2, 1] + [0.5, 0]
    np.testing.assert_allclose(warp(first * [2, 1] + [0.5, 0], scaled.matrix), expected)
    (tmp_path / "graf/H1to2p").write_text("1 2 3")
    with pytest.raises(ValueError, match="3x3"):
        load_pair(pairs[0])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="has no sequence"):
        find_pairs(tmp_path / "empty")


def test_command(tmp_path):
    write_sequence(tmp_path / "data/v_wall", "{}.ppm", "H_1_2")
    write_sequence(tmp_path / "data/v_bad", "{}.ppm", "H_1_2")
    (tmp_path / "data/v_bad/H_1_2").write_text("0 0 0 0 0 0 0 0 0")
    words = ["evaluate", "homography", str(tmp_path / "data"), "--out", str(tmp_path / "out")]
    assert main([*words, "--methods", "tiny,sift,orb", "--max-keypoints", "300"]) == 0
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    assert metrics["scenes"] == ["v_wall/1-2"]
    assert metrics["protocol"]["skipped"] == ["v_bad/1-2: H_1_2 is not a homography"]
    for name in ("tiny", "sift"):
        found = metrics["methods"][name]
        assert found["homography_accuracy_3px"]["mean"] == 1.0, name
        assert found["repeatability"]["mean"] > 0.6, name
    page = (tmp_path / "out/report.html").read_text()
    assert "Viewpoint (sequences v_...)" in page and "Illumination" not in page
    assert "v_bad/1-2: H_1_2 is not a homography" in page and page.count("<img") == 4


@pytest.mark.skipif(not OXFORD.is_dir(), reason="no Oxford sequences beside the repository")
def test_real_sequences_load():
    pairs, skipped = find_pairs(OXFORD)
    assert len(pairs) == 10 and not skipped
    pair = load_pair(pairs[0])
    warped = cv2.warpPerspective(pair.first, pair.matrix, pair.second.shape[::-1])
    seen = warped > 0
    assert np.corrcoef(warped[seen], pair.second[seen])[0, 1] > 0.8
