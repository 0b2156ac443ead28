"""Stereo sequences from disk, frame by frame: Middlebury, KITTI, EuRoC, or a plain folder."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import yaml
from scipy.spatial.transform import Rotation

from kp_training.evaluation.frames import Camera, Sequence, StereoFrame
from kp_training.evaluation.layouts import SceneFiles, find_scenes
from kp_training.evaluation.scenes import load_scene, read_grey

FIRST_STAMP = 1_000_000_000  # where a layout has no times; a stamp of 0 means "not set" in ROS
KITTI_IMAGES = (("image_0", "image_1"), ("image_2", "image_3"), ("image_l", "image_r"))
SUFFIXES = (".png", ".jpg", ".jpeg", ".pgm", ".ppm", ".bmp")


def open_sequence(kind: str, folder: Path, rate: float = 10.0) -> Sequence:
    """A sequence in one of the layouts of `LAYOUTS`.

    Args:
        rate: pairs a second, where the layout has no times.

    Raises:
        ValueError: the folder does not have this layout.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder")
    return LAYOUTS[kind](folder, round(1e9 / rate))


def guess_layout(folder: Path) -> str:
    """Which layout a folder with a trajectory has: kitti or euroc.

    Raises:
        ValueError: neither.
    """
    if (folder / "mav0").is_dir() or (folder / "cam0" / "sensor.yaml").is_file():
        return "euroc"
    if (folder / "calib.txt").is_file() and any((folder / a).is_dir() for a, _ in KITTI_IMAGES):
        return "kitti"
    raise ValueError(f"{folder} has neither KITTI's layout (calib.txt, image_0) nor EuRoC's (mav0)")


def _pairs(sequence: Sequence, files: list[tuple[int, Path, Path]]) -> Iterator[StereoFrame]:
    """Images of all (stamp, left, right); a pair that cannot be used is named and left out."""
    for stamp, left, right in files:
        try:
            images = read_grey(left), read_grey(right)
        except ValueError as error:
            sequence.left_out.append(f"{left.name}: {error}")
            continue
        if images[0].shape != images[1].shape:
            sequence.left_out.append(f"{left}: the right image has another size")
            continue
        yield StereoFrame(stamp, *images)


def _names(sequence: Sequence, left: Path, right: Path) -> list[str]:
    """Names of the images that are in both folders, sorted."""
    names = [
        {path.name for path in side.iterdir() if path.suffix.lower() in SUFFIXES}
        for side in (left, right)
    ]
    sequence.left_out += [f"{name}: only on one side" for name in sorted(names[0] ^ names[1])]
    both = sorted(names[0] & names[1])
    if not both:
        raise ValueError(f"no image is both in {left} and in {right}")
    return both


def _middlebury(folder: Path, interval: int) -> Sequence:
    found, skipped = find_scenes(folder)
    sequence = Sequence("middlebury", iter(()), len(found), left_out=skipped)

    def frames() -> Iterator[StereoFrame]:
        stamp = FIRST_STAMP
        for files in found:
            try:
                scene = load_scene(files)
            except ValueError as error:
                sequence.left_out.append(f"{files.name}: {error}")
                continue
            cameras = _middlebury_cameras(files, scene.left.shape)
            yield StereoFrame(
                stamp, scene.left, scene.right, cameras, scene.disparity, camera=scene.name
            )
            stamp += interval

    sequence.frames = frames()
    return sequence


