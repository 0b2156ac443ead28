"""Results that are worth nothing are found out, with their cause; good ones are left alone."""

from __future__ import annotations

import re
from dataclasses import replace

import cv2
import numpy as np
import pytest

from kp_frontend.calibration import Camera, StereoCalibration
from kp_frontend.config import FrontendConfig
from kp_frontend.encodings import GreyConverter
from kp_frontend.frontend import StereoFrontend
from kp_frontend.health import HealthMonitor, says_raw

WIDTH, HEIGHT, FOCAL, BASELINE, DISPARITY = 320, 240, 250.0, 0.1, 20
WALL = StereoCalibration(FOCAL, FOCAL, WIDTH / 2, HEIGHT / 2, BASELINE)  # 1.25 m away


@pytest.fixture(scope="module")
def frontend() -> StereoFrontend:
    return StereoFrontend(FrontendConfig(backend="torch", threads=1, max_keypoints=512))


@pytest.fixture(scope="module")
def wall() -> tuple[np.ndarray, np.ndarray]:
    """A rectified pair of a textured wall."""
    noise = np.random.default_rng(3).normal(size=(HEIGHT, WIDTH + DISPARITY)).astype(np.float32)
    image = cv2.normalize(cv2.GaussianBlur(noise, (0, 0), 2), None, 0, 255, cv2.NORM_MINMAX)
    image = image.astype(np.uint8)
    return image[:, :WIDTH].copy(), image[:, DISPARITY:].copy()


def camera(shift: float, distortion: tuple[float, ...] = (0.0,) * 5) -> Camera:
    k = (FOCAL, 0.0, WIDTH / 2, 0.0, FOCAL, HEIGHT / 2, 0.0, 0.0, 1.0)
    p = (FOCAL, 0.0, WIDTH / 2, shift, 0.0, FOCAL, HEIGHT / 2, 0.0, 0.0, 0.0, 1.0, 0.0)
    return Camera(WIDTH, HEIGHT, "plumb_bob", k, distortion, tuple(np.eye(3).ravel()), p)


BENT = camera(0.0, (-0.3, 0.1, 0, 0, 0)), camera(-FOCAL * BASELINE, (-0.3, 0.1, 0, 0, 0))


def raw(image: np.ndarray, lens: Camera) -> np.ndarray:
    """The raw image of a camera whose rectified image this is."""
    x, y = np.meshgrid(np.arange(WIDTH), np.arange(HEIGHT))
    places = lens.rectify(np.stack([x, y], -1).reshape(-1, 2)).astype(np.float32)
    places = places.reshape(HEIGHT, WIDTH, 2)
    return cv2.remap(image, places, None, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101)


def findings(frontend, left, right, calibration=WALL, monitor=None, cameras=None) -> dict[str, str]:
    """What is found after 3 s of one pair, 1 s apart: words by cause."""
    monitor = monitor or HealthMonitor()
    result = frontend(left, right, calibration)
    for second in range(4):
        monitor.add(second, result, left, right, cameras)
    return {finding.cause: finding.words for finding in monitor.findings()}


def dark(image: np.ndarray) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 8, image.shape).astype(np.uint8)


def test_good_pairs_are_left_alone(frontend, wall, pair):
    assert not findings(frontend, *wall)
    assert not findings(frontend, *pair, None)
    rng = np.random.default_rng(0)
    dim = [np.clip(i * 0.15 + 2 * rng.normal(size=i.shape), 0, 255).astype(np.uint8) for i in pair]
    assert not findings(frontend, *dim, None)


@pytest.mark.parametrize("calibrated", [True, False])
def test_swapped_images(frontend, wall, calibrated):
    found = findings(frontend, wall[1], wall[0], WALL if calibrated else None)
    assert list(found) == ["swapped"]
    assert "left and right are swapped" in found["swapped"]


def test_swapped_images_of_cameras_that_converge(frontend, pair):
    """Some of their matches have a disparity that the calibration allows."""
    converging = replace(WALL, fx=995.0, fy=995.0, offset=-31.0)
    assert not findings(frontend, *pair, converging)
    assert list(findings(frontend, pair[1], pair[0], converging)) == ["swapped"]


