"""Training samples: a source image, its keypoints and the geometry of two views of it.

A sample depends only on the seed and its position in the run. A run that is resumed at step N
therefore sees the same samples as an uninterrupted one, and several processes see the same samples
as one. Workers only decode images and draw numbers; views.py warps pixels on the training device.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
from torch.utils.data import Dataset

from kp_training.config import TrainConfig, ViewConfig
from kp_training.labels import Labels, read_grey
from kp_training.pairs import find_pairs, right_disparity
from kp_training.photometric import NOISE, draw_disturbances


class PairDataset(Dataset):
    """`samples` samples; sample i is drawn with the generator of (seed, i).

    A sample is a dict of numpy arrays:

    - `canvas` (2, C, C) uint8: for each view, the source image, cropped and padded with the grey
      level `fill`
    - `keypoints` (2, K, 4) float32: x, y, repeat rate, response on the canvas; unused rows are NaN
    - `to_view` (2, 3, 3) float32: homographies from canvas to view
    - `relief` (2, 5, 7) float32: coarse map of displacements along the row that is added to each
      view, 0 for homographic pairs
    - `blocky` bool: the map has steps (depth edges) instead of being smooth
    - `noise` (2, NOISE) float32: uniform numbers for the photometric changes
    - `disturbances` (2, 6) float32: blur, gain, noise and compression of each view, see
      `draw_disturbances`

    Both views usually show one image. If the folder has stereo pairs with disparity, they can also
    show the two images of a pair, and a sample also has:

    - `real` bool: the views show the images of a pair
    - `disparity` (C, C) float32: at the pixels of the right canvas, 0 where it is unknown or where
      both views show one image

    An image that can no longer be read is named once on stderr, and the next one of the order is
    taken in its place.
    """

    def __init__(
        self, labels: Labels, indices: np.ndarray, samples: int, seed: int, config: ViewConfig
    ) -> None:
        self.labels, self.indices, self.samples = labels, indices, samples
        self.seed, self.config = seed, config
        self._epoch, self._order = -1, indices
        self._unreadable: set[int] = set()
        index = {Path(path).as_posix(): i for i, path in enumerate(labels.paths)}
        self._pairs = {
            index[pair.left]: (index[pair.right], pair)
            for pair in find_pairs(labels.folder)
            if pair.disparity and pair.left in index and pair.right in index
        }

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        rng = np.random.default_rng([self.seed, i])
        epoch, position = divmod(i, len(self.indices))
        if epoch != self._epoch:
            shuffle = np.random.default_rng([self.seed, epoch, 1 << 20])
            self._epoch, self._order = epoch, shuffle.permutation(self.indices)
        sources, images, disparity = self._load(position, rng)
        real = disparity is not None
        height, width = (min(n, self.config.canvas) for n in images[0].shape)
        corner = [
            int(rng.integers(images[0].shape[k] - n + 1)) for k, n in ((1, width), (0, height))
        ]
        # Pixels beyond the image have a random grey level, often black or white, so that the
        # network learns to find nothing there.
        fill = np.uint8(np.clip(rng.integers(-64, 320), 0, 255))
        mirrored = not real and rng.random() < 0.5  # a mirrored pair would swap the cameras
        cuts = [
            self._cut(image, self.labels.of_image(source), corner, mirrored, fill)
            for image, source in zip(images, sources, strict=True)
        ]
        to_view, relief = self._geometry(height, width, rng, real)
        sample: dict[str, np.ndarray] = {
            "canvas": np.stack([cuts[0][0], cuts[-1][0]]),
            "fill": np.array(fill, np.float32),
            "keypoints": np.stack([cuts[0][1], cuts[-1][1]]),
            "to_view": to_view,
            "relief": relief,
            "blocky": np.array(rng.random() < 0.5),
            "noise": rng.random((2, NOISE), np.float32),
            "disturbances": draw_disturbances(self.config, rng),
        }
        if self._pairs:
            sample["real"] = np.array(real)
            sample["disparity"] = np.zeros((self.config.canvas,) * 2, np.float32)
        if disparity is not None:
            x, y = corner
            sample["disparity"][:height, :width] = disparity[y : y + height, x : x + width]
        return sample

    def _load(
        self, position: int, rng: np.random.Generator
    ) -> tuple[list[int], list[np.ndarray], np.ndarray | None]:
        """The first image from a position of the order on that can be read.

        Returns:
            Its index, or those of a real pair; the images; of a pair the disparity.

        Raises:
            ValueError: no image can be read any more.
        """
        reason: ValueError | None = None
        for step in range(len(self._order)):
            index = int(self._order[(position + step) % len(self._order)])
            if index in self._unreadable:
                continue
            real = index in self._pairs and rng.random() < self.config.real_share
            sources = [index, self._pairs[index][0]] if real else [index]
            try:
                images = [self._read(source) for source in sources]
                pair = self._pairs[index][1] if real else None
                disparity = right_disparity(self.labels.folder, pair) if pair else None
                return sources, images, disparity
            except ValueError as error:
                reason = error
                self._unreadable.add(index)
                print(f"skipped: {error} ({len(self._unreadable)} so far)", file=sys.stderr)
        raise ValueError(f"no training image can be read any more: {reason}")

    def _read(self, index: int) -> np.ndarray:
        path = self.labels.folder / self.labels.paths[index]
        image = read_grey(path)
        if image is None:
            raise ValueError(f"{path} can no longer be read")
        return image

    def _cut(
        self,
        image: np.ndarray,
        keypoints: np.ndarray,
        corner: list[int],
        mirrored: bool,
        fill: np.uint8,
    ) -> tuple[np.ndarray, np.ndarray]:
        """The canvas that starts at a corner (x, y) of an image, and its keypoints, (K, 4)."""
        (x, y), size = corner, self.config.canvas
        image = image[y : y + size, x : x + size]
        height, width = image.shape
        keypoints = keypoints - np.array([x, y, 0, 0], np.float32)
        inside = (keypoints[:, :2] >= 0).all(1) & (keypoints[:, :2] < [width, height]).all(1)
        keypoints = keypoints[inside][: self.config.most_keypoints]
        if mirrored:
            image = image[:, ::-1]
            keypoints = keypoints * np.array([-1, 1, 1, 1], np.float32)
            keypoints += np.array([width - 1, 0, 0, 0], np.float32)
        canvas = np.full((size, size), fill, np.uint8)
        canvas[:height, :width] = image
        points = np.full((self.config.most_keypoints, 4), np.nan, np.float32)
        points[: len(keypoints)] = keypoints
        return canvas, points

    def _geometry(
        self, height: int, width: int, rng: np.random.Generator, real: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        """Homographies of both views, and the relief. A real pair is only scaled and shifted."""
        c = self.config
        low, high = c.zoom
        high = max(low, min(high, 1.05 * width / c.width, 1.05 * height / c.height))
        zoom = rng.uniform(low, high)
        # Corners of the base view, at a random position where it fits on the canvas.
        half = np.array([c.width, c.height]) * zoom / 2
        room = np.maximum(np.array([width, height]) / 2 - half, 0)
        centre = np.array([width, height]) / 2 + rng.uniform(-room, room)
        square = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]], np.float64)
        target = np.float32((square + 1) / 2 * [c.width, c.height] - 0.5)
        stereo = not real and rng.random() < c.stereo_share
        to_view = []
        for view in range(2):
            corners = square * half
            if view == 1 and not stereo and not real:
                angle = np.deg2rad(rng.uniform(-c.rotation, c.rotation))
                turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
                corners = corners @ turn * c.scale ** rng.uniform(-1, 1)
                corners += rng.uniform(-1, 1, 2) * c.shift * 2 * half
                corners += rng.uniform(-1, 1, (4, 2)) * c.perspective * half
            elif view == 1 and stereo:  # a slightly misaligned rig
                corners += rng.uniform(-1, 1, (4, 2)) * [3.0, 0.7]
            to_view.append(cv2.getPerspectiveTransform(np.float32(corners + centre - 0.5), target))
        relief = np.zeros((2, 5, 7), np.float32)
        if stereo:
            mean = rng.uniform(0, c.disparity)
            relief[1] = mean + rng.uniform(0, c.relief) * rng.uniform(-1, 1, (5, 7))
        return np.array(to_view, np.float32), relief


def micro_batches(
    config: TrainConfig, start: int, steps: int, rank: int = 0, world: int = 1
) -> Iterator[range]:
    """Sample indices of each micro-batch of a run, from step `start` on, for process `rank`.

    The micro-batches of a step are distributed over the `world` processes in turn, so that one
    process and several see the same ones.
    """
    for step in range(start, steps):
        for micro in range(rank, config.batch // config.micro, world):
            first = step * config.batch + micro * config.micro
            yield range(first, first + config.micro)