def _middlebury_cameras(files: SceneFiles, shape: tuple[int, int]) -> tuple[Camera, Camera] | None:
    """Cameras of a scene from its calib.txt (millimetres); None without one for this size."""
    path = files.left.parent / "calib.txt"
    if not path.is_file():
        return None
    lines = (line.partition("=") for line in path.read_text().splitlines() if "=" in line)
    values = {name.strip(): value.strip() for name, _, value in lines}
    height, width = shape
    try:
        if (int(values["width"]), int(values["height"])) != (width, height):
            return None
        baseline = float(values["baseline"]) / 1000
        cameras = []
        for name, shift in (("cam0", 0.0), ("cam1", baseline)):
            k = np.array([r.split() for r in values[name].strip("[] ").split(";")], np.float64)
            p = np.column_stack([k, [-k[0, 0] * shift, 0, 0]])
            cameras.append(Camera.rectified(width, height, p))
    except (KeyError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as Middlebury's calibration: {error}") from error
    return tuple(cameras)


def _kitti(folder: Path, interval: int) -> Sequence:
    sides = next((s for s in KITTI_IMAGES if all((folder / n).is_dir() for n in s)), None)
    if sides is None or not (folder / "calib.txt").is_file():
        raise ValueError(
            f"{folder} has not KITTI's layout: calib.txt, and image_0 and image_1 (or _2 and _3)"
        )
    sequence = Sequence("kitti", iter(()), 0)
    left, right = (folder / name for name in sides)
    names = _names(sequence, left, right)
    projections = _kitti_matrices(folder / "calib.txt")
    first = 2 if sides[0] == "image_2" else 0
    if len(projections) < first + 2:
        raise ValueError(f"{folder / 'calib.txt'} has {len(projections)} projection matrices")
    poses = _kitti_matrices(folder / "poses.txt") if (folder / "poses.txt").is_file() else None
    if poses is not None and len(poses) != len(names):
        raise ValueError(f"{folder} has {len(names)} pairs, but {len(poses)} poses")
    times = FIRST_STAMP + np.arange(len(names)) * interval
    if (folder / "times.txt").is_file():
        seconds = np.loadtxt(folder / "times.txt", ndmin=1)
        if len(seconds) != len(names):
            raise ValueError(f"{folder} has {len(names)} pairs, but {len(seconds)} times")
        times = FIRST_STAMP + np.rint(seconds * 1e9).astype(np.int64)
    of_stamp = dict(zip(times.tolist(), poses if poses is not None else [], strict=False))

    def frames() -> Iterator[StereoFrame]:
        files = [(int(t), left / n, right / n) for t, n in zip(times, names, strict=True)]
        for frame in _pairs(sequence, files):
            height, width = frame.left.shape
            cameras = tuple(
                Camera.rectified(width, height, p) for p in projections[first : first + 2]
            )
            pose = of_stamp.get(frame.stamp)
            yield replace(frame, cameras=cameras, pose=None if pose is None else homogeneous(pose))

    sequence.frames, sequence.length = frames(), len(names)
    return sequence


def homogeneous(matrix: np.ndarray) -> np.ndarray:
    """A pose (3, 4) as (4, 4)."""
    return np.vstack([matrix, [0, 0, 0, 1]])


def _kitti_matrices(path: Path) -> np.ndarray:
    """The 3x4 matrices of a file, one a line, with or without a label `P0:`.

    Raises:
        ValueError: a line has not 12 numbers.
    """
    rows = [line.split(":")[-1].split() for line in path.read_text().splitlines() if line.strip()]
    rows = [row for row in rows if len(row) != 9]  # KITTI raw's other lines: rotations
    try:
        return np.array(rows, np.float64).reshape(-1, 3, 4)
    except ValueError as error:
        raise ValueError(f"{path}: each line must have the 12 numbers of a matrix") from error


def _euroc(folder: Path, interval: int) -> Sequence:
    root = folder / "mav0" if (folder / "mav0").is_dir() else folder
    for side in ("cam0", "cam1"):
        for name in ("sensor.yaml", "data.csv"):
            if not (root / side / name).is_file():
                raise ValueError(f"{folder} has not EuRoC's layout: {root / side / name} misses")
    sequence = Sequence("euroc", iter(()), 0, raw=True)
    files = [dict(_csv_rows(root / side / "data.csv")) for side in ("cam0", "cam1")]
    sequence.left_out += [f"{t}: only on one side" for t in sorted(files[0].keys() ^ files[1])]
    stamps = sorted(files[0].keys() & files[1])
    sensors = [_euroc_sensor(root / side / "sensor.yaml") for side in ("cam0", "cam1")]
    cameras = _euroc_cameras(*sensors)
    body_from_left = np.array(sensors[0]["T_BS"]["data"], np.float64).reshape(4, 4)
    poses = _euroc_poses(root, body_from_left, cameras[0].r)

    def frames() -> Iterator[StereoFrame]:
        left, right = root / "cam0" / "data", root / "cam1" / "data"
        paths = [(t, left / files[0][t], right / files[1][t]) for t in stamps]
        for frame in _pairs(sequence, paths):
            yield replace(frame, cameras=cameras, pose=poses.get(frame.stamp), raw=True)

    sequence.frames, sequence.length = frames(), len(stamps)
    return sequence


def _csv_rows(path: Path) -> Iterator[tuple[int, str]]:
    """Stamp and file name of each line."""
    with path.open(newline="") as file:
        for row in csv.reader(file):
            if row and not row[0].startswith("#"):
                try:
                    yield int(row[0]), row[1].strip()
                except (ValueError, IndexError) as error:
                    raise ValueError(f"{path}: {','.join(row)!r} is no stamp and file") from error


def _euroc_sensor(path: Path) -> dict:
    """A sensor.yaml; OpenCV's header line is no YAML that others read."""
    try:
        sensor = yaml.safe_load(path.read_text().replace("%YAML:1.0", "", 1))
        wanted = ("T_BS", "resolution", "intrinsics", "distortion_coefficients")
        if missing := [name for name in wanted if name not in sensor]:
            raise ValueError(f"it has no {', '.join(missing)}")
        if sensor.get("distortion_model", "radial-tangential") != "radial-tangential":
            raise ValueError(f"distortion model {sensor['distortion_model']!r} is not known")
    except (yaml.YAMLError, TypeError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as EuRoC's sensor: {error}") from error
    return sensor


def _euroc_cameras(left: dict, right: dict) -> tuple[Camera, Camera]:
    """Raw cameras with the rectification that `cv2.stereoRectify` gives them."""
    k, d = [], []
    for sensor in (left, right):
        fx, fy, cx, cy = sensor["intrinsics"]
        k.append(np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1]], np.float64))
        d.append(np.array([*sensor["distortion_coefficients"], 0.0], np.float64))
    size = tuple(left["resolution"])
    poses = [np.array(s["T_BS"]["data"], np.float64).reshape(4, 4) for s in (left, right)]
    right_from_left = np.linalg.inv(poses[1]) @ poses[0]
    r1, r2, p1, p2, *_ = cv2.stereoRectify(
        k[0], d[0], k[1], d[1], size, right_from_left[:3, :3], right_from_left[:3, 3],
        flags=cv2.CALIB_ZERO_DISPARITY, alpha=0,
    )  # fmt: skip
    return Camera(*size, k[0], d[0], r1, p1), Camera(*size, k[1], d[1], r2, p2)


