"""What `kp uncertainty` fits to: matches with true disparity, keypoints with true positions."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
from rich.progress import track
from torch import Tensor

from kp_frontend.config import FrontendConfig
from kp_frontend.frontend import StereoFrontend
from kp_frontend.matching import mutual_nearest
from kp_frontend.pipeline import PipelineResults, StereoPipeline
from kp_frontend.refinement import LIMIT, refine_disparity
from kp_frontend.uncertainty import Uncertainty
from kp_training.evaluation.image_pairs import load_usable
from kp_training.evaluation.layouts import find_scenes
from kp_training.evaluation.metrics import DISPARITY_TOLERANCE, at_pixels
from kp_training.evaluation.scenes import Scene, load_scene
from kp_training.image_files import evenly, read_image
from kp_training.labels import find_images, image_seed

KEYPOINTS = 2048
# Scenes of Middlebury in other light or exposure and at other sizes: ArtL_Q is Art.
VARIANT = re.compile(r"(?<=[a-z0-9])[ELP]?(_.*)?$")
IMAGES = 100  # from which views are made
CORNERS = 0.1  # by which the corners of a made view move, as a share of its sides
NOISE = 4.0  # largest standard deviation of the noise of made views, grey levels
LEAST_SIDE = 64  # of an image from which views are made, pixels
LIKE = 3.0  # a pair of keypoints is one point if they lie closer, pixels


class Recorder(Uncertainty):
    """An uncalibrated model that keeps the measurements it is asked about."""

    matches: Tensor
    points: Tensor

    def of_matches(self, measurements: Tensor) -> tuple[Tensor, Tensor]:
        """Keep them."""
        self.matches = measurements
        return super().of_matches(measurements)

    def of_points(self, measurements: Tensor) -> Tensor:
        """Keep them."""
        self.points = measurements
        return super().of_points(measurements)


class PointPairs(NamedTuple):
    """Keypoints of two views that show the same points, N rows.

    `points` (N, 2, P) measurements of the first and the second keypoint; `error` (N, 2) of the
    second one against where the first one is in the second view, pixels; `scale` (N,) how much
    larger the second view shows the neighbourhood.
    """

    points: Tensor
    error: Tensor
    scale: Tensor


@dataclass(frozen=True)
class Sample:
    """The candidate matches of a scene, N rows, all with true disparity.

    `matches` (N, M) and `points` (N, 2, P) measurements, left and right; `error` (N,) of the
    refined disparity; `point_error` (N, 2) how far the right keypoint lies from what the left one
    shows, by the refinement, pixels; `precise`: the truth is known to fractions of a pixel.
    """

    name: str
    matches: Tensor
    points: Tensor
    error: Tensor
    point_error: Tensor
    precise: bool

    @property
    def right(self) -> Tensor:
        """Which matches are right, (N,) bool."""
        return self.error.abs() <= DISPARITY_TOLERANCE

    @property
    def point_pairs(self) -> PointPairs:
        """The keypoints of the right matches whose registration converged."""
        used = self.right & (self.point_error.abs().amax(1) <= LIMIT)
        return PointPairs(self.points[used], self.point_error[used], torch.ones(int(used.sum())))

    @property
    def group(self) -> str:
        """The scene that this is, whatever its size and light."""
        return VARIANT.sub("", self.name)


def run_front_end(
    model: str, left: np.ndarray, right: np.ndarray
) -> tuple[PipelineResults, Recorder]:
    """Results of the front end on one pair of images (H, W) uint8 without limits on the
    confidence, and what it measured."""
    height, width = left.shape
    config = FrontendConfig(
        model=model,
        backend="torch",
        max_keypoints=min(KEYPOINTS, height * width // 16),
        max_motion=0.0,
        min_confidence=0.0,
    )
    recorder = Recorder()
    frontend = StereoFrontend(config, recorder)
    pipeline = StereoPipeline(frontend.network, config, height, width, uncertainty=recorder).eval()
    inputs = (np.stack([left, right]), *frontend.blank_inputs(width))
    with torch.inference_mode():
        outputs = pipeline(*(torch.from_numpy(array) for array in inputs))
    found = PipelineResults.of([tensor.numpy() for tensor in outputs], raw=False, tracked=False)
    return found, recorder


def collect(model: str, scene: Scene, precise: bool) -> Sample:
    """Run the front end on a scene and keep what it measures of each candidate match."""
    found, recorder = run_front_end(model, scene.left, scene.right)
    left = np.flatnonzero(found.right_row >= 0)
    right = found.right_row[left]
    truth = at_pixels(scene.disparity, found.xy[0][left])
    known = np.isfinite(truth)
    left, right, truth = left[known], right[known], truth[known]
    again = refine_disparity(
        torch.from_numpy(scene.left).float(),
        torch.from_numpy(scene.right).float(),
        torch.from_numpy(found.xy[0][left]),
        torch.from_numpy(found.xy[1][right]),
    )
    return Sample(
        scene.name,
        recorder.matches[left],
        torch.stack([recorder.points[0][left], recorder.points[1][right]], 1),
        torch.from_numpy(found.disparity[left] - truth),
        again.shift,
        precise,
    )


def collect_scenes(
    model: str, folder: Path, left_out: Sequence[str] = ()
) -> tuple[list[Sample], list[str]]:
    """Samples of the scenes of a folder, and what was left out and why.

    Args:
        left_out: names of scenes that are not used.

    Raises:
        ValueError: no scenes, or fewer than two that can be used.
    """
    found, skipped = find_scenes(folder)
    unknown = set(left_out) - {files.name for files in found}
    if unknown:
        raise ValueError(f"no scene {', '.join(sorted(unknown))} in {folder}")
    samples = []
    chosen = [files for files in found if files.name not in left_out]
    for files, scene in load_usable(chosen, load_scene, skipped, "scenes"):
        sample = collect(model, scene, files.truth.suffix == ".pfm")
        if 0 < int(sample.right.sum()) < len(sample.right):
            samples.append(sample)
        else:
            skipped.append(f"{files.name}: its matches are all right or all wrong")
    if len({sample.group for sample in samples}) < 2:
        raise ValueError(f"{folder} has fewer than two scenes that can be used")
    return samples, skipped


def made_view(
    image: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """An image (H, W) uint8 and a view of it under a random homography, both with noise.

    Returns:
        Both images, and the homography (3, 3) from pixels of the first to pixels of the second.
    """
    height, width = image.shape
    corners = np.array([[0, 0], [width, 0], [width, height], [0, height]], np.float32)
    moved = corners + rng.uniform(-CORNERS, CORNERS, (4, 2)) * (width, height)
    homography = cv2.getPerspectiveTransform(corners, moved.astype(np.float32))
    view = cv2.warpPerspective(image, homography, (width, height), flags=cv2.INTER_LINEAR)
    noise = rng.uniform(0, NOISE)
    first, second = (
        (i + rng.normal(0, noise, i.shape)).round().clip(0, 255).astype(np.uint8)
        for i in (image, view)
    )
    return first, second, homography


def collect_made(model: str, image: np.ndarray, rng: np.random.Generator) -> PointPairs:
    """Keypoints of an image (H, W) uint8 and of a made view, paired by their descriptors."""
    first, second, homography = made_view(image, rng)
    found, recorder = run_front_end(model, first, second)
    descriptors = torch.from_numpy(found.descriptors)
    allowed = torch.from_numpy(found.scores > 0)
    partner, _ = mutual_nearest(
        descriptors[0] @ descriptors[1].T, allowed[0][:, None] & allowed[1], torch.tensor(-1.0)
    )
    row = np.flatnonzero(partner.numpy() >= 0)
    column = partner.numpy()[row]
    xy = found.xy[0][row].astype(np.float64)
    there = cv2.perspectiveTransform(xy[None], homography)[0] if len(xy) else xy
    error = found.xy[1][column] - there
    same = (np.abs(error) <= LIKE).all(1)
    # Determinant of the derivative of the homography: how areas grow.
    depth = xy @ homography[2, :2] + homography[2, 2]
    scale = np.sqrt(np.linalg.det(homography) / depth**3)
    points = torch.stack([recorder.points[0][row], recorder.points[1][column]], 1)
    return PointPairs(
        points[same], torch.from_numpy(error[same]), torch.from_numpy(scale[same]).float()
    )


def collect_made_pairs(
    model: str, folder: Path, most: int = IMAGES
) -> tuple[list[PointPairs], list[str]]:
    """Keypoints of made views of the images of a folder, and what was left out and why.

    Args:
        folder: images, searched in all depths.
        most: number of images, spread evenly over the folder.

    Raises:
        ValueError: no image that can be used.
    """
    made, skipped = [], []
    for path in track(evenly(find_images(folder), most), "images"):
        image = read_image(path)
        if image is None or min(image.shape) < LEAST_SIDE:
            skipped.append(f"{path}: unreadable, or smaller than {LEAST_SIDE} pixels")
            continue
        made.append(collect_made(model, image, np.random.default_rng(image_seed(folder, path))))
    if not any(len(pairs.error) for pairs in made):
        raise ValueError(f"no image below {folder} can be used")
    return made, skipped
