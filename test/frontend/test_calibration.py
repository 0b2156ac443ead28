"""Cameras: disparity to depth, raw pixels to rectified ones."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import yaml

from kp_frontend.calibration import (
    Camera,
    RawStereoCalibration,
    StereoCalibration,
    Window,
    distortion,
    image_matrices,
)
from kp_frontend.config import FrontendConfig
from kp_frontend.frontend import StereoFrontend
from kp_frontend.rectification import rectify

LEFT = [700, 0, 320, 0, 0, 710, 240, 0, 0, 0, 1, 0]
RIGHT = [700, 0, 330, -70, 0, 710, 240, 0, 0, 0, 1, 0]
EUROC = Path(__file__).parents[3] / "shared/data/sequences/euroc_v1_01_excerpt/mav0"


@pytest.fixture(scope="module")
def euroc() -> tuple[tuple[Camera, Camera], tuple[np.ndarray, np.ndarray]]:
    """A real rig with distorted images, rectified by OpenCV's `stereoRectify`, and a pair of it."""
    if not EUROC.is_dir():
        pytest.skip("no EuRoC excerpt in shared/data")
    sensors = []
    for name in ("cam0", "cam1"):
        text = (EUROC / name / "sensor.yaml").read_text().partition("\n")[2]  # OpenCV's first line
        sensors.append(yaml.safe_load(text))
    in_body = [np.reshape(s["T_BS"]["data"], (4, 4)) for s in sensors]
    right_from_left = np.linalg.inv(in_body[1]) @ in_body[0]
    ks = []
    for s in sensors:
        fx, fy, cx, cy = s["intrinsics"]
        ks.append(np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1]]))
    ds = [np.array(s["distortion_coefficients"]) for s in sensors]
    size = tuple(sensors[0]["resolution"])
    turns = right_from_left[:3, :3], right_from_left[:3, 3]
    r1, r2, p1, p2, *_ = cv2.stereoRectify(
        ks[0], ds[0], ks[1], ds[1], size, *turns, flags=cv2.CALIB_ZERO_DISPARITY, alpha=0
    )
    cameras = tuple(
        Camera(*size, "plumb_bob", *(tuple(map(float, np.ravel(m))) for m in (k, d, r, p)))
        for k, d, r, p in zip(ks, ds, (r1, r2), (p1, p2), strict=True)
    )
    stamp = sorted(p.name for p in (EUROC / "cam0/data").iterdir())[0]
    paths = (EUROC / name / "data" / stamp for name in ("cam0", "cam1"))
    return cameras, tuple(cv2.imread(str(path), cv2.IMREAD_GRAYSCALE) for path in paths)


def test_points_project_back():
    rig = StereoCalibration.from_projections(LEFT, RIGHT)
    assert (rig.baseline, rig.offset) == (pytest.approx(0.1), -10)
    points = np.array([[0.3, -0.2, 2.0], [-1.0, 0.5, 7.0]])
    projected = []
    for matrix in (LEFT, RIGHT):
        image = np.column_stack([points, np.ones(2)]) @ np.reshape(matrix, (3, 4)).T
        projected.append(image[:, :2] / image[:, 2:])
    disparity = projected[0][:, 0] - projected[1][:, 0]
    np.testing.assert_allclose(rig.points(projected[0], disparity), points, rtol=1e-5)
    assert rig.disparity(2.0) == pytest.approx(disparity[0])
    assert rig.disparity(math.inf) == -10


def test_a_point_at_infinity_or_behind_is_nan():
    rig = StereoCalibration.from_projections(LEFT, RIGHT)
    points = rig.points(np.zeros((2, 2)), np.array([-10.0, -11.0]))
    assert np.isnan(points).all()


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ([0.0] * 12, [0.0] * 12),
        (LEFT, LEFT),
        (LEFT, [700, 0, 320, 70, 0, 700, 240, 0, 0, 0, 1, 0]),
        (LEFT, [500, 0, 320, -50, 0, 500, 240, 0, 0, 0, 1, 0]),
        (LEFT[:9], RIGHT),
        ([math.nan] * 12, RIGHT),
    ],
)
def test_what_is_no_stereo_rig_is_refused(left, right):
    with pytest.raises(ValueError):
        StereoCalibration.from_projections(left, right)


