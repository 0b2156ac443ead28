"""Reads stereo sequences frame by frame, in the layouts of Middlebury, KITTI, EuRoC or a folder."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from scipy.spatial.transform import Rotation

from kp_training.evaluation.calibration_files import euroc_cameras, find_yaml, ros_cameras
from kp_training.evaluation.frames import Camera, Sequence, StereoFrame
from kp_training.evaluation.layouts import SceneFiles, find_scenes
from kp_training.evaluation.poses import Poses
from kp_training.evaluation.scenes import load_scene, read_grey
from kp_training.image_files import is_image, other_images
from kp_training.text_files import read_text

FIRST_STAMP = 1_000_000_000  # where a layout has no times; a stamp of 0 means "not set" in ROS
LAST_STAMP = (2**31 - 1) * 10**9  # what fits into a ROS message
KITTI_IMAGES = (("image_0", "image_1"), ("image_2", "image_3"), ("image_l", "image_r"))


def open_sequence(kind: str, folder: Path, rate: float = 10.0) -> Sequence:
    """Open a sequence in one of the layouts of `LAYOUTS`.

    Args:
        kind: name of the layout.
        folder: folder of the sequence.
        rate: pairs per second, if the layout has no times.

    Raises:
        ValueError: the folder does not have this layout.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder")
    return LAYOUTS[kind](folder, round(1e9 / rate))


def guess_layout(folder: Path) -> str:
    """The layout of a folder with a trajectory: kitti or euroc.

    Raises:
        ValueError: the folder has neither layout.
    """
    if (folder / "mav0").is_dir() or (folder / "cam0" / "sensor.yaml").is_file():
        return "euroc"
    if (folder / "calib.txt").is_file() and any((folder / a).is_dir() for a, _ in KITTI_IMAGES):
        return "kitti"
    raise ValueError(f"{folder} has neither KITTI's layout (calib.txt, image_0) nor EuRoC's (mav0)")


def _pairs(sequence: Sequence, files: list[tuple[int, Path, Path]]) -> Iterator[StereoFrame]:
    """Read the images of all (stamp, left, right). Unusable pairs are skipped and listed."""
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
    """Names of the images that exist in both folders, sorted."""
    names = [{path.name for path in side.iterdir() if is_image(path)} for side in (left, right)]
    sequence.left_out += other_images([p for side in (left, right) for p in side.iterdir()])
    sequence.left_out += [f"{name}: only on one side" for name in sorted(names[0] ^ names[1])]
    both = sorted(names[0] & names[1])
    if not both:
        raise ValueError(f"no image name is in both {left} and {right}")
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
    """Cameras of a scene from its calib.txt (millimetres); None if there is none for this size."""
    path = files.left.parent / "calib.txt"
    if not path.is_file():
        return None
    lines = (line.partition("=") for line in read_text(path).splitlines() if "=" in line)
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
        raise ValueError(f"{path} is not a calibration of Middlebury: {error}") from error
    return cameras[0], cameras[1]


def _kitti(folder: Path, interval: int) -> Sequence:
    sides = next((s for s in KITTI_IMAGES if all((folder / n).is_dir() for n in s)), None)
    if sides is None or not (folder / "calib.txt").is_file():
        raise ValueError(
            f"{folder} is not in KITTI's layout: calib.txt, image_0 and image_1 (or _2 and _3)"
        )
    sequence = Sequence("kitti", iter(()), 0)
    left, right = (folder / name for name in sides)
    names = _names(sequence, left, right)
    projections = _kitti_matrices(folder / "calib.txt")
    first = 2 if sides[0] == "image_2" else 0
    if len(projections) < first + 2:
        raise ValueError(f"{folder / 'calib.txt'} has only {len(projections)} projection matrices")
    poses = _kitti_matrices(folder / "poses.txt") if (folder / "poses.txt").is_file() else None
    if poses is not None and len(poses) != len(names):
        raise ValueError(f"{folder} has {len(names)} pairs, but {len(poses)} poses")
    times: np.ndarray = FIRST_STAMP + np.arange(len(names)) * interval
    if (folder / "times.txt").is_file():
        seconds = _table(folder / "times.txt")[:, 0].astype(np.float64)
        if len(seconds) != len(names):
            raise ValueError(f"{folder} has {len(names)} pairs, but {len(seconds)} times")
        times = FIRST_STAMP + np.rint(seconds * 1e9).astype(np.int64)
    of_stamp = dict(zip(times.tolist(), poses if poses is not None else [], strict=False))

    def frames() -> Iterator[StereoFrame]:
        files = [(int(t), left / n, right / n) for t, n in zip(times, names, strict=True)]
        for frame in _pairs(sequence, files):
            height, width = frame.left.shape
            one, other = (
                Camera.rectified(width, height, p) for p in projections[first : first + 2]
            )
            pose = of_stamp.get(frame.stamp)
            yield replace(
                frame, cameras=(one, other), pose=None if pose is None else homogeneous(pose)
            )

    sequence.frames, sequence.length = frames(), len(names)
    return sequence


def homogeneous(matrix: np.ndarray) -> np.ndarray:
    """Convert a pose (3, 4) to (4, 4)."""
    return np.vstack([matrix, [0, 0, 0, 1]])