def _euroc_poses(root: Path, body_from_left: np.ndarray, r: np.ndarray) -> dict[int, np.ndarray]:
    """Poses of the rectified left camera, by the stamp of the nearest truth within 5 ms."""
    path = root / "state_groundtruth_estimate0" / "data.csv"
    if not path.is_file():
        return {}
    rows = np.loadtxt(path, delimiter=",", comments="#", usecols=range(8), dtype=np.longdouble)
    truth = rows[:, 0].astype(np.int64)
    left_from_rectified = np.eye(4)
    left_from_rectified[:3, :3] = r.T
    poses = {}
    for stamp, _ in _csv_rows(root / "cam0" / "data.csv"):
        i = int(np.abs(truth - stamp).argmin())
        if abs(truth[i] - stamp) <= 5_000_000:
            _, x, y, z, qw, qx, qy, qz = rows[i].astype(np.float64)
            world_from_body = np.eye(4)
            world_from_body[:3, :3] = Rotation.from_quat([qx, qy, qz, qw]).as_matrix()
            world_from_body[:3, 3] = x, y, z
            poses[stamp] = world_from_body @ body_from_left @ left_from_rectified
    return poses


def _folder(folder: Path, interval: int) -> Sequence:
    left, right = folder / "left", folder / "right"
    if not (left.is_dir() and right.is_dir()):
        raise ValueError(f"{folder} has no folders left and right")
    sequence = Sequence("folder", iter(()), 0)
    names = _names(sequence, left, right)
    paths = [folder / f"{side}.yaml" for side in ("left", "right")]
    cameras = tuple(_ros_camera(p) for p in paths) if all(p.is_file() for p in paths) else None

    def frames() -> Iterator[StereoFrame]:
        stamps = (FIRST_STAMP + i * interval for i in range(len(names)))
        files = [(t, left / n, right / n) for t, n in zip(stamps, names, strict=True)]
        for frame in _pairs(sequence, files):
            if cameras and frame.left.shape != (cameras[0].height, cameras[0].width):
                raise ValueError(f"{paths[0]} is for another size than the images have")
            yield replace(frame, cameras=cameras)

    sequence.frames, sequence.length = frames(), len(names)
    return sequence


def _ros_camera(path: Path) -> Camera:
    """A camera from the YAML file of ROS's camera_calibration."""
    try:
        text = yaml.safe_load(path.read_text())
        arrays = [
            np.array(text[name]["data"], np.float64)
            for name in ("camera_matrix", "distortion_coefficients", "rectification_matrix",
                         "projection_matrix")
        ]  # fmt: skip
        k, d, r, p = arrays[0].reshape(3, 3), arrays[1], arrays[2].reshape(3, 3), arrays[3]
        size = int(text["image_width"]), int(text["image_height"])
        return Camera(*size, k, d, r, p.reshape(3, 4), str(text["distortion_model"]))
    except (yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a ROS camera calibration: {error}") from error


LAYOUTS = {"middlebury": _middlebury, "kitti": _kitti, "euroc": _euroc, "folder": _folder}
