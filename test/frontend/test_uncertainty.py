"""Standard deviations and confidence: against plain definitions, and against exact truth."""

from __future__ import annotations

import dataclasses
import logging
import shutil

import cv2
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from kp_frontend.calibration import RawStereoCalibration, identity_maps
from kp_frontend.config import FrontendConfig
from kp_frontend.frontend import StereoFrontend
from kp_frontend.network import WEIGHTS_DIR, released_weights
from kp_frontend.uncertainty import (
    SUFFIX,
    Uncertainty,
    centred_rows,
    load_uncertainty,
    neighbour_agreement,
    save_uncertainty,
)

CONFIG = FrontendConfig(backend="torch", max_keypoints=400, max_motion=0.0)
SHIFT = (7.3, 0.2)  # of the made pair: disparity and row difference, pixels


@pytest.fixture(scope="module")
def made(pair) -> tuple[np.ndarray, np.ndarray]:
    """A pair with exact truth: one image, and the same moved by fractions of a pixel."""
    rng = np.random.default_rng(0)
    wide = cv2.GaussianBlur(np.float32(pair[0]), (0, 0), 0.7)
    move = np.float32([[1, 0, -SHIFT[0]], [0, 1, SHIFT[1]]])
    moved = cv2.warpAffine(wide, move, wide.shape[::-1], flags=cv2.INTER_CUBIC)
    images = [image + rng.normal(0, 2, image.shape) for image in (wide, moved)]
    return tuple(image.round().clip(0, 255).astype(np.uint8) for image in images)


def test_standard_deviations_hold_on_a_pair_with_exact_truth(made):
    found = StereoFrontend(CONFIG)(*made)
    assert len(found) > 150
    error = np.abs(found.disparity - SHIFT[0])
    right = error < 3
    assert right.mean() > 0.97
    ratio = error[right] / found.disparity_sigma[right]
    # Real scenes, to which they were fitted, have depth edges and imperfect truth besides.
    assert 0.1 < np.median(ratio) < 0.9
    assert (ratio <= 2).mean() > 0.92
    left = found.left.keypoints[found.left_index][right]
    off = left - found.right.keypoints[found.right_index][right] - np.float32([SHIFT[0], -SHIFT[1]])
    spread = np.hypot(found.left.sigma[found.left_index], found.right.sigma[found.right_index])[
        right
    ]
    ratio = np.abs(off) / spread[:, None]
    assert 0.2 < np.median(ratio) < 0.9
    assert (ratio <= 2).mean() > 0.92


def test_more_noise_means_less_certainty(made):
    rng = np.random.default_rng(1)
    noisy = [np.uint8((i + rng.normal(0, 12, i.shape)).clip(0, 255)) for i in made]
    everything = dataclasses.replace(CONFIG, min_confidence=0.0)
    clean, worse = (StereoFrontend(everything)(*images) for images in (made, noisy))
    assert np.median(worse.disparity_sigma) > 1.3 * np.median(clean.disparity_sigma)
    assert worse.confidence.mean() < clean.confidence.mean() - 0.02


def test_raw_images_have_the_same_uncertainty(made):
    height, width = made[0].shape
    maps = identity_maps(width, height)
    raw = RawStereoCalibration(500, 500, 160, 120, 0.1, maps=maps, width=width, height=height)
    frontend = StereoFrontend(CONFIG)
    straight, bent = frontend(*made), frontend(*made, raw)
    assert len(straight) == len(bent)
    np.testing.assert_allclose(bent.disparity_sigma, straight.disparity_sigma, atol=2e-3)
    np.testing.assert_allclose(bent.confidence, straight.confidence, atol=5e-3)
    np.testing.assert_allclose(bent.left.sigma, straight.left.sigma, atol=1e-4)