def projection(tx: float) -> list[float]:
    return [700, 0, 320, tx, 0, 710, 240, 0, 0, 0, 1, 0]


@pytest.mark.parametrize(
    ("left", "right", "words"),
    [
        (0.0, 0.0, r"P\[3\] of the right camera is 0, so the baseline is 0"),
        (-70.0, -70.0, r"P\[3\] of the right camera is -70 as in the left camera's"),
        (0.0, 70.0, r"negative \(-0.1 m; P\[3\] is 0 left and 70 right\): .* swapped"),
        (-70.0, 0.0, r"negative .* swapped"),
    ],
)
def test_a_baseline_that_is_not_positive_is_explained_and_can_be_given(left, right, words):
    matrices = projection(left), projection(right)
    with pytest.raises(ValueError, match=f"{words}.*--baseline"):
        StereoCalibration.from_projections(*matrices)
    given = StereoCalibration.from_projections(*matrices, baseline=0.12)
    assert given.baseline == 0.12 and given.points(np.zeros((1, 2)), np.array([8.4]))[0, 2] == 10


def test_the_axis_may_start_anywhere():
    """P[3] of the left camera: a rig whose common frame is not the left camera's."""
    rig = StereoCalibration.from_projections(projection(14.0), projection(-56.0))
    assert rig.baseline == pytest.approx(0.1)
    assert rig.doubt() is None


def test_a_projection_in_millimetres_is_doubted():
    rig = StereoCalibration.from_projections(projection(0), projection(-700.0 * 62))
    assert rig.baseline == pytest.approx(62)
    assert "in millimetres (62 mm)" in rig.doubt()


@pytest.mark.parametrize(
    ("model", "given", "expected"),
    [
        ("equidistant", (-0.002, 0.038, -0.036, 0.006, 0.0), (-0.002, 0.038, -0.036, 0.006)),
        ("equidistant", (0.1, 0.2), (0.1, 0.2, 0, 0)),
        ("plumb_bob", (0.1, 0.2, 0.0, 0.0, 0.0, 0.0), (0.1, 0.2, 0, 0)),
        ("plumb_bob", (0.1, 0.2, 0.0, 0.0, 0.3, 0.0, 0.0, 0.0), (0.1, 0.2, 0, 0, 0.3)),
        ("rational_polynomial", (*[0.1] * 8, *[0.0] * 6), (0.1,) * 8),
        ("rational_polynomial", (*[0.1] * 6, 0.0), (*[0.1] * 6, 0, 0)),
        ("", (0.1, 0.2, 0.3, 0.4), (0.1, 0.2, 0.3, 0.4)),
        ("plumb_bob", (), (0, 0, 0, 0)),
    ],
)
def test_zeros_at_the_end_of_the_coefficients_do_not_matter(model, given, expected):
    assert distortion(model, given) == (model or "plumb_bob", expected)


@pytest.mark.parametrize("name", ["radtan", "Brown Conrady", "radial-tangential", "pinhole", ""])
def test_models_go_by_several_names(name):
    assert distortion(name, [0.1] * 5)[0] == "plumb_bob"
    assert distortion("Kannala Brandt4", [0.1] * 4)[0] == "equidistant"


