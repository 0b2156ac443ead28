"""A made world for tests: a textured wall straight ahead, past which a stereo camera slides."""

from __future__ import annotations

from dataclasses import replace

import cv2
import numpy as np

from kp_frontend.features import Features, StereoFeatures
from kp_training.evaluation.frames import Camera, Sequence, StereoFrame
from kp_training.evaluation.sequences import FIRST_STAMP

WIDTH, HEIGHT = 192, 144
DISPARITY, STEP = 12, 4  # pixels: everywhere, and by which the image moves from frame to frame
FOCAL, BASELINE = 200.0, 0.12
DEPTH = FOCAL * BASELINE / DISPARITY  # 2 m
STEP_METRES = STEP * DEPTH / FOCAL
INTERVAL = 100_000_000


def texture(width: int, seed: int = 3) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(size=(HEIGHT, width)).astype(np.float32)
    smooth = cv2.GaussianBlur(noise, (0, 0), 2.0)
    return cv2.normalize(smooth, None, 0, 255, cv2.NORM_MINMAX).astype(np.uint8)


def cameras() -> tuple[Camera, Camera]:
    made = []
    for shift in (0.0, -FOCAL * BASELINE):
        p = np.array([[FOCAL, 0, WIDTH / 2, shift], [0, FOCAL, HEIGHT / 2, 0], [0, 0, 1, 0]])
        made.append(Camera.rectified(WIDTH, HEIGHT, p.astype(float)))
    return tuple(made)


def wall(count: int) -> list[StereoFrame]:
    """Frames with true disparity (unknown at the left edge) and pose."""
    image = texture(WIDTH + DISPARITY + STEP * count)
    frames = []
    for i in range(count):
        start = STEP * i
        disparity = np.full((HEIGHT, WIDTH), DISPARITY, np.float32)
        disparity[:, :DISPARITY] = np.nan
        pose = np.eye(4)
        pose[0, 3] = STEP_METRES * i
        frames.append(
            StereoFrame(
                FIRST_STAMP + i * INTERVAL,
                np.ascontiguousarray(image[:, start : start + WIDTH]),
                np.ascontiguousarray(image[:, start + DISPARITY : start + DISPARITY + WIDTH]),
                cameras(),
                disparity,
                pose,
            )
        )
    return frames


def cropped(frame: StereoFrame, width: int = 96, height: int = 72) -> StereoFrame:
    """The upper left part of a frame, with cameras of its own."""
    parts = {name: np.ascontiguousarray(getattr(frame, name)[:height, :width])
             for name in ("left", "right", "disparity")}  # fmt: skip
    cameras = []
    for camera in frame.cameras:
        p = camera.p.copy()
        p[:2, 2] = width / 2, height / 2
        cameras.append(Camera.rectified(width, height, p))
    return replace(frame, cameras=tuple(cameras), **parts)


def sequence(frames: list[StereoFrame], raw: bool = False) -> Sequence:
    return Sequence("made", iter(frames), len(frames), raw)


def grid_features(
    disparity: float = 10.0, shift: tuple[float, float] = (0.0, 0.0), first_track: int = 1
) -> StereoFeatures:
    """Features on a grid of a 192x144 image, every left keypoint matched, each with its own
    descriptor; `shift` moves all of them."""
    x, y = np.meshgrid(np.arange(24, 176, 12), np.arange(12, 136, 12))
    left = np.column_stack([x.ravel(), y.ravel()]).astype(np.float32) + np.float32(shift)
    count = len(left)
    right = left - np.float32([disparity, 0])
    own = np.eye(count, dtype=np.float32)
    tracks = np.arange(first_track, first_track + count, dtype=np.uint32)
    index = np.arange(count, dtype=np.uint32)
    ones = np.ones(count, np.float32)
    lengths = np.ones(count, np.uint16)
    sides = (Features(xy, ones, own, tracks, lengths, ones) for xy in (left, right))
    return StereoFeatures(
        WIDTH, HEIGHT, *sides,
        index, index, np.full(count, disparity, np.float32), ones, ones, ones,
        np.full((count, 3), np.nan, np.float32), 0.0, None,
    )  # fmt: skip