def test_the_lowest_confidence_is_a_limit_and_nothing_else(pair):
    frontend = StereoFrontend(dataclasses.replace(CONFIG, min_confidence=0.0))
    every = frontend(*pair)
    frontend.configure(dataclasses.replace(CONFIG, min_confidence=0.9))
    some = frontend(*pair)
    assert 0 < len(some) < len(every)
    kept = every.confidence >= 0.9
    np.testing.assert_array_equal(every.left_index[kept], some.left_index)
    assert ((every.confidence >= 0) & (every.confidence <= 1)).all()


def test_neighbours_agree_by_definition():
    rng = np.random.default_rng(0)
    xy = rng.uniform(0, 100, (60, 2)).astype(np.float32)
    disparity = rng.choice([5.0, 6.0, 20.0], 60).astype(np.float32)
    matched = rng.random(60) < 0.8
    support, relief = neighbour_agreement(
        torch.from_numpy(xy), torch.from_numpy(disparity), torch.from_numpy(matched), (100, 100)
    )
    reach = 2 * np.sqrt(100 * 100 / 60)
    for i in np.flatnonzero(matched):
        others = matched & (np.arange(60) != i)
        apart = np.abs(xy - xy[i]).max(1)
        difference = np.minimum(np.abs(disparity - disparity[i]), 3)
        near, close = others & (apart <= reach), others & (apart <= reach / 2)
        alike = (near & (difference < 3)).sum()
        assert support[i].item() == pytest.approx((alike + 0.5) / (near.sum() + 1), rel=1e-5)
        expected = (difference[close].sum() + 0.5) / (close.sum() + 1)
        assert relief[i].item() == pytest.approx(expected, rel=1e-5)


def test_the_rows_of_a_rig_are_told_from_those_of_wrong_matches():
    torch.manual_seed(0)
    after = 1.2 + 0.05 * torch.randn(200)
    after[150:] = 4 * torch.rand(50) - 2  # wrong matches
    matched = torch.arange(200) < 190
    found = centred_rows(torch.stack([after + 0.1, after]), matched)
    assert found[1, :150].abs().median() < 0.05
    np.testing.assert_allclose(found[0] - found[1], 0.1, atol=1e-5)


@pytest.mark.parametrize("model", released_weights())
def test_released_weights_have_a_calibration(model, caplog):
    with caplog.at_level(logging.WARNING):
        uncertainty = load_uncertainty(model)
    assert not caplog.records
    assert uncertainty.match_weight.abs().sum() > 0 and uncertainty.point_weight.abs().sum() > 0


def test_weights_without_a_calibration_are_said_and_served(tmp_path, pair, caplog):
    model = tmp_path / "mine.safetensors"
    shutil.copy(WEIGHTS_DIR / "tiny.safetensors", model)
    with caplog.at_level(logging.WARNING):
        found = StereoFrontend(dataclasses.replace(CONFIG, model=str(model)))(*pair)
    assert "mine.uncertainty.safetensors is missing: the calibration of tiny" in caplog.text
    assert len(found) and np.isfinite(found.confidence).all()
    assert str(model.stem) not in released_weights()


def test_a_calibration_comes_back_and_a_broken_one_is_refused(tmp_path):
    model = tmp_path / "mine.safetensors"
    shutil.copy(WEIGHTS_DIR / "tiny.safetensors", model)
    path = model.with_suffix(SUFFIX)
    expected = Uncertainty()
    for tensor in expected.state_dict().values():
        tensor.copy_(torch.rand_like(tensor))
    save_uncertainty(expected, path)
    found = load_uncertainty(model).state_dict()
    for name, tensor in expected.state_dict().items():
        assert torch.equal(found[name], tensor)
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(ValueError, match="not a readable safetensors"):
        load_uncertainty(model)
    save_file({"match_mean": torch.zeros(3)}, str(path))
    with pytest.raises(ValueError, match="no calibration of this version"):
        load_uncertainty(model)
    expected.match_bias[0] = torch.nan
    save_uncertainty(expected, path)
    with pytest.raises(ValueError, match="not finite"):
        load_uncertainty(model)
