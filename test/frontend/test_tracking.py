"""Tracks through made sequences: how exact they are, and what ends them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import cv2
import made_world
import numpy as np
import pytest
from made_world import HEIGHT, STEP, WIDTH

from kp_frontend.calibration import RawStereoCalibration, StereoCalibration, identity_maps
from kp_frontend.config import FrontendConfig
from kp_frontend.features import StereoFeatures
from kp_frontend.frontend import StereoFrontend
from kp_frontend.motion import Motion, project, rigid_motion
from kp_frontend.recovery import interpolated_motion

CONFIG = FrontendConfig(backend="torch", threads=1, max_keypoints=200)
CALIBRATION = made_world.wall(1)[0].calibration()


@pytest.fixture(scope="module")
def frontend() -> StereoFrontend:
    return StereoFrontend(CONFIG)


def run(
    frontend: StereoFrontend, pairs: Iterable[tuple[np.ndarray, np.ndarray]]
) -> list[StereoFeatures]:
    """Features of a sequence that begins anew."""
    frontend.reset()
    return [frontend(*pair, CALIBRATION) for pair in pairs]


def wall(count: int) -> list[tuple[np.ndarray, np.ndarray]]:
    return [(frame.left, frame.right) for frame in made_world.wall(count)]


def noisy(count: int, sigma: float = 3.0) -> list[tuple[np.ndarray, np.ndarray]]:
    """The same pair again and again, each time with other noise."""
    rng = np.random.default_rng(0)
    pair = wall(1)[0]
    return [
        tuple(
            (image + rng.normal(0, sigma, image.shape)).clip(0, 255).astype(np.uint8)
            for image in pair
        )
        for _ in range(count)
    ]


def common(before: StereoFeatures, now: StereoFeatures) -> tuple[np.ndarray, np.ndarray]:
    """Positions (N, 2) in both of the left keypoints on the same tracks."""
    _, old, new = np.intersect1d(before.left.track_ids, now.left.track_ids, return_indices=True)
    return before.left.keypoints[old], now.left.keypoints[new]


def survival(before: StereoFeatures, now: StereoFeatures) -> float:
    """Share of the tracks that go on."""
    return len(common(before, now)[0]) / len(before.left)


def test_tracks_are_exact_and_errors_do_not_add_up(frontend):
    found = run(frontend, wall(8))
    for count, later in enumerate(found[1:], 1):
        before, now = common(found[0], later)
        off = np.linalg.norm(now - before + [STEP * count, 0], axis=1)
        assert len(before) > 60 and np.median(off) < 0.05 and (off < 0.5).mean() > 0.97
    last = found[-1].left
    assert last.track_lengths.max() == 8 and len(last) <= CONFIG.max_keypoints
    assert (last.track_lengths >= 1).all() and len(set(last.track_ids)) == len(last)
    # What is found again has a descriptor of its place and takes part in stereo matches.
    long = np.isin(found[-1].left_index, np.flatnonzero(last.track_lengths >= 4))
    assert long.sum() > 60
    assert np.abs(found[-1].disparity[long] - made_world.DISPARITY).max() < 1


def test_points_that_the_detector_misses_are_found_again(frontend, monkeypatch):
    """With the recovery off, tracks go on only where the detector finds their point again."""
    found = run(frontend, noisy(6, 12.0))
    monkeypatch.setattr("kp_frontend.recovery.MOST_SIGMA", 0.0)
    alone = run(frontend, noisy(6, 12.0))
    lengths = [features[-1].left.track_lengths.mean() for features in (found, alone)]
    assert lengths[0] > 1.2 * lengths[1]
    assert survival(found[0], found[-1]) > 1.2 * survival(alone[0], alone[-1])


def test_a_camera_that_stands_still_drifts_nowhere(frontend):
    found = run(frontend, noisy(12))
    assert survival(found[0], found[-1]) > 0.6
    before, now = common(found[0], found[-1])
    off = now - before
    assert np.abs(np.median(off, axis=0)).max() < 0.05
    assert np.median(np.linalg.norm(off, axis=1)) < 0.3
    early, late = (np.linalg.norm(np.subtract(*common(found[0], f)), axis=1) for f in found[2::9])
    assert np.median(late) < np.median(early) + 0.1


@pytest.mark.parametrize("calibration", ["none", "raw"])
def test_tracks_need_neither_rectified_images_nor_a_calibration(frontend, calibration):
    cameras = None
    if calibration == "raw":
        maps = identity_maps(WIDTH, HEIGHT)
        size = {"maps": maps, "width": WIDTH, "height": HEIGHT}
        cameras = RawStereoCalibration(**dataclasses.asdict(CALIBRATION), **size)
    frontend.reset()
    found = [frontend(*pair, cameras) for pair in wall(5)]
    before, now = common(found[0], found[-1])
    off = np.linalg.norm(now - before + [4 * STEP, 0], axis=1)
    assert len(before) > 60 and np.median(off) < 0.05 and (off < 0.5).mean() > 0.97


def test_another_calibration_ends_all_tracks(frontend):
    """Equal numbers do not make raw cameras equal: their maps count."""
    maps = identity_maps(WIDTH, HEIGHT)
    size = {"width": WIDTH, "height": HEIGHT}
    cameras, same, other = (
        RawStereoCalibration(**dataclasses.asdict(CALIBRATION), maps=m, **size)
        for m in (maps, maps.copy(), maps + np.float32(3))
    )
    assert cameras == same and cameras != other and cameras != CALIBRATION
    frontend.reset()
    pairs = zip(wall(4), (cameras, same, other, other), strict=True)
    lengths = [frontend(*pair, calibration).left.track_lengths for pair, calibration in pairs]
    assert [int(f.max()) for f in lengths] == [1, 2, 1, 2]


def test_tracks_survive_a_moving_region_of_interest(frontend):
    """The principal point moves against the region, the pixels of the points stay comparable."""
    frontend.reset()
    moving = [dataclasses.replace(CALIBRATION, cx=CALIBRATION.cx + i) for i in range(3)]
    pairs = zip(wall(3), moving, strict=True)
    lengths = [frontend(*pair, calibration).left.track_lengths for pair, calibration in pairs]
    assert [int(f.max()) for f in lengths] == [1, 2, 3]
    assert (lengths[2] > 1).mean() > 0.5


def test_a_cut_ends_all_tracks(frontend):
    other = made_world.texture(WIDTH + made_world.DISPARITY, seed=8)
    cut = [np.ascontiguousarray(other[:, s : s + WIDTH]) for s in (0, made_world.DISPARITY)]
    before, after = run(frontend, [*wall(3), cut])[-2:]
    assert survival(before, after) == 0
    assert len(after.left) > 100


@pytest.mark.parametrize("scale", [0.5, 1.6])
def test_tracks_survive_a_jump_of_brightness(frontend, scale):
    pairs = wall(4)
    pairs[2:] = [
        tuple((0.6 * scale * image.astype(float)).clip(0, 255).astype(np.uint8) for image in pair)
        for pair in pairs[2:]
    ]
    found = run(frontend, pairs)
    assert survival(found[1], found[2]) > 0.4
    before, now = common(found[1], found[2])
    off = np.linalg.norm(now - before + [STEP, 0], axis=1)
    assert (off < 1).mean() > 0.95


def test_tracks_outlive_one_black_frame(frontend):
    pairs = wall(5)
    black = np.zeros((HEIGHT, WIDTH), np.uint8)
    found = run(frontend, [*pairs[:3], (black, black), *pairs[4:]])
    assert len(found[3].left) < 40
    before, now = common(found[2], found[4])
    assert len(before) > 100
    off = np.linalg.norm(now - before + [2 * STEP, 0], axis=1)
    assert (off < 1).mean() > 0.9
    assert not set(found[3].left.track_ids) & set(found[2].left.track_ids)


def test_another_size_ends_all_tracks(frontend):
    before, after = run(frontend, [wall(1)[0], tuple(i[:128] for i in wall(2)[1])])
    assert not set(before.left.track_ids) & set(after.left.track_ids)
    assert (after.left.track_lengths == 1).all()


def test_a_share_of_the_keypoints_can_be_kept_for_new_ones(frontend):
    tracked = []
    for share in (0.25, 1.0):
        frontend.configure(dataclasses.replace(CONFIG, track_share=share))
        lengths = run(frontend, noisy(4, 12.0))[-1].left.track_lengths
        assert len(lengths) == CONFIG.max_keypoints
        tracked.append((lengths > 1).sum())
    frontend.configure(CONFIG)
    assert 0.25 * CONFIG.max_keypoints <= tracked[0] < 0.9 * tracked[1]


def test_a_point_that_contradicts_the_others_starts_a_new_track(frontend, monkeypatch):
    """A patch slides over the wall against its motion, as another vehicle would."""
    pairs = []
    own = cv2.GaussianBlur(np.random.default_rng(4).normal(size=(60, 60)), (0, 0), 1.5)
    own = cv2.normalize(own, None, 0, 255, cv2.NORM_MINMAX).astype(np.uint8)
    for count, (left, right) in enumerate(wall(4)):
        left, right = left.copy(), right.copy()
        x = 60 + 5 * count
        left[40:100, x : x + 60] = own
        right[40:100, x - made_world.DISPARITY : x - made_world.DISPARITY + 60] = own
        pairs.append((left, right))

    def on_wall_and_patch() -> list[int]:
        before, now = common(*run(frontend, pairs)[-2:])
        steps = ([-STEP, 0], [5, 0])
        return [int((np.abs(now - before - step).max(1) < 1).sum()) for step in steps]

    on_wall, on_patch = on_wall_and_patch()
    assert on_wall > 50 and on_patch == 0
    monkeypatch.setattr("kp_frontend.motion.CONTRADICTS", 1e3)
    assert on_wall_and_patch()[1] > 10


def test_rigid_motion_is_exact_among_wrong_points():
    rng = np.random.default_rng(2)
    camera = StereoCalibration(700, 700, 600, 180, 0.5)
    points = np.column_stack(
        [rng.uniform(-8, 8, 150), rng.uniform(-2, 2, 150), rng.uniform(4, 40, 150)]
    )
    true = Motion(cv2.Rodrigues(np.array([0.01, 0.03, -0.01]))[0], np.array([0.05, 0.0, -1.0]))
    xy = project(true.apply(points), camera)
    wrong = np.arange(150) < 45
    xy[wrong] += rng.uniform(6, 40, (45, 2))
    motion, contradicts = rigid_motion(points, xy, camera, None)
    np.testing.assert_allclose(motion.rotation, true.rotation, atol=1e-5)
    np.testing.assert_allclose(motion.translation, true.translation, atol=1e-4)
    np.testing.assert_array_equal(contradicts, wrong)
    xy[:120] += rng.uniform(-60, 60, (120, 2))
    assert rigid_motion(points, xy, camera, None)[0] is None
    assert rigid_motion(points[:5], xy[:5], camera, None)[0] is None


def test_motion_between_points_follows_their_neighbours():
    import torch

    rng = np.random.default_rng(3)
    xy = torch.from_numpy(rng.uniform(0, [320, 240], (400, 2)).astype(np.float32))
    true = torch.stack([0.05 * xy[:, 0] - 4, 0.02 * xy[:, 1] + 2], -1)
    given = true.clone()
    given[:40] += 30  # wrong matches
    seen = torch.arange(400) < 300
    found = interpolated_motion(xy, given, seen, (240, 320))
    assert (found[300:] - true[300:]).norm(dim=1).median() < 0.7
    assert (
        interpolated_motion(xy, given, torch.zeros(400, dtype=torch.bool), (240, 320)).abs().max()
        == 0
    )
