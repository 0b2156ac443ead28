"""Methods: networks, classics and external ones."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from made_scenes import textured, write_pfm

from kp_frontend.config import FrontendConfig
from kp_frontend.frontend import StereoFrontend
from kp_training.evaluation.method import Found, Method
from kp_training.evaluation.methods import make_method
from kp_training.evaluation.middlebury.evaluation import evaluate_middlebury


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
