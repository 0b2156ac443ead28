"""Metrics on synthetic data with known results, scenes in every layout, and methods."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest

from kp_frontend.config import FrontendConfig
from kp_frontend.frontend import StereoFrontend
from kp_training.evaluation.layouts import SceneFiles, find_scenes
from kp_training.evaluation.method import Found, Method
from kp_training.evaluation.methods import make_method
from kp_training.evaluation.metrics import (
    average_precision,
    mutual_nearest,
    published_metrics,
    scene_metrics,
    squared_distances,
    stereo_metrics,
)
from kp_training.evaluation.middlebury.evaluation import evaluate_middlebury
from kp_training.evaluation.results import summary, without_value, write_metrics
from kp_training.evaluation.scenes import (
    Scene,
    left_view,
    load_scene,
    load_scenes,
    read_disparity,
    right_view,
)

MIDDLEBURY = Path(__file__).parents[3] / "shared/data/middlebury"
needs_middlebury = pytest.mark.skipif(
    not MIDDLEBURY.is_dir(), reason="no Middlebury scenes beside the repository"
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


def write_pfm(path: Path, values: np.ndarray) -> None:
    header = f"Pf\n{values.shape[1]} {values.shape[0]}\n-0.0039\n".encode()
    path.write_bytes(header + values[::-1].astype("<f4").tobytes())


def test_disparity_maps_are_read(tmp_path):
    values = np.array([[1.5, np.inf, 3.25], [4.0, 5.0, 6.0]], np.float32)
    write_pfm(tmp_path / "d.pfm", values)
    expected = np.where(np.isfinite(values), values, np.nan)
    np.testing.assert_array_equal(read_disparity(tmp_path / "d.pfm", 1), expected)
    for name in ("d.png", "d.pgm"):
        cv2.imwrite(str(tmp_path / name), np.array([[0, 40], [80, 20]], np.uint8))
        np.testing.assert_array_equal(read_disparity(tmp_path / name, 4), [[np.nan, 10], [20, 5]])


def write_scene(place: Path, left: str, right: str, maps: list[str], height: int) -> None:
    """A scene of gradients in a layout. PFM maps have disparity 7, the others store 24."""
    (place / left).parent.mkdir(parents=True, exist_ok=True)
    image = np.tile(np.arange(64, dtype=np.uint8), (height, 1))
    for name in (left, right):
        colour = cv2.cvtColor(image, cv2.COLOR_GRAY2BGR) if name.endswith(".ppm") else image
        assert cv2.imwrite(str(place / name), colour)
    for name in maps:
        if name.endswith(".pfm"):
            write_pfm(place / name, np.full(image.shape, 7.0))
        else:
            cv2.imwrite(str(place / name), np.full(image.shape, 24, np.uint8))


@pytest.mark.parametrize(
    ("left", "right", "maps", "height", "pixels"),
    [
        ("im2.ppm", "im6.ppm", ["disp2.pgm", "disp6.pgm"], 381, 3),  # 2001
        ("im0.pgm", "im1.pgm", ["disp0.pgm", "disp1.pgm"], 216, 3),  # 2001 Map
        ("scene1.row3.col3.ppm", "scene1.row3.col4.ppm", ["truedisp.row3.col3.pgm"], 288, 1.5),
        ("im2.png", "im6.png", ["disp2.png", "disp6.png"], 375, 6),  # 2003
        ("imL.png", "imR.png", ["disp2.png", "disp6.png"], 750, 12),
        ("im2.ppm", "im6.ppm", ["disp2.pgm", "disp6.pgm"], 1500, 24),
        ("view1.png", "view5.png", ["disp1.png", "disp5.png"], 1110, 24),  # 2005, 2006
        ("view1.png", "view5.png", ["disp1.png", "disp5.png"], 555, 12),
        ("Illum1/Exp1/view1.png", "Illum1/Exp1/view5.png", ["disp1.png", "disp5.png"], 370, 8),
        ("im0.png", "im1.png", ["disp0.pfm", "disp1.pfm"], 100, 7),  # 2014, 2021
        ("im0.png", "im1.png", ["disp0GT.pfm", "disp1GT.pfm"], 100, 7),  # MiddEval3
    ],
)
def test_every_release_layout_is_found(tmp_path, left, right, maps, height, pixels):
    write_scene(tmp_path / "set/thing", left, right, maps, height)
    found, skipped = find_scenes(tmp_path)
    assert not skipped and [files.name for files in found] == ["set/thing"]
    scene = load_scene(found[0])
    assert (scene.disparity == pixels).all()
    assert (scene.right_disparity is not None) == (len(maps) == 2)
    if len(maps) == 2:
        assert (scene.right_disparity == pixels).all()


def test_masks_are_read_and_size_is_changed(tmp_path):
    write_scene(tmp_path, "im0.png", "im1.png", ["disp0GT.pfm"], 48)
    mask = np.full((48, 64), 255, np.uint8)
    mask[:, :32] = 128
    cv2.imwrite(str(tmp_path / "mask0nocc.png"), mask)
    ((files,), _) = find_scenes(tmp_path)
    assert load_scene(files).mask.mean() == 0.5
    scene = load_scene(files, (128, 48))
    assert scene.left.shape == scene.disparity.shape == scene.mask.shape == (48, 128)
    assert (scene.disparity == 14).all() and scene.mask[:, 64:].all()
    assert not scene.mask[:, :64].any()


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda p: (p / "im1.png").write_bytes(b"no"), "im1.png cannot be read as an image"),
        (lambda p: (p / "disp0.pfm").write_bytes(b"Pf\n9 9\n-1\n"), "disp0.pfm cannot be read"),
        (lambda p: write_pfm(p / "disp0.pfm", np.ones((9, 9))), "disparity 9x9"),
        (lambda p: write_pfm(p / "disp0.pfm", np.full((9, 9), np.inf)), "has no valid disparity"),
        (lambda p: write_pfm(p / "disp1.pfm", np.ones((9, 9))), "right_disparity 9x9"),
        (lambda p: cv2.imwrite(str(p / "im1.png"), np.ones((9, 9))), "right 9x9"),
        (lambda p: (p / "im1.png").unlink(), "has disp0.pfm, but not im0 and im1"),
        (lambda p: (p / "disp0.pfm").unlink(), "has im0 and im1, but no ground truth"),
    ],
)
def test_a_broken_scene_is_named_and_the_others_are_measured(tmp_path, spoil, reason):
    for name in ("good", "bad"):
        maps = ["disp0.pfm", "disp1.pfm"]
        write_scene(tmp_path / name, "im0.png", "im1.png", maps, 100)
    spoil(tmp_path / "bad")
    metrics = evaluate_middlebury(tmp_path, ["orb"], 100).metrics
    assert metrics["scenes"] == ["good"]
    (words,) = metrics["protocol"]["skipped"]
    assert words.startswith("bad: ") and reason in words


def test_unusable_folders_are_reported(tmp_path):
    with pytest.raises(ValueError, match=r"neither scenes\.json nor a scene"):
        load_scenes(tmp_path)
    with pytest.raises(ValueError, match="is not a folder"):
        find_scenes(tmp_path / "nowhere")
    entry = {"dir": "a", "left": "l.png", "right": "r.png", "gt": "d.png", "scale": 1}
    (tmp_path / "scenes.json").write_text(json.dumps([entry, entry | {"refright": True}]))
    scenes, skipped = load_scenes(tmp_path)
    assert scenes == []
    assert skipped == ["a (2): its map belongs to the right image", "a: l.png is missing"]
    with pytest.raises(ValueError, match="no usable scene"):
        evaluate_middlebury(tmp_path, ["sift"])
    (tmp_path / "scenes.json").write_text(json.dumps([entry | {"scale": 0}]))
    with pytest.raises(ValueError, match="must be a list of scenes"):
        find_scenes(tmp_path)


@needs_middlebury
def test_real_scenes_load():
    scenes, skipped = load_scenes(MIDDLEBURY)
    listed = json.loads((MIDDLEBURY / "scenes.json").read_text())
    assert len(scenes) + len(skipped) == len(listed)
    assert len(scenes) >= 30
    for scene in scenes:
        known = scene.disparity[np.isfinite(scene.disparity)]
        assert known.size > 0.2 * scene.disparity.size, scene.name
        assert 0 < known.max() < scene.left.shape[1] / 2, scene.name


@needs_middlebury
def test_layouts_agree_with_the_listing(tmp_path):
    listed, _ = find_scenes(MIDDLEBURY)
    for path in MIDDLEBURY.iterdir():
        if path.is_dir():
            shutil.copytree(
                path, tmp_path / path.name, copy_function=lambda a, b: Path(b).symlink_to(a)
            )
    found, skipped = find_scenes(tmp_path)

    def facts(files: SceneFiles) -> dict:
        paths = dataclasses.asdict(files) | {"release": ""}
        return {k: v.name if isinstance(v, Path) else v for k, v in paths.items()}

    assert skipped == []
    by_name = {files.name: facts(files) for files in found}
    assert by_name == {files.name: facts(files) for files in listed}


def textured(shift: int) -> tuple[np.ndarray, np.ndarray]:
    """A pair of blurred noise, the right one shifted."""
    noise = np.random.default_rng(1).integers(0, 256, (160, 260), np.uint8)
    wide = cv2.normalize(cv2.GaussianBlur(noise, (0, 0), 2), None, 0, 255, cv2.NORM_MINMAX)
    return np.ascontiguousarray(wide[:, :220]), np.ascontiguousarray(wide[:, shift : shift + 220])


@pytest.mark.parametrize("name", ["tiny", "sift", "sift_flann", "rootsift", "orb"])
def test_methods_find_a_known_shift(name):
    left, right = textured(12)
    method = make_method(name, 300)
    found = method.detect(left), method.detect(right)
    for f in found:
        assert 50 < len(f.xy) <= 300 and len(f.xy) == len(f.descriptors)
    rows = method.match(*found)
    apart = found[0].xy[rows[:, 0]] - found[1].xy[rows[:, 1]]
    assert np.median(np.abs(apart - [12, 0]).max(1)) < 0.5 and len(rows) > 40
    published = method.publish((left, right), *found)
    assert len(published.disparity) > 40
    assert np.median(np.abs(published.disparity - 12)) < 0.1
    dark = np.zeros((160, 220), np.uint8)
    nothing = method.detect(dark), method.detect(dark)
    assert len(nothing[0].xy) == 0
    assert len(method.match(*nothing)) == len(method.publish((dark, dark), *nothing).disparity) == 0


def test_other_methods_are_published_with_the_front_ends_steps():
    """The front end's keypoints, passed as another method's, give the published matches.

    The length of the descriptors does not matter.
    """
    left, right = textured(12)
    frontend = StereoFrontend(FrontendConfig(backend="torch", max_keypoints=300))
    features = frontend(left, right)
    peer = Method("peer", lambda image: None)
    rng = np.random.default_rng(0)
    found = (
        Found(f.keypoints, f.descriptors * rng.uniform(0.3, 3, (len(f), 1)))
        for f in (features.left, features.right)
    )
    published = peer.publish((left, right), *found)
    own = features.left.keypoints[features.left_index]
    np.testing.assert_array_equal(published.left_xy, own)
    np.testing.assert_allclose(published.disparity, features.disparity, atol=1e-4)


EXTERNAL = """
import cv2, numpy as np

