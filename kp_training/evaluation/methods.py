"""Methods by name: networks as the front end runs them, OpenCV's methods, and user-defined ones."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch.nn import functional as F

from kp_frontend.config import FrontendConfig
from kp_frontend.detection import heatmap
from kp_frontend.features import Features, StereoFeatures
from kp_frontend.frontend import StereoFrontend
from kp_frontend.network import channels_last, load_for_inference, weights_path
from kp_frontend.pipeline import StereoPipeline
from kp_frontend.quantization import quantized, require_ranges
from kp_training.evaluation.external import external_method
from kp_training.evaluation.method import NOTHING, Found, Method, Published

RATIO = 0.7  # ratio test for SIFT with FLANN, as in the reference study


class Engine(NamedTuple):
    """Backend and precision of the networks, as in `FrontendConfig`."""

    backend: str = "torch"
    precision: str = "auto"


REFERENCE = Engine()


class NetworkMethod(Method):
    """A network by released name or weights file, in any backend and precision.

    The reference (torch) detects in one image at a time. Other engines are built for a pair, so
    they run as they do on a robot, matching included, and an image is charged half of their time.
    """

    def __init__(self, model: str, most: int, engine: Engine = REFERENCE) -> None:
        super().__init__(model, self._detect)
        self._model, self._most, self._engine = model, most, engine
        network = load_for_inference(model)
        if engine.precision == "int8":
            require_ranges(network, model)
            network = quantized(network)
        self._network = channels_last(network)
        self._frontend = cache(StereoFrontend)
        self.engines: set[str] = set()  # backends and precisions that ran

    def _config(self, height: int, width: int) -> FrontendConfig:
        return FrontendConfig(
            model=self._model,
            backend=self._engine.backend,
            precision=self._engine.precision,
            max_keypoints=min(self._most, height * width // 16),
            max_motion=0.0,  # no tracks: scenes are unrelated
        )

    def _run(self, images: tuple[np.ndarray, np.ndarray]) -> StereoFeatures:
        frontend = self._frontend(self._config(*images[0].shape))
        features = frontend(*images)
        self.engines.add(frontend.backend)
        return features

    def detect_timed(self, images: tuple[np.ndarray, np.ndarray]) -> tuple[Found, Found, float]:
        """See `Method.detect_timed`; an engine takes both images at once."""
        if self._engine.backend == "torch" or images[0].shape != images[1].shape:
            return super().detect_timed(images)
        self._run(images)  # builds the engine
        begin = time.perf_counter()
        features = self._run(images)
        took = 1e3 * (time.perf_counter() - begin) / 2
        return _found(features.left), _found(features.right), took

    @torch.inference_mode()
    def _detect(self, image: np.ndarray) -> Found:
        if self._engine.backend != "torch":
            return _found(self._run((image, image)).left)
        config = self._config(*image.shape)
        found = StereoPipeline(self._network, config, *image.shape).features(
            torch.from_numpy(image)[None, None].float()
        )
        xy, scores, descriptors = (tensor[0].numpy() for tensor in found)
        self.engines.add(f"torch {self._engine.precision.replace('auto', 'fp32')}")
        good = scores > config.score_threshold
        return Found(xy[good], descriptors[good])

    def publish(
        self, images: tuple[np.ndarray, np.ndarray], left: Found, right: Found
    ) -> Published:
        """The matches that `StereoFrontend` publishes; `left` and `right` are not used."""
        features = self._run(images)
        return Published(
            features.left.keypoints[features.left_index],
            features.disparity,
            features.disparity_sigma,
            features.confidence,
        )

    @torch.inference_mode()
    def dense(self, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Heatmap (H, W), and unit descriptors (D, h, w) at the centres of 8x8 cells."""
        height, width = image.shape
        pipeline = StereoPipeline(self._network, self._config(height, width), height, width)
        grey = F.pad(torch.from_numpy(image)[None, None].float(), pipeline.pad, mode="replicate")
        logits, features = self._network(grey)
        y, x = (torch.arange(3.5, n, 8.0) for n in grey.shape[2:])
        centres = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)
        described = self._network.describe(features, centres.reshape(1, -1, 2))
        return (
            heatmap(logits)[0, :height, :width].numpy(),
            described[0].T.reshape(-1, len(y), len(x)).numpy(),
        )


