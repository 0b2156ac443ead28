"""Second-round labels: keypoints that a trained network detects under random views.

This is homographic adaptation (DeTone et al., "SuperPoint", 2018). The network's heatmap is
averaged over random homographies and lighting changes of each image, and the peaks of the average
become the labels. Their `repeat` is the share of views in which the network detects a keypoint at
the same place, so training can filter these labels like SIFT's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from kp_frontend.detection import (
    block_peaks,
    block_side,
    heatmap,
    refine,
    suppress,
    top_keypoints,
)
from kp_frontend.network import (
    STRIDE,
    KeypointNetwork,
    channels_last,
    load_for_inference,
    weights_path,
)
from kp_training.classics import random_homography
from kp_training.labels import Labels, image_seed, label_in_parts, read_grey
from kp_training.photometric import NOISE, photometric
from kp_training.views import native_bf16, sample, transform

BORDER = 6  # pixels; responses nearer to the border of a view are ignored
SAME = 1.5  # pixels; keypoints within this distance are the same
NMS_RADIUS = 3  # pixels
LOWEST_PEAK = 0.005  # lowest value of a labelled peak of the averaged heatmap


def random_views(height: int, width: int, count: int, rng: np.random.Generator) -> Tensor:
    """Homographies from image to view, (count, 3, 3) float32; the first is the identity."""
    matrices = [np.eye(3)]
    for _ in range(count - 1):
        scale = np.exp(rng.uniform(-0.3, 0.2))
        matrices.append(random_homography(height, width, 0.1, scale, rng))
    return torch.from_numpy(np.array(matrices, np.float32))


@torch.inference_mode()
def adapted_keypoints(
    network: KeypointNetwork, image: Tensor, views: int, most: int, seed: int
) -> np.ndarray:
    """Keypoints of one image, (N, 4) float32: x, y, averaged heat, repeat, strongest first.

    Args:
        image: (H, W) float in 0..255, H and W multiples of 16.
        views: number of random views, including the image itself.
        most: maximum N.
    """
    height, width = image.shape
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)  # for the sensor noise
    to_view = random_views(height, width, views, rng).to(image.device)
    rows, columns = torch.meshgrid(
        *(torch.arange(n, device=image.device, dtype=torch.float32) for n in (height, width)),
        indexing="ij",
    )
    pixels = torch.stack([columns, rows], -1).reshape(1, -1, 2).expand(views, -1, -1)
    source = transform(torch.linalg.inv(to_view), pixels)
    # Pixels beyond the image repeat its border: an edge there would be labelled.
    seen = sample(image.expand(views, 1, -1, -1), source, "border")
    seen = seen.reshape(views, 1, height, width)
    seen[1:] = photometric(
        seen[1:], torch.from_numpy(rng.random((views - 1, NOISE), np.float32)).to(image.device)
    )
    with torch.autocast(image.device.type, torch.bfloat16, native_bf16(image.device.type)):
        logits = network(seen.contiguous(memory_format=torch.channels_last))[0]
    heat = heatmap(logits)
    place = transform(to_view, pixels)
    back = sample(heat[:, None], place).reshape(views, height, width)
    inside = _inside(place, height, width).reshape(views, height, width)
    count = inside.sum(0)
    mean = (back * inside).sum(0) / count.clamp(min=1)
    mean = torch.where(count >= views // 3, mean, 0.0)[None]
    most = min(most, height * width // 16)
    scores, peak = _strongest(mean, most)
    xy = refine(mean, peak)
    # Keypoints that are found again: those of each view, mapped back to the image.
    view_scores, view_peaks = _strongest(heat, most)
    view_xy = transform(torch.linalg.inv(to_view), refine(heat, view_peaks))
    view_xy = torch.where(view_scores[..., None] > LOWEST_PEAK, view_xy, 1e6)
    everywhere = xy.expand(views, -1, -1)
    again = torch.cdist(everywhere, view_xy).amin(2) <= SAME
    visible = _inside(transform(to_view, everywhere), height, width)
    repeat = (again & visible).sum(0) / visible.sum(0).clamp(min=1)
    table = torch.cat([xy[0], scores[0, :, None], repeat[:, None]], 1).cpu().numpy()
    return table[table[:, 2] > LOWEST_PEAK]


def _strongest(heat: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Scores and pixels of the strongest peaks of heatmaps (B, H, W)."""
    side = block_side(NMS_RADIUS)
    return top_keypoints(suppress(block_peaks(heat, side), NMS_RADIUS), side, count)


def _inside(points: Tensor, height: int, width: int) -> Tensor:
    """Which points (B, N, 2) lie in a view but not in its border, (B, N) bool."""
    size = points.new_tensor([width, height])
    return ((points >= BORDER) & (points <= size - 1 - BORDER)).all(-1)


def relabel_folder(
    folder: Path,
    out: Path,
    model: str | Path,
    device: str = "cpu",
    views: int = 12,
    most: int = 2000,
    every: int = 1,
) -> tuple[Labels, list[Path]]:
    """Label the images below a folder with the keypoints of a network; see `label_folder`.

    Raises:
        ValueError: there is no readable image, or the weights cannot be used.
    """
    network = channels_last(load_for_inference(model).to(device))

    def rows_of(paths: list[Path]) -> Iterator[np.ndarray | None]:
        for path in paths:
            image = read_grey(path)
            if image is None:
                yield None
                continue
            grey = torch.from_numpy(image).to(device).float()
            height, width = grey.shape
            padding = (0, -width % STRIDE, 0, -height % STRIDE)
            padded = F.pad(grey[None], padding, mode="replicate")[0]
            seed = image_seed(folder, path)
            found = adapted_keypoints(network, padded, views, most, seed)
            found = found[(found[:, 0] < width) & (found[:, 1] < height)]
            size = np.full(len(found), 8.0)  # nominal: networks have no size
            yield np.column_stack([found[:, :3], size, found[:, 3]])

    digest = hashlib.sha256(weights_path(model).read_bytes()).hexdigest()
    settings: dict[str, str | int] = {"model": digest, "most": most, "views": views}
    return label_in_parts(folder, out, rows_of, settings, every)