class Corners:
    def __init__(self, most):
        self.most = most

    def __call__(self, image):
        xy = cv2.goodFeaturesToTrack(image, self.most, 0.01, 5)[:, 0]
        return xy, np.stack([cv2.getRectSubPix(image, (9, 9), p.tolist()).ravel() for p in xy])

class WithMatcher(Corners):
    def match(self, left, left_descriptors, right, right_descriptors):
        return np.arange(5)[:, None].repeat(2, 1)

def greedy(most):
    return lambda image: (np.zeros((most + 1, 2)), np.zeros((most + 1, 4)))

def ragged(most):
    return lambda image: (np.zeros((3, 2)), np.zeros((2, 4)))

def broken(most):
    return lambda image: 1 / 0

def outside(most):
    return lambda image: (np.full((3, 2), -5.0), np.zeros((3, 4)))

def changing(most):
    lengths = iter((4, 5))
    return lambda image: (np.ones((3, 2)), np.ones((3, next(lengths))))

def nothing(most):
    return lambda image: ([], [])

class Halves(Corners):
    def match(self, *found):
        return [[0.5, 1.5]]
"""


def test_external_methods(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "peers_for_test.py").write_text(EXTERNAL)
    left, right = textured(12)
    method = make_method("peers_for_test:Corners", 200)
    found = method.detect(left), method.detect(right)
    rows = method.match(*found)
    apart = found[0].xy[rows[:, 0]] - found[1].xy[rows[:, 1]]
    assert len(rows) > 40 and np.median(np.abs(apart - [12, 0])) < 0.5
    own = make_method("peers_for_test:WithMatcher", 200)
    assert own.own_matcher and own.match(*found).tolist() == [[i, i] for i in range(5)]
    for name, words in (
        ("greedy", "returned 201 keypoints, at most 200 allowed"),
        ("ragged", "must return keypoints"),
        ("broken", "ZeroDivisionError"),
        ("missing", "AttributeError"),
        ("outside", "outside the"),
    ):
        with pytest.raises(ValueError, match=words):
            make_method(f"peers_for_test:{name}", 200).detect(left)
    changing = make_method("peers_for_test:changing", 200)
    changing.detect(left)
    with pytest.raises(ValueError, match=r"lengths \[4, 5\]"):
        changing.detect(right)
    with pytest.raises(ValueError, match="indices"):
        make_method("peers_for_test:Halves", 200).match(*found)
    assert len(make_method("peers_for_test:nothing", 200).detect(left).xy) == 0
    with pytest.raises(ValueError, match="ModuleNotFoundError"):
        make_method("no_such_module:f", 200)


def test_seeded_runs_are_equal(tmp_path):
    left, right = textured(12)
    for name, image in (("im0.png", left), ("im1.png", right)):
        cv2.imwrite(str(tmp_path / name), image)
    write_pfm(tmp_path / "disp0.pfm", np.full(left.shape, 12.0))

    def run() -> dict:
        found = evaluate_middlebury(tmp_path, ["sift_flann", "tiny"], 256, seeded=True).metrics
        for metrics in found["methods"].values():
            del metrics["inference_ms"]
        return found

    first = run()
    assert first == run()
    assert first["methods"]["tiny"]["stereo_accuracy"]["mean"] > 0.9
    assert first["methods"]["sift_flann"]["descriptor_map"]["mean"] is None