def _found(features: Features) -> Found:
    return Found(features.keypoints, features.descriptors)


def _classic(detector: cv2.Feature2D) -> Callable[[np.ndarray], Found]:
    """Keypoints of an OpenCV detector, sorted by response."""

    def detect(image: np.ndarray) -> Found:
        keypoints, descriptors = detector.detectAndCompute(image, None)
        if descriptors is None:
            return NOTHING
        order = np.argsort([-k.response for k in keypoints], kind="stable")
        return Found(cv2.KeyPoint.convert(keypoints)[order], descriptors[order])

    return detect


def sift_method(most: int) -> Method:
    """OpenCV's SIFT with default thresholds, matched by mutual nearest neighbours."""
    return Method("sift", _classic(cv2.SIFT_create(nfeatures=most)))


def sift_flann_method(most: int) -> Method:
    """SIFT matched left to right by FLANN with ratio test (Lowe, 2004), as in the study."""
    matcher = cv2.FlannBasedMatcher({"algorithm": 1, "trees": 5}, {"checks": 50})

    def match(left: Found, right: Found) -> np.ndarray:
        if len(right.xy) < 2 or not len(left.xy):
            return np.zeros((0, 2), int)
        pairs = matcher.knnMatch(left.descriptors, right.descriptors, k=2)
        good = [(m.queryIdx, m.trainIdx) for m, n in pairs if m.distance < RATIO * n.distance]
        return np.array(good, int).reshape(-1, 2)

    return Method("sift_flann", _classic(cv2.SIFT_create(nfeatures=most)), match)


def rootsift_method(most: int) -> Method:
    """SIFT with the square root of L1-normalised descriptors (Arandjelovic, Zisserman, 2012)."""
    sift = _classic(cv2.SIFT_create(nfeatures=most))

    def detect(image: np.ndarray) -> Found:
        xy, descriptors = sift(image)
        total = np.maximum(descriptors.sum(1, keepdims=True), 1e-6)
        return Found(xy, np.sqrt(descriptors / total))

    return Method("rootsift", detect)


def orb_method(most: int) -> Method:
    """OpenCV's ORB. Bits become -1 and 1; the squared distance is 4 times the Hamming distance."""
    orb = _classic(cv2.ORB_create(nfeatures=most))

    def detect(image: np.ndarray) -> Found:
        found = orb(image)
        if found is NOTHING:
            return NOTHING
        bits = np.unpackbits(found.descriptors, axis=1)
        return Found(found.xy, bits.astype(np.float32) * 2 - 1)

    return Method("orb", detect)


CLASSICS: dict[str, Callable[[int], Method]] = {
    "sift": sift_method,
    "sift_flann": sift_flann_method,
    "rootsift": rootsift_method,
    "orb": orb_method,
}


def make_method(name: str, most: int, engine: Engine = REFERENCE) -> Method:
    """Create a method by name.

    Args:
        name: one of `CLASSICS`, `module:function`, a released network or a weights file.
        most: maximum number of keypoints per image.
        engine: backend and precision of a network.

    Raises:
        ValueError: the name is unknown, or the weights cannot be used.
    """
    if name in CLASSICS:
        return CLASSICS[name](most)
    if ":" in name and not Path(name).is_file():
        return external_method(name, most)
    try:
        weights_path(name)
    except ValueError as error:
        raise ValueError(f"{error}, {', '.join(CLASSICS)} or module:function") from error
    return NetworkMethod(name, most, engine)
