"""Lighting and disturbances of training views."""

from __future__ import annotations

from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
from torch.utils.data import default_collate

from kp_training.config import ViewConfig, load_recipe
from kp_training.data import PairDataset
from kp_training.labels import load_labels
from kp_training.photometric import (
    ANGLE,
    BLUR,
    GAIN,
    NOISE,
    QUALITY,
    SHOT,
    SIGMA,
    UNDISTURBED,
    compressed,
    disturb,
    draw_disturbances,
    motion_blurred,
    photometric,
)
from kp_training.views import make_views


@pytest.fixture(scope="module")
def image():
    """A smooth image, (1, 1, 64, 96) in 0..255."""
    image = cv2.GaussianBlur(np.random.default_rng(0).random((64, 96)) * 255, None, 1.0)
    return torch.from_numpy(np.float32(image))[None, None]


def test_photometric_changes_match_the_setting(image):
    torch.manual_seed(0)
    u = torch.full((1, NOISE), 0.5)
    u[:, 5] = 0.0
    for kind in ("jitter", "camera"):
        # Medium values change nothing.
        torch.testing.assert_close(photometric(image, u, kind), image.round())
    across = u.clone()
    across[:, 3] = 1.0
    gain = photometric(image, across, "camera")[..., -8:].mean() / image[..., -8:].mean()
    assert 1.15 < gain < 1.35
    noisy = u.clone()
    noisy[:, 5] = 1.0
    assert 4 < (photometric(image, noisy, "camera") - image).std() < 6.5


def settings(**values):
    """Disturbances of one view, (1, 6)."""
    row = torch.tensor(UNDISTURBED)
    columns = {"gain": GAIN, "blur": BLUR, "angle": ANGLE, "sigma": SIGMA, "shot": SHOT,
               "quality": QUALITY}  # fmt: skip
    for name, value in values.items():
        row[columns[name]] = value
    return row[None]


def test_disturbances_match_their_settings(image):
    torch.manual_seed(0)
    torch.testing.assert_close(disturb(image, settings()), image.round())
    dark = disturb(image, settings(gain=0.15))
    torch.testing.assert_close(dark, (image * 0.15).round())
    flat = torch.full((1, 1, 400, 400), 127.5)
    for shot in (0.0, 1.0):
        assert abs(disturb(flat, settings(sigma=20, shot=shot)).std() - 20) < 0.2
    # Shot noise grows with the light, read noise does not; both are scaled by the gain.
    assert abs(disturb(flat / 4, settings(sigma=10, shot=1.0)).std() - 5) < 0.2
    assert abs(disturb(flat / 2, settings(sigma=10, shot=0.0)).std() - 10) < 0.2
    assert abs(disturb(flat, settings(sigma=20, gain=0.5)).std() - 10) < 0.2
    # Views of a batch differ.
    both = disturb(image.expand(2, -1, -1, -1), torch.cat([settings(), settings(gain=0.5)]))
    torch.testing.assert_close(both[:1], image.round())
    torch.testing.assert_close(both[1:], (image / 2).round())


def test_motion_blur_is_a_line_of_its_length_and_direction(image):
    length, angle = torch.full((1, 1, 1, 1), 9.0), torch.zeros(1, 1, 1, 1)
    expected = cv2.filter2D(
        image[0, 0].numpy(), -1, np.full((1, 9), 1 / 9), borderType=cv2.BORDER_REPLICATE
    )
    blurred = motion_blurred(image, length, angle)[0, 0]
    torch.testing.assert_close(blurred, torch.from_numpy(expected), atol=1e-3, rtol=1e-4)
    spot = torch.zeros(1, 1, 32, 32)
    spot[..., 16, 16] = 1.0
    y, x = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    line = motion_blurred(spot, length, angle + np.pi / 6)[0, 0]
    assert line.sum().item() == pytest.approx(1, abs=1e-5)
    # The position stays; the spread is along the direction.
    assert (line * x).sum().item() == pytest.approx(16, abs=1e-3)
    assert (line * y).sum().item() == pytest.approx(16, abs=1e-3)
    dx, dy = x - 16, y - 16
    slope = (line * dx * dy).sum() / (line * dx * dx).sum()
    assert slope.item() == pytest.approx(np.tan(np.pi / 6), abs=0.05)


@pytest.mark.parametrize("quality", [15, 50, 80])
def test_compression_is_that_of_jpeg(image, quality):
    grey = np.uint8(image[0, 0].round().numpy())
    data = cv2.imencode(".jpg", grey, [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
    real = cv2.imdecode(data, cv2.IMREAD_GRAYSCALE).astype(np.float32)
    made = compressed(image.round(), torch.full((1, 1, 1, 1), float(quality)))[0, 0].numpy()
    assert np.abs(real - made).mean() < 0.1 * np.abs(real - grey).mean()


def test_disturbances_are_drawn_for_both_views_or_for_one():
    config = ViewConfig(disturbed=0.25)
    drawn = np.array(
        [draw_disturbances(config, np.random.default_rng(seed)) for seed in range(2000)]
    )
    low, high = config.exposure
    assert (drawn[..., GAIN] > low).all() and (drawn[..., GAIN] < high).all()
    assert drawn[..., SIGMA].max() < 25 and drawn[..., QUALITY].min() > 15
    assert drawn[..., BLUR].max() < config.motion_blur
    for column in (GAIN, BLUR, SIGMA, QUALITY):
        changed = drawn[..., column] != UNDISTURBED[column]
        assert abs(changed.any(1).mean() - 0.25) < 0.04
        alone = changed[changed.any(1)]
        assert abs(alone.all(1).mean() - 0.5) < 0.07  # in both views, with the same strength
        assert abs(alone[:, 0].mean() - 0.75) < 0.07
        both = changed.all(1)
        assert (drawn[both, 0, column] == drawn[both, 1, column]).all()
    clean = draw_disturbances(ViewConfig(), np.random.default_rng(0))
    assert (clean == np.array(UNDISTURBED, np.float32)).all()


def test_views_are_disturbed_if_the_recipe_says_so(training_images, training_labels):
    labels = load_labels(training_images, training_labels)
    images = []
    for share in (0.0, 1.0):
        drawn = ViewConfig(disturbed=share)
        data = PairDataset(labels, np.arange(4), 4, 3, drawn)
        batch = default_collate([data[i] for i in range(4)])
        torch.manual_seed(0)
        config = replace(load_recipe("paper")[0], views=drawn, correspondences=300)
        images.append(make_views(batch, config)["images"])
    # A mean difference of grey levels, in every pair in at least one view.
    assert ((images[0] - images[1]).abs().mean((2, 3, 4)).amax(0) > 3).all()
