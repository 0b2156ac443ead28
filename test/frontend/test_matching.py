"""Matching against plain definitions."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch

from kp_frontend.matching import (
    match_stereo,
    match_temporal,
    quarter_correlation,
)
from kp_frontend.refinement import refine_disparity


def make(seed: int, count: int = 60) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    xy = rng.uniform(0, 100, (2, count, 2)).astype(np.float32)
    descriptors = rng.normal(size=(2, count, 8)).astype(np.float32)
    descriptors /= np.linalg.norm(descriptors, axis=-1, keepdims=True)
    return xy, rng.random((2, count)) < 0.9, descriptors


@pytest.mark.parametrize("with_margin", [True, False])
@pytest.mark.parametrize("seed", range(5))
def test_stereo_matches_follow_the_definition(seed, with_margin):
    xy, valid, descriptors = make(seed)
    limits = np.float32([20.0, 0.0, 50.0, 0.2, 0.05])
    found, similarity = match_stereo(
        *(torch.from_numpy(a) for a in (xy, valid, descriptors, limits)), with_margin
    )
    count = xy.shape[1]
    score = np.full((count, count), -2.0)
    for i in range(count):
        for j in range(count):
            disparity = xy[0, i, 0] - xy[1, j, 0]
            near = abs(xy[0, i, 1] - xy[1, j, 1]) <= 20.0
            if near and 0.0 <= disparity <= 50.0 and valid[0, i] and valid[1, j]:
                score[i, j] = descriptors[0, i] @ descriptors[1, j]
    expected = np.full(count, -1)
    for i in range(count):
        j = int(score[i].argmax())
        runner_up = np.sort(score[i])[-2]
        mutual = score[:, j].argmax() == i
        if mutual and score[i, j] >= 0.2 and score[i, j] - runner_up >= 0.05 * with_margin:
            expected[i] = j
    assert (expected >= 0).sum() > 5
    np.testing.assert_array_equal(found.numpy(), expected)
    matched = expected >= 0
    np.testing.assert_allclose(
        similarity.numpy()[matched], score[matched, expected[matched]], atol=1e-6
    )


def test_no_keypoints_no_matches():
    xy, valid, descriptors = make(0)
    limits = torch.tensor([20.0, 0.0, 50.0, -1.0, 0.0])
    found, _ = match_stereo(
        torch.from_numpy(xy), torch.zeros(valid.shape, dtype=torch.bool),
        torch.from_numpy(descriptors), limits,
    )  # fmt: skip
    assert (found == -1).all()


def test_tracks_are_limited_by_motion():
    xy, _, descriptors = (torch.from_numpy(a) for a in make(3))
    valid = torch.ones(xy.shape[1], dtype=torch.bool)
    moved = xy[0] + torch.tensor([5.0, -3.0])
    arguments = (moved, valid, descriptors[0], xy[0], valid, descriptors[0])
    assert (match_temporal(*arguments, torch.tensor([6.0, 0.9])) == torch.arange(60)).all()
    assert (match_temporal(*arguments, torch.tensor([4.0, 0.9])) == -1).all()
    assert (match_temporal(*arguments, torch.tensor([-1.0, 0.9])) == -1).all()


def textured(seed: int = 0) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(size=(120, 200)).astype(np.float32)
    image = cv2.GaussianBlur(noise, None, 2.0)
    return 128 + 50 * image / image.std()


@pytest.mark.parametrize("truth", [-0.7, 0.0, 0.31, 1.2])
def test_disparity_is_refined_whatever_the_exposure(truth):
    left = textured()
    columns, rows = np.meshgrid(np.arange(200, dtype=np.float32), np.arange(120, dtype=np.float32))
    right = cv2.remap(left, columns + 10 + np.float32(truth), rows, cv2.INTER_CUBIC)
    right = 0.6 * right + 30  # another exposure
    rng = np.random.default_rng(1)
    left_xy = np.column_stack([rng.uniform(30, 170, 50), rng.uniform(20, 100, 50)])
    left_xy = torch.from_numpy(left_xy.astype(np.float32))
    right_xy = left_xy - torch.tensor([10.0, 0.0])
    found = refine_disparity(torch.from_numpy(left), torch.from_numpy(right), left_xy, right_xy)
    assert found.correlation.min() > 0.9
    assert np.median(np.abs(found.disparity.numpy() - 10 - truth)) < 0.06
    assert found.good.all() and (found.bound > 0).all() and found.bound.median() < 0.1
    assert found.shift[:, 1].abs().median() < 0.03  # rows do not differ


def test_a_row_difference_does_not_count_as_disparity():
    """Slanted texture in rows half a pixel apart: along the row alone it would seem to move."""
    rng = np.random.default_rng(0)
    slant = cv2.GaussianBlur(rng.normal(size=(160, 220)).astype(np.float32), (0, 0), 2)
    slant = cv2.warpAffine(slant, np.float32([[1, 0.7, -40], [0, 1, 0]]), (220, 160))
    left = 128 + 50 * slant / slant.std()
    columns, rows = np.meshgrid(np.arange(220, dtype=np.float32), np.arange(160, dtype=np.float32))
    right = cv2.remap(left, columns + 5.2, rows + 0.5, cv2.INTER_CUBIC)
    left_xy = torch.from_numpy(rng.uniform([60, 30], [150, 120], (60, 2)).astype(np.float32))
    found = refine_disparity(
        torch.from_numpy(left), torch.from_numpy(right), left_xy, left_xy - torch.tensor([5.0, 0])
    )
    assert (found.disparity - 5.2).abs().median() < 0.05
    assert (found.shift[:, 1] + 0.5).abs().median() < 0.05


def test_flat_quarters_are_alike_and_noise_is_no_structure():
    torch.manual_seed(0)
    left, right = 0.2 * torch.randn(2, 20, 9, 9)

    def lowest(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        return quarter_correlation(left.flatten(1), right.flatten(1), torch.ones(20))

    assert (lowest(left, right) > 0.7).all()
    ramp = 10 * torch.arange(9.0).expand(9, 9)
    assert (lowest(left + ramp, right - ramp) < -0.9).all()
    right = right + ramp
    right[:, 4:, 4:] -= 2 * ramp[4:, 4:]  # one quarter alone shows something else
    assert (lowest(left + ramp, right) < -0.9).all()


def test_windows_across_a_depth_edge_do_not_correlate():
    left = textured()
    near = np.arange(200) >= 100  # columns of a near surface before a far one
    shift = np.where(near, 14.0, 10.0).astype(np.float32)
    right = np.full_like(left, 128.0)
    right[:, :86] = left[:, 10:96]  # the far surface, as far as the near one lets it be seen
    right[:, 86:186] = left[:, 100:200]
    x = torch.tensor([50.0, 75.0, 100.0, 101.0, 125.0, 150.0])
    left_xy = torch.stack([x, torch.full_like(x, 60.0)], -1)
    offset = torch.from_numpy(shift[x.long()])
    right_xy = left_xy - torch.stack([offset, torch.zeros_like(offset)], -1)
    correlation = refine_disparity(
        torch.from_numpy(left), torch.from_numpy(right), left_xy, right_xy
    ).correlation
    assert (correlation[[0, 1, 4, 5]] > 0.95).all()
    assert (correlation[[2, 3]] < 0.5).all()


def test_what_cannot_be_refined_keeps_its_place_and_says_so():
    left, right = textured(0), textured(1)  # nothing in common
    left_xy = torch.tensor([[50.0, 50.0], [100.0, 60.0], [80.0, 40.0]])
    right_xy = left_xy - torch.tensor([7.0, 0.0])
    found = refine_disparity(torch.from_numpy(left), torch.from_numpy(right), left_xy, right_xy)
    unknown = ~found.good
    assert (found.correlation[unknown] == -1).all() and (found.correlation < 0.75).all()
    assert unknown.any()
    assert (found.disparity[unknown] == 7.0).all() and (found.plain_sigma()[unknown] == 1.0).all()
    flat = torch.full((120, 200), 90.0)
    found = refine_disparity(flat, flat, left_xy, right_xy)
    assert all(torch.isfinite(values).all() for values in found) and not found.good.any()


def test_equal_descriptors_match_once_each_at_most():
    """Rows that cannot be told apart: no right row is used twice."""
    xy, valid, descriptors = (torch.from_numpy(a) for a in make(2))
    same = torch.zeros_like(descriptors)
    same[..., 0] = 1.0
    limits = torch.tensor([20.0, 0.0, 50.0, 0.2, 0.0])
    found = match_stereo(xy, valid, same, limits, False)[0]
    used = found[found >= 0]
    assert 0 < len(used) == len(used.unique())