def test_a_covered_lens_is_named(frontend, wall):
    left, right = wall
    assert (
        "the right image is dark (grey values from 0 to 7"
        in (findings(frontend, left, dark(right))["right dark"])
    )
    assert list(findings(frontend, dark(left), right)) == ["left dark"]
    assert "both images are dark" in findings(frontend, dark(left), dark(right))["dark"]
    blank = np.full_like(left, 255)
    assert list(findings(frontend, blank, right)) == ["left overexposed"]
    grey = np.full_like(left, 128)
    assert list(findings(frontend, grey, grey.copy())) == ["without contrast"]


def test_few_bits_in_use_are_named_as_the_cause(frontend, wall):
    converter = GreyConverter("16")
    converter.greatest = 1020
    found = findings(frontend, *(i // 64 for i in wall), monitor=HealthMonitor((), converter))
    assert "values up to 1020 only, of 65535: set bit_depth to fewer bits" in found["dark"]
    converter = GreyConverter("10")
    converter.greatest = 4000
    found = findings(frontend, *wall, monitor=HealthMonitor((), converter))
    assert "bit_depth 10 makes all above 1023 white" in found["bit depth"]


@pytest.mark.parametrize(
    ("change", "cause", "words"),
    [
        ({"baseline": 100.0}, "baseline", "P[3] is probably in millimetres (100 mm)"),
        ({"fx": 3.6}, "focal length", "a focal length of 3.6 px is implausible"),
        ({"cx": 640.0}, "principal point", "outside the 320x240 image"),
        ({"offset": 19.999}, "depth", "a median depth of"),
    ],
)
def test_an_implausible_calibration(frontend, wall, change, cause, words):
    assert words in findings(frontend, *wall, replace(WALL, **change))[cause]


def test_depths_that_are_not_searched(frontend, wall):
    monitor = HealthMonitor()
    monitor.depths = (0.1, np.inf)
    found = findings(frontend, *wall, replace(WALL, baseline=0.002), monitor)
    assert "around 20 px, which is a depth of 0.025 m" in found["depth limits"]


def test_rows_that_are_off(frontend, wall):
    left, right = wall
    found = findings(frontend, left, np.roll(right, 1, 0))
    assert re.search(r"rows are \+(0\.9|1\.0)\d px off the left's", found["rows off"])
    found = findings(frontend, left, np.roll(right, 6, 0))
    assert "rows are about +6 px off" in found["rows apart"]


def test_images_that_do_not_belong_together(frontend, wall, pair):
    assert list(findings(frontend, wall[0], pair[1])) == ["another scene"]
    assert list(findings(frontend, pair[0], pair[0].copy())) == ["same image"]
    upside_down = np.ascontiguousarray(pair[1][::-1, ::-1])
    assert list(findings(frontend, pair[0], upside_down)) == ["another scene"]


def test_raw_images_tell_themselves_by_their_rows(frontend, wall):
    bent = [raw(image, lens) for image, lens in zip(wall, BENT, strict=True)]
    assert (
        "rectification by camera_info improves the row alignment"
        in findings(frontend, *bent, cameras=BENT)["raw"]
    )
    # Rectified images, whose camera_info has the distortion of the raw ones.
    assert not findings(frontend, *wall, cameras=BENT)


def test_raw_images_tell_themselves_by_their_topic(frontend, wall):
    names = ("/left/image_raw", "/right/image_raw")
    found = findings(frontend, *wall, monitor=HealthMonitor(names), cameras=BENT)
    assert "the topic is /left/image_raw" in found["raw"] and "set input to raw" in found["raw"]
    straight = camera(0.0), camera(-FOCAL * BASELINE)
    assert not findings(frontend, *wall, monitor=HealthMonitor(names), cameras=straight)
    assert not says_raw("/camera/infra1/image_rect_raw")  # RealSense's, which is rectified


def test_a_moment_of_darkness_is_no_finding(frontend, wall):
    monitor = HealthMonitor()
    good, bad = frontend(*wall), frontend(wall[0], dark(wall[1]))
    for i in range(30):
        blink = i >= 27
        monitor.add(0.1 * i, bad if blink else good, wall[0], dark(wall[1]) if blink else wall[1])
    assert not monitor.findings()
    monitor.clear()
    monitor.add(0.0, bad, wall[0], dark(wall[1]))
    assert not monitor.findings()  # not for some seconds yet
    for seconds in (5.0, 10.0):  # a slow stream
        monitor.add(seconds, bad, wall[0], dark(wall[1]))
    assert [f.cause for f in monitor.findings()] == ["right dark"]
    monitor.clear()
    monitor.add(0.0, bad, wall[0], dark(wall[1]))
    assert [f.cause for f in monitor.findings(least_seconds=0)] == ["right dark"]
