"""Disturbed image pairs of the evaluation."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from kp_frontend.cli import main
from kp_training.evaluation.disturbances import find_disturbances
from kp_training.evaluation.method import Found


@pytest.fixture(scope="module")
def pair():
    """Two smooth images (120, 160), the right one brighter."""
    draw = np.random.default_rng(1).random((2, 120, 160)) * 255
    left, right = (cv2.GaussianBlur(image, None, 2) for image in draw)
    return np.uint8(left), np.uint8(right + 20)


def disturbed(name, pair, scene="scene"):
    (disturbance,) = find_disturbances([name])
    return disturbance.pair(scene, *pair)


def test_noise_has_the_given_deviation_and_is_the_same_in_every_run(pair):
    for name, sigma in (("noise10", 10), ("noise20", 20)):
        noisy = disturbed(name, pair)
        for image, clean in zip(noisy, pair, strict=True):
            error = image.astype(float) - clean
            assert abs(error.std() - sigma) < 0.3 and abs(error.mean()) < 0.5
        again = disturbed(name, pair)
        assert all(np.array_equal(a, b) for a, b in zip(noisy, again, strict=True))
        other = disturbed(name, pair, "other scene")
        assert not np.array_equal(noisy[0], other[0])
    both = [image - clean.astype(float) for image, clean in zip(noisy, pair, strict=True)]
    assert abs(np.corrcoef(both[0].ravel(), both[1].ravel())[0, 1]) < 0.05


def test_light_changes_as_described(pair):
    left, right = disturbed("right_dim", pair)
    assert np.array_equal(left, pair[0])
    assert np.array_equal(right, np.rint(pair[1] * 0.4).astype(np.uint8))
    for image, clean in zip(disturbed("dark", pair), pair, strict=True):
        error = image - 0.15 * clean
        assert abs(error.mean()) < 0.1 and 1.9 < error.std() < 2.1


def test_motion_blurs_along_the_row_only(pair):
    bright = np.zeros((20, 40), np.uint8)
    bright[10, 20] = 180
    left, right = disturbed("motion9", (bright, bright))
    assert (left[10, 16:25] == 20).all() and left.sum() == 180
    assert np.array_equal(left, right)
    left, right = disturbed("motion9_right", (bright, bright))
    assert np.array_equal(left, bright) and (right[10, 16:25] == 20).all()


def test_compression_follows_the_quality(pair):
    error = [
        np.abs(disturbed(name, pair)[1].astype(int) - pair[1]).mean()
        for name in ("jpeg10", "jpeg20", "jpeg95")
    ]
    assert error[0] > error[1] > 2 * error[2]


def test_keypoints_of_a_turned_image_are_turned_back():
    image = np.zeros((100, 150), np.uint8)
    spots = np.array([[20, 30], [120, 15], [75, 80]])
    for x, y in spots:
        cv2.circle(image, (int(x), int(y)), 3, 255, -1)
    (disturbance,) = find_disturbances(["rotate20"])
    left, right = disturbance.pair("scene", image, image)
    assert np.array_equal(left, image)
    assert right.shape == (145, 175)  # nothing is cut off
    assert int(right.sum()) == pytest.approx(int(image.sum()), rel=0.02)
    _, _, _, centres = cv2.connectedComponentsWithStats((right > 127).astype(np.uint8))
    corner = np.array([[0.0, 0.0]])  # beyond the original image
    found = Found(np.vstack([centres[1:], corner]), np.eye(4))
    back = disturbance.undone(found, image.shape)
    assert len(back.xy) == 3 and len(back.descriptors) == 3
    apart = np.linalg.norm(back.xy[:, None] - spots, axis=2).min(1)
    assert (apart < 0.3).all()
    # Clockwise in the image is from x to y: counterclockwise moves the right side up.
    right_most = centres[1:][centres[1:, 0].argmax()]
    assert right_most[1] < 60


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("fog", "unknown disturbance 'fog'; examples: right_dim, "),
        ("jpeg20_right", "unknown disturbance 'jpeg20_right'"),
        ("noise", "disturbance 'noise': noise needs a whole number from 1 to 100"),
        ("noise-5", "disturbance 'noise-5': noise needs a whole number from 1 to 100"),
        ("noise2.5", "disturbance 'noise2.5': noise needs a whole number from 1 to 100"),
        ("noise101", "noise needs a whole number from 1 to 100"),
        ("jpeg0", "jpeg needs a whole number from 1 to 100"),
        ("rotate1000", "rotate needs a whole number from 1 to 180"),
        ("motion1_right", "motion needs a whole number from 2 to 99"),
    ],
)
def test_a_wrong_disturbance_is_one_line(name, reason, tmp_path, capsys):
    words = ["evaluate", "middlebury", str(tmp_path), "--out", str(tmp_path / "out")]
    assert main([*words, "--disturb", f"noise20, {name}"]) != 0
    error = capsys.readouterr().err
    assert reason in error and error.count("\n") == 1
