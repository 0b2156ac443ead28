"""Reads calibration files: those of ROS's camera_calibration, and EuRoC's sensor.yaml."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import yaml

from kp_frontend.calibration import FISHEYE_MODELS, distortion
from kp_training.evaluation.frames import Camera

SUFFIXES = (".yaml", ".yml")


def find_yaml(folder: Path, name: str) -> Path | None:
    """`name`.yaml or `name`.yml in a folder; None if there is none."""
    return next((p for s in SUFFIXES if (p := folder / f"{name}{s}").is_file()), None)


def read_yaml(path: Path) -> Any:
    """Read a YAML file. OpenCV's header and tags, which are not standard YAML, are accepted.

    Raises:
        ValueError: it cannot be parsed.
    """
    try:
        text = path.read_text()
        if text.startswith("%YAML:1.0"):
            text = text.partition("\n")[2]
        return yaml.safe_load(text.replace("!!opencv-matrix", ""))
    except (yaml.YAMLError, UnicodeError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} cannot be read as YAML: {reason}") from error


def ros_cameras(folder: Path) -> tuple[Camera, Camera] | None:
    """The cameras of left.yaml and right.yaml (or .yml) in a folder; None if it has neither.

    Raises:
        ValueError: one of the two files is missing or invalid.
    """
    paths = [find_yaml(folder, side) for side in ("left", "right")]
    if paths == [None, None]:
        return None
    for side, other, path in zip(("left", "right"), ("right", "left"), paths, strict=True):
        if path is None:
            raise ValueError(
                f"{folder} has a calibration of the {other} camera, but {side}.yaml is missing"
            )
    left, right = (ros_camera(path) for path in paths if path)
    return left, right


def ros_camera(path: Path) -> Camera:
    """Read a camera from a file of ROS's camera_calibration.

    A file without distortion_model is read as plumb_bob, as by ROS's own parser.

    Raises:
        ValueError: the file is not a camera calibration, or its values are invalid.
    """
    text = read_yaml(path)
    try:
        if not isinstance(text, dict):
            raise ValueError("it has no keys")
        size = _number(text, "image_width"), _number(text, "image_height")
        k, r, p = (
            _matrix(text, name, shape)
            for name, shape in (
                ("camera_matrix", (3, 3)),
                ("rectification_matrix", (3, 3)),
                ("projection_matrix", (3, 4)),
            )
        )
        model, d = distortion(
            str(text.get("distortion_model") or ""), _values(text, "distortion_coefficients")
        )
    except ValueError as error:
        raise ValueError(f"{path} is not a ROS camera calibration: {error}") from error
    return Camera(*size, k, np.array(d), r, p, model)


def _number(text: dict, name: str) -> int:
    value = text.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise ValueError(f"{name} is {'missing' if value is None else 'not a number of pixels'}")
    return value


def _values(text: dict, name: str) -> np.ndarray:
    """The numbers of an entry: a list, or `data` of a matrix."""
    entry = text.get(name)
    if entry is None:
        raise ValueError(f"{name} is missing")
    try:
        values = np.array(entry["data"] if isinstance(entry, dict) else entry, np.float64)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{name} has no numbers") from error
    if not np.isfinite(values).all():
        raise ValueError(f"{name} has non-finite numbers")
    return values.reshape(-1)


def _matrix(text: dict, name: str, shape: tuple[int, int]) -> np.ndarray:
    values = _values(text, name)
    if values.size != shape[0] * shape[1]:
        raise ValueError(f"{name} has {values.size} numbers instead of {shape[0] * shape[1]}")
    return values.reshape(shape)


def euroc_cameras(left: Path, right: Path) -> tuple[Camera, Camera, np.ndarray]:
    """Raw cameras of two sensor.yaml files, with the rectification of OpenCV's stereoRectify.

    Returns:
        Both cameras, and the pose (4, 4) of the left camera in the body frame.

    Raises:
        ValueError: a file is not a calibration, or the two belong to different rigs.
    """
    found = [_euroc_sensor(path) for path in (left, right)]
    (k0, d0, model, size, pose0), (k1, d1, other, other_size, pose1) = found
    fisheye = model in FISHEYE_MODELS
    if fisheye != (other in FISHEYE_MODELS) or size != other_size:
        raise ValueError(f"{left} and {right} differ in image size or lens model")
    right_from_left = np.linalg.inv(pose1) @ pose0
    turn, way = right_from_left[:3, :3], right_from_left[:3, 3]
    try:
        if fisheye:
            r0, r1, p0, p1, _ = cv2.fisheye.stereoRectify(
                k0, d0, k1, d1, size, turn, way, cv2.CALIB_ZERO_DISPARITY
            )
        else:
            r0, r1, p0, p1, *_ = cv2.stereoRectify(
                k0, d0, k1, d1, size, turn, way, flags=cv2.CALIB_ZERO_DISPARITY, alpha=0
            )
    except cv2.error as error:
        raise ValueError(f"{left} and {right} cannot be rectified: {error.err}") from error
    if not np.isfinite([*p0.ravel(), *p1.ravel(), *r0.ravel(), *r1.ravel()]).all():
        raise ValueError(f"{left} and {right} cannot be rectified")
    return Camera(*size, k0, d0, r0, p0, model), Camera(*size, k1, d1, r1, p1, other), pose0


def _euroc_sensor(
    path: Path,
) -> tuple[np.ndarray, np.ndarray, str, tuple[int, int], np.ndarray]:
    """Matrix (3, 3), coefficients, model, size and body-frame pose (4, 4) of a sensor.yaml."""
    text = read_yaml(path)
    try:
        if not isinstance(text, dict):
            raise ValueError("it has no keys")
        pose = _matrix(text, "T_BS", (4, 4))
        if abs(np.linalg.det(pose)) < 1e-9:
            raise ValueError("T_BS is not a pose")
        fx, fy, cx, cy = _matrix(text, "intrinsics", (1, 4))[0]
        width, height = _matrix(text, "resolution", (1, 2))[0].astype(int)
        if min(width, height, fx, fy) <= 0:
            raise ValueError("focal lengths and resolution must be positive")
        model, d = distortion(
            str(text.get("distortion_model") or ""), _values(text, "distortion_coefficients")
        )
    except ValueError as error:
        raise ValueError(f"{path} is not a sensor.yaml of EuRoC: {error}") from error
    k = np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1]])
    return k, np.array(d), model, (int(width), int(height)), pose