def test_a_window_of_the_sensor_moves_and_scales_the_matrices():
    """A point is seen by the image where it is seen by the sensor, moved and binned."""
    whole = dataclasses.replace(
        camera("plumb_bob", MODELS["plumb_bob"]), window=Window(100, 60, 320, 240, 2, 2)
    )
    part = whole.for_image(160, 120)
    places = np.array([[200.0, 100.0], [300.0, 200.0], [399.0, 270.0]])
    raw = whole.unrectify(places)
    move = lambda xy: (xy - [100, 60]) / 2  # noqa: E731
    np.testing.assert_allclose(part.unrectify(move(places)), move(raw), atol=1e-9)
    assert part.window == Window() and (part.width, part.height) == (160, 120)
    # An image of the whole sensor needs nothing; one that fits neither is refused.
    assert whole.for_image(640, 480).k == whole.k
    with pytest.raises(ValueError, match="for 640x480, with its region and binning for 160x120, "):
        whole.for_image(320, 240)
    with pytest.raises(ValueError, match=r"for 640x480, the image has 320x240$"):
        dataclasses.replace(whole, window=Window()).for_image(320, 240)


def test_binning_keeps_depth():
    matrices = np.reshape(projection(0), (3, 4)), np.reshape(projection(-70.0), (3, 4))
    window = Window(binning_x=2, binning_y=2)
    halves = [image_matrices(p[:, :3], p, (640, 480), window, (320, 240))[1] for p in matrices]
    rig = StereoCalibration.from_projections(*halves)
    assert (rig.fx, rig.cx, rig.baseline) == (350, 160, pytest.approx(0.1))


def test_points_are_rectified_as_opencv_does_on_a_real_rig(euroc):
    """Against the map by which OpenCV warps images, which goes the other way."""
    cameras, _ = euroc
    for camera, table in zip(
        cameras, RawStereoCalibration.from_cameras(*cameras).maps, strict=True
    ):
        k, r = np.reshape(camera.k, (3, 3)), np.reshape(camera.r, (3, 3))
        p = np.reshape(camera.p, (3, 4))[:, :3]
        size = camera.width, camera.height
        raw_x, raw_y = cv2.initUndistortRectifyMap(k, np.array(camera.d), r, p, size, cv2.CV_32FC1)
        y, x = np.mgrid[: camera.height : 7, : camera.width : 7]
        raw = np.column_stack([raw_x[y, x].ravel(), raw_y[y, x].ravel()])
        places = np.column_stack([x.ravel(), y.ravel()])
        seen = ((raw > 0) & (raw < [camera.width - 1, camera.height - 1])).all(1)
        assert seen.mean() > 0.8
        found, steps, inside = rectify(*(torch.from_numpy(a)[None] for a in (raw[seen], table)))
        assert inside.all()
        assert np.abs(found[0].numpy() - places[seen]).max() < 0.01
        # A rectified pixel to the right and down is where the steps say.
        for i, way in enumerate(([1.0, 0.0], [0.0, 1.0])):
            apart = camera.unrectify(places[seen] + way) - raw[seen]
            assert np.abs(steps[0, :, :, i].numpy() - apart).max() < 0.01


def camera(model: str, d: tuple[float, ...]) -> Camera:
    k = (300.0, 0.0, 320.0, 0.0, 305.0, 240.0, 0.0, 0.0, 1.0)
    r = tuple(cv2.Rodrigues(np.array([0.02, -0.03, 0.01]))[0].ravel())
    p = (280.0, 0.0, 310.0, 0.0, 0.0, 280.0, 245.0, 0.0, 0.0, 0.0, 1.0, 0.0)
    return Camera(640, 480, model, k, d, r, p)


MODELS = {
    "plumb_bob": (-0.2, 0.04, 0.0002, 0.00002, 0.0),
    "rational_polynomial": (0.9, 0.2, 0.0001, -0.0002, 0.01, 1.25, 0.45, 0.04),
    "equidistant": (-0.01, 0.02, -0.015, 0.004),
    "fisheye": (),
}


@pytest.mark.parametrize("model", MODELS)
def test_there_and_back(model):
    rig = camera(model, MODELS[model])
    raw = np.random.default_rng(0).uniform((0, 0), (640, 480), (500, 2))
    places = rig.rectify(raw)
    assert np.isfinite(places).all()
    assert np.abs(places - raw).max() > 5
    assert np.abs(rig.unrectify(places) - raw).max() < 1e-3
    found, _, inside = rectify(
        *(torch.from_numpy(a)[None] for a in (raw.astype(np.float32), rig.map()))
    )
    assert inside.all()
    middle = np.linalg.norm(raw - [320, 240], axis=1) < 250
    assert np.abs(found[0].numpy() - places)[middle].max() < 0.02


