"""Methods to evaluate: networks as the front end runs them, and OpenCV's classics."""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np
import torch

from kp_frontend.frontend import FrontendConfig, StereoPipeline
from kp_frontend.network import load_network

# A method: grey uint8 image (H, W) -> keypoints (N, 2) float, descriptors (N, D) float32 for which
# a smaller Euclidean distance means a better match.
Method = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]

NOTHING = (np.zeros((0, 2), np.float32), np.zeros((0, 1), np.float32))  # no keypoints


def network_method(model: str, most: int) -> Method:
    """A network's keypoints as the front end detects them, by released name or weights file."""
    network = load_network(model).to(memory_format=torch.channels_last)

    @torch.inference_mode()
    def method(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        config = FrontendConfig(max_keypoints=min(most, image.size // 16))
        found = StereoPipeline(network, config, *image.shape).features(
            torch.from_numpy(image)[None, None].float()
        )
        xy, scores, descriptors = (tensor[0].numpy() for tensor in found)
        return xy[scores > config.score_threshold], descriptors[scores > config.score_threshold]

    return method


def sift_method(most: int) -> Method:
    """OpenCV's SIFT with its default thresholds."""
    sift = cv2.SIFT_create(nfeatures=most)

    def method(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        keypoints, descriptors = sift.detectAndCompute(image, None)
        if descriptors is None:
            return NOTHING
        return cv2.KeyPoint.convert(keypoints), descriptors

    return method


def orb_method(most: int) -> Method:
    """OpenCV's ORB; its bits become 0 and 1, of which the squared distance is Hamming's."""
    orb = cv2.ORB_create(nfeatures=most)

    def method(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        keypoints, descriptors = orb.detectAndCompute(image, None)
        if descriptors is None:
            return NOTHING
        return cv2.KeyPoint.convert(keypoints), np.unpackbits(descriptors, axis=1).astype(
            np.float32
        )

    return method


CLASSICS: dict[str, Callable[[int], Method]] = {"sift": sift_method, "orb": orb_method}
