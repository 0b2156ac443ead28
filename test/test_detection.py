"""Detection against plain definitions."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kp_frontend.detection import (
    detect,
    heatmap,
    refine,
    sample_descriptors,
    suppress,
    top_keypoints,
)


def greedy(heat: np.ndarray, radius: int) -> np.ndarray:
    """Non-maximum suppression by its definition."""
    kept = np.zeros_like(heat)
    left = heat.copy()
    while left.max() > 0:
        y, x = np.unravel_index(left.argmax(), left.shape)
        kept[y, x] = heat[y, x]
        left[max(0, y - radius) : y + radius + 1, max(0, x - radius) : x + radius + 1] = 0
    return kept


def test_heatmap_puts_each_logit_on_its_pixel():
    logits = torch.zeros(1, 65, 2, 3)
    logits[0, 8 * 5 + 2, 1, 2] = 20.0  # pixel (2, 5) of the cell in row 1, column 2
    heat = heatmap(logits)[0]
    assert heat.shape == (16, 24)
    assert divmod(int(heat.argmax()), 24) == (8 + 5, 16 + 2)
    logits[:, 64] = 40.0
    assert heatmap(logits).max() < 1e-6


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10**6), radius=st.integers(3, 6))
def test_suppression_equals_greedy_given_enough_rounds(seed, radius):
    heat = np.random.default_rng(seed).random((24, 32), np.float32)
    ours = suppress(torch.from_numpy(heat)[None], radius, rounds=24)[0].numpy()
    np.testing.assert_array_equal(ours, greedy(heat, radius))


def test_suppression_by_default_is_part_of_greedy_and_leaves_no_neighbours():
    heat = np.random.default_rng(0).random((240, 320), np.float32)
    ours = suppress(torch.from_numpy(heat)[None], 4)[0].numpy()
    true = greedy(heat, 4)
    assert ((ours == 0) | (ours == true)).all()
    # Noise is the worst case: chains of weaker neighbours are as long as they get.
    assert (ours > 0).sum() > 0.75 * (true > 0).sum()
    y, x = np.nonzero(ours)
    apart = np.maximum(abs(y[:, None] - y), abs(x[:, None] - x)) + 99 * np.eye(len(x))
    assert apart.min() > 4


def test_top_keypoints_are_the_strongest():
    heat = np.random.default_rng(1).random((32, 48), np.float32)
    kept = suppress(torch.from_numpy(heat)[None], 3)
    scores, pixels = top_keypoints(kept, 20)
    expected = np.sort(kept.numpy().ravel())[::-1][:20]
    np.testing.assert_array_equal(scores[0].numpy(), expected)
    for score, (x, y) in zip(scores[0], pixels[0], strict=True):
        assert kept[0, y, x] == score


def test_refinement_finds_the_centroid():
    x, y = 20.3, 11.8
    heat = torch.zeros(1, 32, 48)
    for dy in (0, 1):
        for dx in (0, 1):
            share = (1 - abs(x - (20 + dx))) * (1 - abs(y - (11 + dy)))
            heat[0, 11 + dy, 20 + dx] = share
    found = refine(heat, torch.tensor([[[20, 12]]]))
    np.testing.assert_allclose(found[0, 0].numpy(), [x, y], atol=1e-5)


def test_descriptors_are_sampled_where_the_map_has_them():
    dense = torch.randn(1, 8, 4, 5)
    cell = torch.tensor([[[8 * 3 + 3.5, 8 * 2 + 3.5]]])  # the centre of cell row 2, column 3
    found = sample_descriptors(dense, cell)[0, 0]
    torch.testing.assert_close(found, torch.nn.functional.normalize(dense[0, :, 2, 3], dim=0))


def test_no_keypoint_in_the_border_or_the_padding():
    torch.manual_seed(0)
    logits = torch.randn(1, 65, 4, 6) * 5
    xy, scores, descriptors = detect(logits, torch.randn(1, 8, 4, 6), (27, 41), 40, 3, 4)
    found = xy[scores > 0]
    assert len(found) > 3
    # Refinement moves a keypoint by at most 2 px from its pixel.
    assert found.min() >= 4 - 2
    assert found[:, 0].max() <= 41 - 5 + 2
    assert found[:, 1].max() <= 27 - 5 + 2
    torch.testing.assert_close(descriptors.norm(dim=-1), torch.ones(1, 40))
    assert (scores[0].diff() <= 0).all()
