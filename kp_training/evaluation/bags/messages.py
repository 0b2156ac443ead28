"""Messages of bags as arrays: images, cameras, disparity maps, poses."""

from __future__ import annotations

import numpy as np
from scipy.spatial.transform import Rotation

from kp_frontend.calibration import Window
from kp_training.evaluation.bags.reader import Message
from kp_training.evaluation.frames import Camera


def camera_of(info: Message) -> Camera:
    """The camera of a CameraInfo."""
    k, r, p = (np.asarray(v, np.float64) for v in (info.k, info.r, info.p))
    return Camera(
        info.width, info.height, k.reshape(3, 3), np.asarray(info.d, np.float64),
        r.reshape(3, 3), p.reshape(3, 4), info.distortion_model, _window(info),
    )  # fmt: skip


def _window(info: Message) -> Window:
    roi = info.roi
    return Window(roi.x_offset, roi.y_offset, roi.width, roi.height, info.binning_x, info.binning_y)


def true_disparity(message: Message) -> np.ndarray:
    """Disparity map (H, W) float32 of a DisparityImage, NaN where unknown.

    Unknown is what is not finite or outside `min_disparity` to `max_disparity`.

    Raises:
        ValueError: its image is no 32FC1.
    """
    image = message.image
    if image.encoding != "32FC1":
        raise ValueError(f"a disparity image is {image.encoding!r}, not 32FC1")
    data = np.frombuffer(image.data, np.uint8)
    row = 4 * image.width
    if not row or image.step < row or len(data) != image.step * image.height:
        raise ValueError(
            f"a disparity image of {image.width}x{image.height} with a step of {image.step} does "
            f"not fit {len(data)} bytes"
        )
    rows = np.ascontiguousarray(data.reshape(image.height, image.step)[:, :row])
    disparity = rows.view(">f4" if image.is_bigendian else "<f4").astype(np.float32)
    known = np.isfinite(disparity)
    if message.max_disparity > message.min_disparity:
        known &= (disparity >= message.min_disparity) & (disparity <= message.max_disparity)
    disparity[~known] = np.nan
    return disparity


# The axes of a camera, z forward, in a body's, x forward and z up (REP 103).
BODY_FROM_OPTICAL = np.array([[0, 0, 1, 0], [-1, 0, 0, 0], [0, -1, 0, 0], [0, 0, 0, 1]], float)
AXES = ("optical", "body")


def pose_of(message: Message, axes: str = "optical") -> np.ndarray:
    """Pose (4, 4), z forward, of a message of one of the types `POSES`.

    Args:
        axes: what the pose is that of: a camera, z forward (`optical`), or a body, x forward, whose
            camera looks ahead (`body`).

    Raises:
        ValueError: its quaternion is no rotation, or it is not finite.
    """
    if hasattr(message, "transform"):
        at, turn = message.transform.translation, message.transform.rotation
    else:
        inner = getattr(message.pose, "pose", message.pose)  # with covariance, or plain
        at, turn = inner.position, inner.orientation
    pose = np.eye(4)
    pose[:3, :3] = Rotation.from_quat([turn.x, turn.y, turn.z, turn.w]).as_matrix()
    pose[:3, 3] = at.x, at.y, at.z
    if not np.isfinite(pose).all():
        raise ValueError("a pose is not finite")
    return pose @ BODY_FROM_OPTICAL if axes == "body" else pose
