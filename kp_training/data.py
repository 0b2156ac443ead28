"""Training samples: a source image, its keypoints and the geometry of two views of it.

A sample is a function of the seed and its position in the run alone, so a run that is resumed at
step N sees exactly what it would have seen without the stop, and so do several processes together
that share the work of one. Workers only decode and draw numbers;
pixels are warped on the training device (views.py).
"""

from __future__ import annotations

from collections.abc import Iterator

import cv2
import numpy as np
from torch.utils.data import Dataset

from kp_training.config import TrainConfig, ViewConfig
from kp_training.labels import Labels
from kp_training.views import NOISE


class PairDataset(Dataset):
    """`steps * batch` samples; sample i is drawn with the generator of (seed, i).

    A sample is a dict of numpy arrays: `canvas` (1, C, C) uint8, the source image cut and padded
    with the grey level `fill`; `keypoints` (K, 3) float32, x, y, repeat on the canvas, NaN where
    there are fewer;
    `to_view` (2, 3, 3) float32, homographies canvas -> view; `relief` (2, 5, 7) float32, a coarse
    map of displacements along rows that is added to each view (0 for homographic pairs); `blocky`,
    whether that map has steps (depth edges) or is smooth; `noise` (2, NOISE) float32, uniform
    numbers for the photometric changes.
    """

    def __init__(
        self, labels: Labels, indices: np.ndarray, samples: int, seed: int, config: ViewConfig
    ) -> None:
        self.labels, self.indices, self.samples = labels, indices, samples
        self.seed, self.config = seed, config
        self._epoch, self._order = -1, indices

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        rng = np.random.default_rng([self.seed, i])
        epoch, position = divmod(i, len(self.indices))
        if epoch != self._epoch:
            shuffle = np.random.default_rng([self.seed, epoch, 1 << 20])
            self._epoch, self._order = epoch, shuffle.permutation(self.indices)
        index = int(self._order[position])
        image = cv2.imread(str(self.labels.folder / self.labels.paths[index]), cv2.IMREAD_GRAYSCALE)
        canvas, keypoints = self._cut(image, self.labels.of_image(index), rng)
        height, width = canvas.shape
        # What lies beyond the image is flat, of any brightness: nothing is to be seen there.
        fill = np.uint8(rng.integers(256))
        padded = np.full((1, self.config.canvas, self.config.canvas), fill, np.uint8)
        padded[0, :height, :width] = canvas
        points = np.full((self.config.most_keypoints, 4), np.nan, np.float32)
        points[: len(keypoints)] = keypoints[: len(points)]
        to_view, relief = self._geometry(height, width, rng)
        return {
            "canvas": padded,
            "fill": np.float32(fill),
            "keypoints": points,
            "to_view": to_view,
            "relief": relief,
            "blocky": np.bool_(rng.random() < 0.5),
            "noise": rng.random((2, NOISE), np.float32),
        }

    def _cut(
        self, image: np.ndarray, keypoints: np.ndarray, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """A canvas-sized part of an image somewhere, with its keypoints, maybe mirrored."""
        size = self.config.canvas
        x = rng.integers(max(image.shape[1] - size, 0) + 1)
        y = rng.integers(max(image.shape[0] - size, 0) + 1)
        image = image[y : y + size, x : x + size]
        keypoints = keypoints - np.float32([x, y, 0, 0])
        inside = (keypoints[:, :2] >= 0).all(1)
        inside &= (keypoints[:, 0] < image.shape[1]) & (keypoints[:, 1] < image.shape[0])
        keypoints = keypoints[inside]
        if rng.random() < 0.5:
            image = image[:, ::-1]
            keypoints = keypoints * np.float32([-1, 1, 1, 1])
            keypoints[:, 0] += image.shape[1] - 1
        return image, keypoints

    def _geometry(
        self, height: int, width: int, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        c = self.config
        low, high = c.zoom
        high = max(low, min(high, 1.05 * width / c.width, 1.05 * height / c.height))
        zoom = rng.uniform(low, high)
        # Corners of the base view on the canvas, at a place where it fits.
        half = np.array([c.width, c.height]) * zoom / 2
        room = np.maximum(np.array([width, height]) / 2 - half, 0)
        centre = np.array([width, height]) / 2 + rng.uniform(-room, room)
        square = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]], np.float64)
        target = np.float32((square + 1) / 2 * [c.width, c.height] - 0.5)
        stereo = rng.random() < c.stereo_share
        to_view = []
        for view in range(2):
            corners = square * half
            if view == 1 and not stereo:
                angle = np.deg2rad(rng.uniform(-c.rotation, c.rotation))
                turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
                corners = corners @ turn * c.scale ** rng.uniform(-1, 1)
                corners += rng.uniform(-1, 1, 2) * c.shift * 2 * half
                corners += rng.uniform(-1, 1, (4, 2)) * c.perspective * half
            elif view == 1:  # a rig whose rows are off a little
                corners += rng.uniform(-1, 1, (4, 2)) * [3.0, 0.7]
            to_view.append(cv2.getPerspectiveTransform(np.float32(corners + centre - 0.5), target))
        relief = np.zeros((2, 5, 7), np.float32)
        if stereo:
            mean = rng.uniform(0, c.disparity)
            relief[1] = mean + rng.uniform(0, c.relief) * rng.uniform(-1, 1, (5, 7))
        return np.float32(to_view), relief


def micro_batches(
    config: TrainConfig, start: int, steps: int, rank: int = 0, world: int = 1
) -> Iterator[range]:
    """Samples of each micro-batch of a run from step `start` on, as one of `world` processes.

    A step's micro-batches are dealt to the processes in turn, so that one process and several see
    the same ones.
    """
    for step in range(start, steps):
        for micro in range(rank, config.batch // config.micro, world):
            first = step * config.batch + micro * config.micro
            yield range(first, first + config.micro)
