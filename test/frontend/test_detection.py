"""Detection against plain definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kp_frontend.detection import (
    SCALE,
    SPREAD,
    block_peaks,
    block_side,
    detect,
    heatmap,
    mean_heat,
    refine,
    suppress,
    top_keypoints,
    unpack,
)
from kp_frontend.network import load_network
from kp_frontend.sampling import pixel_rows, sample_features


def greedy(heat: np.ndarray, radius: int) -> np.ndarray:
    """Non-maximum suppression by its definition."""
    kept = np.zeros_like(heat)
    left = heat.copy()
    while left.max() > 0:
        y, x = np.unravel_index(left.argmax(), left.shape)
        kept[y, x] = heat[y, x]
        left[max(0, y - radius) : y + radius + 1, max(0, x - radius) : x + radius + 1] = 0
    return kept


def test_keypoints_rank_alike_wherever_they_lie_between_pixels():
    heat = torch.full((1, 20, 40), 0.0001)
    heat[0, 5, 10] = 0.8
    heat[0, 12:14, 25:27] = 0.2  # the same keypoint half a pixel further each way
    found = mean_heat(heat)
    first, second = found[0, :, :18].max(), found[0, :, 18:].max()
    torch.testing.assert_close(first, second, rtol=0.02, atol=0)
    assert found[0, 5, 10] == first
    assert mean_heat(torch.ones(1, 8, 8)).max() == 1


def test_the_weighted_heat_around_a_keypoint_ranks_it_and_is_its_score():
    heat = torch.full((1, 1, 64, 64), 1e-5)
    heat[0, 0, 20, 20] = 0.6
    heat[0, 0, 40:42, 40:42] = 0.2  # lower, but more in all
    heat[0, 0, 50:53, 20:23] = 0.5
    xy, scores = detect(heat.logit(), (64, 64), 40, 2, 4)
    order = [(21, 51), (40.5, 40.5), (20, 20)]
    torch.testing.assert_close(xy[0, :3], torch.tensor(order), rtol=0, atol=0.1)
    # Four pixels are half a pixel away from their centre along x and y.
    expected = [1.0, SCALE * 0.8 * math.exp(-0.25 / SPREAD**2), SCALE * 0.6]
    torch.testing.assert_close(scores[0, :3], torch.tensor(expected), rtol=0, atol=1e-3)


def test_the_score_hardly_depends_on_the_pixel_grid():
    y, x = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    found = []
    for part in (0.0, 0.2, 0.4, 0.5):
        bell = 0.2 * torch.exp(-((x - 30 - part).square() + (y - 30 - part).square()) / 1.3)
        xy, scores = detect(bell[None, None].clamp(min=1e-6).logit(), (64, 64), 1, 2, 4)
        assert (xy[0, 0] - 30 - part).abs().max() < 0.05
        found.append(scores[0, 0].item())
    assert max(found) / min(found) < 1.02


def test_heatmap_puts_each_logit_on_its_pixel():
    logits = torch.full((1, 1, 16, 24), -20.0)
    logits[0, 0, 13, 18] = 20.0
    heat = heatmap(logits)[0]
    assert heat.shape == (16, 24)
    assert divmod(int(heat.argmax()), 24) == (13, 18)
    assert (heat > 1e-6).sum() == 1


def peak_map(peaks: torch.Tensor, side: int) -> np.ndarray:
    """Scores at the pixels of packed peaks (1, h, w), (side * h, side * w), 0 elsewhere."""
    scores, x, y = (part[0].numpy() for part in unpack(peaks, side))
    heat = np.zeros((side * scores.shape[0], side * scores.shape[1]), np.float32)
    for i, j in np.argwhere(scores > 0):
        heat[side * i + int(y[i, j]), side * j + int(x[i, j])] = scores[i, j]
    return heat


def test_block_peaks_are_each_blocks_maximum():
    heat = np.random.default_rng(0).random((24, 36), np.float32)
    for side in (2, 3, 4):
        found = peak_map(block_peaks(torch.from_numpy(heat)[None], side), side)
        blocks = heat.reshape(24 // side, side, 36 // side, side)
        expected = np.where(blocks == blocks.max((1, 3), keepdims=True), blocks, 0)
        np.testing.assert_allclose(found, expected.reshape(24, 36), atol=2e-6)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10**6), radius=st.integers(2, 9))
def test_suppression_of_block_peaks_equals_greedy_given_enough_rounds(seed, radius):
    side = block_side(radius)
    order = np.random.default_rng(seed).permutation(24 * 32) + 1.0  # no two scores are equal
    heat = torch.from_numpy(np.float32(order / len(order)).reshape(1, 24, 32))
    peaks = block_peaks(heat, side)
    ours = peak_map(suppress(peaks, radius, rounds=24), side)
    np.testing.assert_array_equal(ours, greedy(peak_map(peaks, side), radius))


@pytest.mark.parametrize("radius", [2, 3, 4, 6])
def test_the_strongest_keypoints_are_those_of_greedy_suppression(pair, radius):
    """Two rounds over block peaks against greedy suppression of all pixels of a real heatmap."""
    with torch.inference_mode():
        logits = load_network("tiny")(torch.from_numpy(pair[0])[None, None].float())[0]
    heat = heatmap(logits)
    side = block_side(radius)
    height, width = heat.shape[1:]
    ours = peak_map(suppress(block_peaks(heat, side), radius), side)[:height, :width]
    true = greedy(heat[0].numpy(), radius)
    strongest = [set(np.argsort(-kept.ravel(), kind="stable")[:250]) for kept in (ours, true)]
    assert len(strongest[0] & strongest[1]) >= 0.96 * 250
    y, x = np.nonzero(ours)
    apart = np.maximum(abs(y[:, None] - y), abs(x[:, None] - x)) + 99 * np.eye(len(x))
    assert apart.min() > radius


def test_equal_neighbours_leave_one():
    heat = torch.zeros(1, 16, 16)
    heat[0, 7, 6:9] = 0.5  # a plateau over two blocks
    found = peak_map(suppress(block_peaks(heat, 4), 4), 4)
    assert (found > 0).sum() == 1


def test_top_keypoints_are_the_strongest():
    heat = torch.from_numpy(np.random.default_rng(1).random((1, 32, 48), np.float32))
    kept = suppress(block_peaks(heat, 4), 3)
    scores, pixels = top_keypoints(kept, 4, 20)
    expected = np.sort(peak_map(kept, 4).ravel())[::-1][:20]
    np.testing.assert_array_equal(scores[0].numpy(), expected)
    for score, (x, y) in zip(scores[0], pixels[0], strict=True):
        assert heat[0, y, x] == pytest.approx(float(score), abs=2e-6)


def test_refinement_finds_the_centroid():
    x, y = 20.3, 11.8
    heat = torch.zeros(1, 32, 48)
    for dy in (0, 1):
        for dx in (0, 1):
            share = (1 - abs(x - (20 + dx))) * (1 - abs(y - (11 + dy)))
            heat[0, 11 + dy, 20 + dx] = share
    found = refine(heat, torch.tensor([[[20, 12]]]))
    np.testing.assert_allclose(found[0, 0].numpy(), [x, y], atol=1e-5)


def test_features_are_sampled_where_the_map_has_them():
    dense = torch.randn(1, 8, 4, 5)
    rows = pixel_rows(dense)
    cell = torch.tensor([[[8 * 3 + 3.5, 8 * 2 + 3.5]]])  # the centre of cell row 2, column 3
    found = sample_features([rows], [8], cell, width=40)[0]
    torch.testing.assert_close(found[0, 0], dense[0, :, 2, 3])
    between = torch.tensor([[[4 * 3 + 3.5, 4 * 2 + 1.5]]])  # of columns 3 and 4 at 1/4 resolution
    halfway = (dense[0, :, 2, 3] + dense[0, :, 2, 4]) / 2
    found = sample_features([rows], [4], between, width=20)[0]
    torch.testing.assert_close(found[0, 0], halfway)


def test_no_keypoint_in_the_border_or_the_padding():
    torch.manual_seed(0)
    logits = torch.randn(1, 1, 32, 48) * 5
    xy, scores = detect(logits, (27, 41), 40, 3, 4)
    found = xy[scores > 0]
    assert len(found) > 3
    # Refinement moves a keypoint by at most 2 px from its pixel.
    assert found.min() >= 4 - 2
    assert found[:, 0].max() <= 41 - 5 + 2
    assert found[:, 1].max() <= 27 - 5 + 2
    assert (scores[0].diff() <= 0).all()
