"""What `kp bench` compares the front end with: ORB, SIFT and a network of SuperPoint's shape."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from torch import Tensor, nn

from kp_frontend.tools.gpu_figures import GpuFigures

Call = Callable[[], object]
FEATURES = 2048  # number of features of ORB and SIFT; the front end uses max_keypoints
RATIO = 0.7  # ratio test for SIFT with FLANN (Lowe, 2004)


@dataclass
class Subject:
    """A method to time: stages by name; `total` is from images to matches."""

    method: str
    backend: str
    precision: str
    stages: dict[str, Call]
    roofline_ms: float | None = None  # shortest time of the network by the machine's peaks
    gpu: GpuFigures | None = None


class SuperPointShape(nn.Sequential):
    """An untrained network with SuperPoint's layers (DeTone et al., 2018), to compare its cost.

    The outputs of the heads are concatenated: (B, 65 + 256, H/8, W/8).
    """

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        last = 1
        for i, width in enumerate((64, 64, 128, 128)):
            for _ in range(2):
                layers += [nn.Conv2d(last, width, 3, padding=1), nn.ReLU(inplace=True)]
                last = width
            if i < 3:
                layers.append(nn.MaxPool2d(2))
        self.encoder = nn.Sequential(*layers)
        self.heads = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(last, 256, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(256, out, 1)
            )
            for out in (65, 256)
        )

    def forward(self, image: Tensor) -> Tensor:
        """Maps float images (B, 1, H, W) to the concatenated outputs of the heads."""
        x = self.encoder(image / 255)
        return torch.cat([head(x) for head in self.heads], 1)


def orb(images: np.ndarray) -> Subject:
    """OpenCV's ORB with cross-checked brute-force matching."""
    detector = cv2.ORB_create(nfeatures=FEATURES)
    matcher = cv2.BFMatcher(cv2.NORM_HAMMING, crossCheck=True)

    def total() -> object:
        left, right = (detector.detectAndCompute(image, None)[1] for image in images)
        return matcher.match(left, right)

    return Subject("orb", "opencv", "uint8", {"total": total})


def sift(images: np.ndarray) -> Subject:
    """OpenCV's SIFT with FLANN and ratio test."""
    detector = cv2.SIFT_create(nfeatures=FEATURES)
    matcher = cv2.FlannBasedMatcher({"algorithm": 1, "trees": 5}, {"checks": 50})

    def total() -> object:
        left, right = (detector.detectAndCompute(image, None)[1] for image in images)
        two = matcher.knnMatch(left, right, k=2)
        return [m for m, n in two if m.distance < RATIO * n.distance]

    return Subject("sift", "opencv", "fp32", {"total": total})


def superpoint_shape(images: np.ndarray) -> Subject:
    """The SuperPoint-shaped network alone, in plain torch."""
    network = SuperPointShape().eval()
    batch = torch.from_numpy(images)[:, None].float()

    def total() -> object:
        with torch.inference_mode():
            return network(batch)

    return Subject("superpoint_shape", "torch", "fp32", {"total": total})


PEERS: dict[str, Callable[[np.ndarray], Subject]] = {
    "orb": orb,
    "sift": sift,
    "superpoint_shape": superpoint_shape,
}
