"""StereoFrontend: one call, on real images and on bad ones."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kp_frontend.calibration import StereoCalibration
from kp_frontend.config import FrontendConfig
from kp_frontend.frontend import StereoFrontend

CONFIG = FrontendConfig(backend="torch", max_keypoints=400)


@pytest.fixture(scope="module")
def frontend() -> StereoFrontend:
    return StereoFrontend(CONFIG)


def test_results_fit_together(frontend, pair):
    result = frontend(*pair, StereoCalibration(995, 995, 160, 120, 0.2))
    assert (result.width, result.height) == (320, 240)
    for features in (result.left, result.right):
        count = len(features)
        assert 100 < count <= 400
        assert features.keypoints.shape == (count, 2)
        assert features.descriptors.shape == (count, 64)
        np.testing.assert_allclose(np.linalg.norm(features.descriptors, axis=1), 1, atol=1e-5)
        assert (np.diff(features.scores) <= 0).all()
        assert (features.scores > CONFIG.score_threshold).all()
        assert (features.keypoints >= 0).all()
        assert (features.keypoints <= [319, 239]).all()
    assert len(result) > 50
    assert len(set(result.left_index)) == len(set(result.right_index)) == len(result)
    left = result.left.keypoints[result.left_index]
    right = result.right.keypoints[result.right_index]
    assert np.abs(left[:, 1] - right[:, 1]).max() <= CONFIG.row_tolerance
    similarity = (
        result.left.descriptors[result.left_index] * result.right.descriptors[result.right_index]
    ).sum(1)
    np.testing.assert_allclose(result.similarity, similarity, atol=1e-5)
    np.testing.assert_array_equal(
        result.left.track_ids[result.left_index], result.right.track_ids[result.right_index]
    )


@pytest.mark.parametrize("limit", [{"min_correlation": 0.55}, {"min_confidence": 0.7}])
def test_matches_that_do_not_look_alike_are_left_out(pair, limit):
    """Half of the right image is replaced by noise of the same brightness: none matches there."""
    left, right = pair
    spoilt = right.copy()
    rng = np.random.default_rng(0)
    spoilt[120:] = rng.integers(0, 256, spoilt[120:].shape)
    nothing = {"min_confidence": 0.0, "min_correlation": -1.0, "min_similarity": -1.0}
    loose = StereoFrontend(dataclasses.replace(CONFIG, **nothing))
    strict = StereoFrontend(dataclasses.replace(CONFIG, **nothing | limit))

    def rows(result) -> np.ndarray:
        return result.left.keypoints[result.left_index][:, 1]

    all_rows, kept_rows = rows(loose(left, spoilt)), rows(strict(left, spoilt))
    assert (all_rows > 130).sum() > 20
    assert (kept_rows > 130).sum() < 0.1 * (all_rows > 130).sum()
    assert (kept_rows < 110).sum() > 0.6 * (all_rows < 110).sum()


def test_tracks_start_anew_after_a_reset(frontend, pair):
    first = frontend(*pair)
    again = frontend(*pair)
    assert set(first.left.track_ids) == set(again.left.track_ids)
    assert len(set(again.left.track_ids)) == len(again.left)
    frontend.reset()
    anew = frontend(*pair)
    assert not set(anew.left.track_ids) & set(again.left.track_ids)


def test_results_are_the_callers_own(pair):
    frontend = StereoFrontend(CONFIG)
    first = frontend(*pair)
    ids = set(first.left.track_ids)
    first.left.keypoints[:] = 0
    first.left.descriptors[:] = 0
    first.left.track_ids[:] = 7
    assert set(frontend(*pair).left.track_ids) == ids


def test_track_ids_stay_apart_when_the_size_changes_and_after_the_last(pair):
    frontend = StereoFrontend(CONFIG)
    before = frontend(*pair)
    smaller = frontend(*(image[:200] for image in pair))
    assert not set(before.left.track_ids) & set(smaller.left.track_ids)
    frontend.reset()
    frontend._tracker._next_id = 2**32 - 10
    after = frontend(*(image[:200] for image in pair)).left.track_ids
    assert 2**32 - 1 in after and 1 in after and 0 not in after
    assert len(set(after)) == len(after)


def test_depth_limits_bound_the_disparity(pair):
    near = StereoFrontend(dataclasses.replace(CONFIG, min_depth=4.0, max_depth=10.0))
    calibration = StereoCalibration(995, 995, 160, 120, 0.2)  # 19.9 px at 10 m, 49.75 at 4 m
    result = near(*pair, calibration)
    left = result.left.keypoints[result.left_index, 0]
    coarse = left - result.right.keypoints[result.right_index, 0]
    assert coarse.min() >= 18.8 and coarse.max() <= 50.8


def test_openvino_agrees_with_the_reference(pair):
    """Also in later frames, whose noise makes the detector miss points that are found again."""
    reference = StereoFrontend(CONFIG)
    engine = StereoFrontend(dataclasses.replace(CONFIG, backend="openvino", precision="fp32"))
    rng = np.random.default_rng(0)
    for count in range(1, 5):
        expected, result = reference(*pair), engine(*pair)
        assert abs(len(result.left) - len(expected.left)) <= 2
        apart = np.abs(expected.left.keypoints[:, None] - result.left.keypoints).max(-1)
        same, nearest = apart.min(1) < 0.02, apart.argmin(1)
        assert same.mean() > 0.98
        assert len(result) == pytest.approx(len(expected), rel=0.02)
        lengths = expected.left.track_lengths[same], result.left.track_lengths[nearest[same]]
        assert (lengths[0] == lengths[1]).mean() > 0.97 and lengths[0].max() == count
        pair = [
            (image + rng.normal(0, 8, image.shape)).clip(0, 255).astype(np.uint8) for image in pair
        ]


def test_half_precision_reaches_no_coordinate(pair):
    """Confidence and standard deviations are those of the reference, also with bf16 or int8."""
    expected = StereoFrontend(CONFIG)(*pair)
    result = StereoFrontend(dataclasses.replace(CONFIG, backend="openvino"))(*pair)
    apart = np.abs(
        expected.left.keypoints[expected.left_index][:, None]
        - result.left.keypoints[result.left_index]
    ).max(-1)
    same, nearest = apart.min(1) < 0.2, apart.argmin(1)
    assert same.mean() > 0.9
    confidence = result.confidence[nearest[same]] - expected.confidence[same]
    assert np.quantile(np.abs(confidence), 0.9) < 0.02
    ratio = result.disparity_sigma[nearest[same]] / expected.disparity_sigma[same]
    assert np.abs(np.log(np.quantile(ratio, [0.05, 0.95]))).max() < 0.15


@pytest.mark.parametrize("value", [0, 128, 255])
def test_a_constant_image_gives_few_keypoints_and_no_error(frontend, value):
    blank = np.full((240, 320), value, np.uint8)
    result = frontend(blank, blank)
    assert len(result.left) < 40
    assert np.isfinite(result.disparity).all()


@pytest.mark.parametrize(("below", "right"), [(1, 0), (7, 11), (15, 3)])
def test_keypoints_do_not_depend_on_padding(pair, below, right):
    """Away from the cut, an image cut to a size that needs padding has the same keypoints."""
    whole = StereoFrontend(dataclasses.replace(CONFIG, max_keypoints=3000))(*pair).left
    cut = (image[: 240 - below, : 320 - right] for image in pair)
    part = StereoFrontend(dataclasses.replace(CONFIG, max_keypoints=3000))(*cut).left
    inner = part.keypoints[(part.keypoints < [320 - 96, 240 - 96]).all(1) & (part.scores > 0.01)]
    assert len(inner) > 50
    apart = np.abs(inner[:, None] - whole.keypoints).max(-1).min(1)
    assert np.median(apart) < 0.005 and (apart < 0.1).mean() > 0.98


def content(kind: str, height: int, width: int, seed: int) -> np.ndarray:
    """A pair (2, H, W) of a kind of image that cameras give on bad days."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    images = {
        "noise": rng.integers(0, 256, (2, height, width)),
        "saturated": np.where(rng.random((2, height, width)) < 0.5, 0, 255),
        "dark": rng.poisson(1.5, (2, height, width)),
        "gradient": np.stack([x + y, x + y + 3]) % 256,
        "checkerboard": np.stack([(x // 8 + y // 8) % 2 * 255] * 2),
    }
    return images[kind].astype(np.uint8)


@settings(deadline=None, max_examples=12)
@given(
    kind=st.sampled_from(["noise", "saturated", "dark", "gradient", "checkerboard"]),
    height=st.integers(60, 130),
    width=st.integers(60, 130),
    seed=st.integers(0, 99),
)
def test_any_size_and_content_gives_results_that_fit(kind, height, width, seed):
    config = dataclasses.replace(CONFIG, max_keypoints=100, score_threshold=0.0)
    result = StereoFrontend(config)(
        *content(kind, height, width, seed), StereoCalibration(100, 100, 50, 40, 0.1)
    )
    for features in (result.left, result.right):
        assert (features.keypoints >= 0).all()
        assert (features.keypoints <= [width - 1, height - 1]).all()
        assert np.isfinite(features.descriptors).all()
        assert (np.diff(features.scores) <= 0).all()
    assert np.isfinite(result.disparity).all() and (result.disparity_sigma > 0).all()
    behind = result.points[np.isfinite(result.points).all(1), 2] <= 0
    assert not behind.any()
    assert len(set(result.right_index)) == len(result)


@pytest.mark.parametrize(
    ("left", "right", "words"),
    [
        (np.zeros((240, 320)), np.zeros((240, 320), np.uint8), "left image must be"),
        (np.zeros((240, 320), np.uint8), np.zeros((240, 320, 3), np.uint8), "right image must be"),
        (np.zeros((240, 320), np.uint8), np.zeros((240, 300), np.uint8), "sizes must be equal"),
        (np.zeros((10, 10), np.uint8), np.zeros((10, 10), np.uint8), "too small"),
        (np.zeros((32, 32), np.uint8), np.zeros((32, 32), np.uint8), "more than a 32x32 image"),
        ("left", np.zeros((240, 320), np.uint8), "left image must be"),
    ],
)
def test_bad_images_are_refused(frontend, left, right, words):
    with pytest.raises(ValueError, match=words):
        frontend(left, right)


def test_views_that_are_not_contiguous_work(frontend, pair):
    frontend.reset()
    straight = frontend(*pair)
    frontend.reset()
    turned = frontend(*(np.asfortranarray(image) for image in pair))
    np.testing.assert_array_equal(straight.left.keypoints, turned.left.keypoints)


@pytest.mark.parametrize(
    "setting",
    [
        {"nms_radius": 1},
        {"max_depth": 0.0, "min_depth": 0.0},
        {"max_keypoints": "4"},
        {"max_keypoints": 64.5},
        {"max_motion": float("inf")},
        {"threads": True},
        {"max_keypoints": 0},
        {"score_threshold": 2.0},
        {"min_depth": -1.0},
    ],
)
def test_bad_settings_are_refused(setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        FrontendConfig(**setting)


def test_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="backend is 'abacus', must be one of auto, tensorrt"):
        FrontendConfig(backend="abacus")