def test_what_lies_beside_a_fisheye_has_no_rectified_place():
    """A lens that sees more than half of all directions: no plane holds them."""
    k = (180.0, 0.0, 320.0, 0.0, 180.0, 240.0, 0.0, 0.0, 1.0)
    rig = dataclasses.replace(camera("equidistant", ()), k=k)
    raw = np.array([[320.0, 240.0], [2.0, 240.0]])  # ahead, and 101 degrees to the left
    assert np.isfinite(rig.rectify(raw)[0]).all() and np.isnan(rig.rectify(raw)[1]).all()
    _, _, inside = rectify(
        *(torch.from_numpy(a)[None] for a in (raw.astype(np.float32), rig.map()))
    )
    assert inside[0].tolist() == [True, False]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": "omnidirectional"}, "distortion model 'omnidirectional' is not known"),
        ({"d": (0.1,) * 15}, "at most 14 coefficients, not 15"),
        ({"model": "equidistant", "d": (0.1,) * 5}, "at most 4 coefficients, not 5"),
        ({"d": (math.nan,) * 5}, "not finite"),
        ({"k": (0.0,) * 9}, "no focal length"),
        ({"r": (0.0,) * 9}, "r is no rotation"),
        ({"p": (1.0,) * 9}, "9, 9 and 12"),
    ],
)
def test_a_camera_that_is_not_calibrated_is_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(camera("plumb_bob", MODELS["plumb_bob"]), **changes)


def test_raw_images_give_what_warped_ones_do(euroc):
    """Disparity and depth from raw images are those of the same pair warped by OpenCV."""
    cameras, images = euroc
    calibration = RawStereoCalibration.from_cameras(*cameras)
    warped = []
    for rig, image in zip(cameras, images, strict=True):
        k, r = np.reshape(rig.k, (3, 3)), np.reshape(rig.r, (3, 3))
        p = np.reshape(rig.p, (3, 4))[:, :3]
        maps = cv2.initUndistortRectifyMap(
            k, np.array(rig.d), r, p, (rig.width, rig.height), cv2.CV_32FC1
        )
        warped.append(cv2.remap(image, *maps, cv2.INTER_LINEAR))
    config = FrontendConfig(backend="torch", max_keypoints=800)
    flat = StereoCalibration.from_projections(*(rig.p for rig in cameras))
    expected = StereoFrontend(config)(*warped, flat)
    frontend = StereoFrontend(config)
    found = frontend(*images, calibration)
    assert len(found) > 0.8 * len(expected) > 100
    a, b = (r.left.keypoints[r.left_index] for r in (found, expected))
    apart = np.linalg.norm(a[:, None] - b, axis=-1)
    same = apart.min(1) < 1.0
    nearest = apart.argmin(1)
    assert same.mean() > 0.5
    difference = np.abs(found.disparity - expected.disparity[nearest])[same]
    assert np.median(difference) < 0.1
    assert abs(found.row_offset) < 0.3
    # The same features with raw coordinates are where the raw image has them.
    frontend.configure(dataclasses.replace(config, coordinates="raw"))
    frontend.reset()
    raw = frontend(*images, calibration)
    np.testing.assert_array_equal(raw.disparity, found.disparity)
    places = cameras[0].rectify(raw.left.keypoints)
    assert np.abs(places - found.left.keypoints).max() < 0.01
    assert np.abs(raw.left.keypoints - found.left.keypoints).max() > 10


def test_a_raw_calibration_of_another_size_is_refused(euroc):
    cameras, images = euroc
    calibration = RawStereoCalibration.from_cameras(*cameras)
    frontend = StereoFrontend(FrontendConfig(backend="torch"))
    with pytest.raises(ValueError, match="calibration is for 752x480 images, not 752x400"):
        frontend(*(image[:400] for image in images), calibration)