def _kitti_matrices(path: Path) -> np.ndarray:
    """Read the 3x4 matrices of a file, one per line, with or without a label `P0:`.

    Raises:
        ValueError: a line does not have 12 numbers.
    """
    rows = [line.split(":")[-1].split() for line in read_text(path).splitlines() if line.strip()]
    rows = [row for row in rows if len(row) != 9]  # other lines of KITTI raw are rotations
    try:
        matrices = np.array(rows, np.float64).reshape(-1, 3, 4)
    except ValueError as error:
        raise ValueError(f"{path}: each line must have the 12 numbers of a matrix") from error
    if not np.isfinite(matrices).all():
        raise ValueError(f"{path} has numbers that are not finite")
    return matrices


def _euroc(folder: Path, interval: int) -> Sequence:
    root = folder / "mav0" if (folder / "mav0").is_dir() else folder
    calibrations = []
    for side in ("cam0", "cam1"):
        sensor = find_yaml(root / side, "sensor") or root / side / "sensor.yaml"
        for path in (sensor, root / side / "data.csv"):
            if not path.is_file():
                raise ValueError(f"{folder} has not EuRoC's layout: {path} is missing")
        calibrations.append(sensor or root / side / "sensor.yaml")
    sequence = Sequence("euroc", iter(()), 0, raw=True)
    files = [dict(_csv_rows(root / side / "data.csv")) for side in ("cam0", "cam1")]
    sequence.left_out += [f"{t}: only on one side" for t in sorted(files[0].keys() ^ files[1])]
    stamps = sorted(files[0].keys() & files[1])
    one, other, body_from_left = euroc_cameras(*calibrations)
    poses = _euroc_poses(root, body_from_left, one.r)

    def frames() -> Iterator[StereoFrame]:
        left, right = root / "cam0" / "data", root / "cam1" / "data"
        paths = [(t, left / files[0][t], right / files[1][t]) for t in stamps]
        for frame in _pairs(sequence, paths):
            yield replace(frame, cameras=(one, other), pose=poses.at(frame.stamp), raw=True)

    sequence.frames, sequence.length = frames(), len(stamps)
    return sequence


def _csv_rows(path: Path) -> Iterator[tuple[int, str]]:
    """Time stamp and file name of each line."""
    for line in read_text(path).splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        stamp, _, name = line.partition(",")
        try:
            nanoseconds, name = int(stamp), name.partition(",")[0].strip()
        except ValueError as error:
            raise ValueError(f"{path}: {line[:80]!r} is no time stamp and file name") from error
        if not name or not 0 <= nanoseconds <= LAST_STAMP:
            raise ValueError(f"{path}: {line[:80]!r} is no time stamp in nanoseconds and file name")
        yield nanoseconds, name


def _euroc_poses(root: Path, body_from_left: np.ndarray, r: np.ndarray) -> Poses:
    """Poses of the rectified left camera."""
    path = root / "state_groundtruth_estimate0" / "data.csv"
    if not path.is_file():
        return Poses({})
    rows = _table(path, delimiter=",", columns=8)
    left_from_rectified = np.eye(4)
    left_from_rectified[:3, :3] = r.T
    poses = {}
    for stamp, x, y, z, qw, qx, qy, qz in rows:
        world_from_body = np.eye(4)
        turn = [float(q) for q in (qx, qy, qz, qw)]
        if not any(turn) or not 0 <= stamp <= LAST_STAMP:
            raise ValueError(f"{path}: the pose at {stamp:.0f} has no stamp or no rotation")
        world_from_body[:3, :3] = Rotation.from_quat(turn).as_matrix()
        world_from_body[:3, 3] = x, y, z
        poses[int(stamp)] = world_from_body @ body_from_left @ left_from_rectified
    return Poses(poses)


def _table(path: Path, delimiter: str | None = None, columns: int = 1) -> np.ndarray:
    """Read a table of numbers, (N, columns); further columns are ignored.

    Raises:
        ValueError: the file is not such a table, or has non-finite numbers.
    """
    try:
        rows = np.loadtxt(
            path, delimiter=delimiter, comments="#", usecols=range(columns), dtype=np.longdouble,
            ndmin=2,
        )  # fmt: skip
    except (ValueError, IndexError, UnicodeError) as error:
        raise ValueError(f"{path} cannot be read as a table of numbers: {error}") from error
    if not np.isfinite(rows).all():
        raise ValueError(f"{path} has non-finite numbers")
    return rows.reshape(-1, columns)


def _folder(folder: Path, interval: int) -> Sequence:
    left, right = folder / "left", folder / "right"
    if not (left.is_dir() and right.is_dir()):
        raise ValueError(f"{folder} has no subfolders left and right")
    sequence = Sequence("folder", iter(()), 0)
    names = _names(sequence, left, right)
    cameras = ros_cameras(folder)
    if cameras is None:
        sequence.left_out.append("no calibration: left.yaml and right.yaml are missing")

    def frames() -> Iterator[StereoFrame]:
        stamps = (FIRST_STAMP + i * interval for i in range(len(names)))
        files = [(t, left / n, right / n) for t, n in zip(stamps, names, strict=True)]
        for frame in _pairs(sequence, files):
            for camera, image in zip(cameras or (), (frame.left, frame.right), strict=False):
                camera.for_image(image)  # raises if they differ in size
            yield replace(frame, cameras=cameras)

    sequence.frames, sequence.length = frames(), len(names)
    return sequence


LAYOUTS = {"middlebury": _middlebury, "kitti": _kitti, "euroc": _euroc, "folder": _folder}
