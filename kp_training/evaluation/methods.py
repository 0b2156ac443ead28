"""Methods to evaluate: networks as the front end runs them, OpenCV's classics, and anyone's own.

Anyone's own is named `module:function` and made by `function(max_keypoints)`, which returns
something to call with a grey uint8 image (H, W) for keypoints (N, 2), x and y in pixels, the centre
of the top-left pixel at (0, 0), strongest first, N at most `max_keypoints`; and descriptors (N, D)
of which a smaller Euclidean distance means a better match. If it has a method
`match(left_keypoints, left_descriptors, right_keypoints, right_descriptors)`, that is used in place
of mutual nearest neighbours; it returns (M, 2) indices. See docs/evaluation.md for an example.
"""

from __future__ import annotations

import importlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch.nn import functional as F

from kp_frontend.detection import heatmap
from kp_frontend.frontend import FrontendConfig, StereoFrontend, StereoPipeline
from kp_frontend.matching import match_stereo, refine_disparity
from kp_frontend.network import load_network
from kp_training.evaluation.metrics import mutual_nearest, squared_distances

RATIO = 0.7  # of SIFT's FLANN matches, as the study has it


class Found(NamedTuple):
    """An image's keypoints (N, 2) and descriptors (N, D), strongest first."""

    xy: np.ndarray
    descriptors: np.ndarray

    def strongest(self, count: int) -> Found:
        """The first `count`."""
        return Found(self.xy[:count], self.descriptors[:count])


class Published(NamedTuple):
    """Stereo matches under the front end's limits: places (M, 2) in the left image, and disparity
    (M,), refined on the images."""

    left_xy: np.ndarray
    disparity: np.ndarray


NOTHING = Found(np.zeros((0, 2), np.float32), np.zeros((0, 1), np.float32))


class Method:
    """What is evaluated: `detect`, and how its results are matched.

    Args:
        name: in tables.
        detect: grey uint8 image (H, W) to keypoints and descriptors.
        match: from the left and right results to (M, 2) indices, or None: mutual nearest
            neighbours.
    """

    def __init__(
        self,
        name: str,
        detect: Callable[[np.ndarray], Found],
        match: Callable[[Found, Found], np.ndarray] | None = None,
    ) -> None:
        self.name = name
        self.detect = detect
        self.own_matcher = match is not None
        self._match = match
        self._warm: set[tuple[int, ...]] = set()

    def detect_timed(self, images: tuple[np.ndarray, np.ndarray]) -> tuple[Found, Found, float]:
        """Results of two images, and the milliseconds of one; warm, for each size."""
        for image in images:
            if image.shape not in self._warm:  # the first call may allocate or compile
                self.detect(image)
                self._warm.add(image.shape)
        begin = time.perf_counter()
        first, second = (self.detect(image) for image in images)
        return first, second, 1e3 * (time.perf_counter() - begin) / 2

    def match(self, left: Found, right: Found) -> np.ndarray:
        """Unconstrained matches, (M, 2) indices."""
        if self._match is not None:
            return self._match(left, right)
        return mutual_nearest(squared_distances(left.descriptors, right.descriptors))

    def publish(
        self, images: tuple[np.ndarray, np.ndarray], left: Found, right: Found
    ) -> Published:
        """Stereo matches of the same keypoints by the front end's own steps and limits."""
        if not len(left.xy) or not len(right.xy):
            return Published(NOTHING.xy, NOTHING.xy[:, 0])
        limits = stereo_limits(FrontendConfig(), images[0].shape[1])
        if self.own_matcher:
            rows = self.match(left, right)
            apart = left.xy[rows[:, 0]] - right.xy[rows[:, 1]]
            inside = (limits[1] <= apart[:, 0]) & (apart[:, 0] <= limits[2])
            rows = rows[inside & (np.abs(apart[:, 1]) <= limits[0])]
        else:
            rows = match_limited(left, right, limits)
        xy = (torch.from_numpy(np.float32(f.xy)) for f in (left, right))
        left_xy, right_xy = (places[rows[:, i]] for i, places in enumerate(xy))
        grey = (torch.from_numpy(image).float() for image in images)
        disparity, _ = refine_disparity(*grey, left_xy, right_xy)
        return Published(left_xy.numpy(), disparity.numpy())


def stereo_limits(config: FrontendConfig, width: int) -> np.ndarray:
    """The limits that `StereoFrontend` sets without calibration, as `match_stereo` takes them."""
    return np.float32(
        [config.row_tolerance, -1, width + 1, config.min_similarity, config.min_margin]
    )


def match_limited(left: Found, right: Found, limits: np.ndarray) -> np.ndarray:
    """Matches by the front end's matcher, (M, 2) indices; descriptors are made unit vectors."""
    count = max(len(left.xy), len(right.xy))
    xy = torch.zeros(2, count, 2)
    descriptors = torch.zeros(2, count, left.descriptors.shape[1])
    valid = torch.zeros(2, count, dtype=torch.bool)
    for i, found in enumerate((left, right)):
        n = len(found.xy)
        xy[i, :n] = torch.from_numpy(np.float32(found.xy))
        descriptors[i, :n] = F.normalize(torch.from_numpy(np.float32(found.descriptors)), dim=-1)
        valid[i, :n] = True
    row, _ = match_stereo(xy, valid, descriptors, torch.from_numpy(limits), with_margin=False)
    matched = np.flatnonzero(row.numpy() >= 0)
    return np.column_stack([matched, row.numpy()[matched]])


class NetworkMethod(Method):
    """A network by released name or weights file, in the reference (torch) backend."""

    def __init__(self, model: str, most: int) -> None:
        super().__init__(model, self._detect)
        self._model, self._most = model, most
        self._network = load_network(model).to(memory_format=torch.channels_last)
        self._frontend = cache(self._make_frontend)

    def _config(self, height: int, width: int) -> FrontendConfig:
        return FrontendConfig(
            model=self._model,
            backend="torch",
            max_keypoints=min(self._most, height * width // 16),
            max_motion=0.0,  # no tracks: scenes have nothing to do with each other
        )

    def _make_frontend(self, config: FrontendConfig) -> StereoFrontend:
        return StereoFrontend(config)

    @torch.inference_mode()
    def _detect(self, image: np.ndarray) -> Found:
        config = self._config(*image.shape)
        found = StereoPipeline(self._network, config, *image.shape).features(
            torch.from_numpy(image)[None, None].float()
        )
        xy, scores, descriptors = (tensor[0].numpy() for tensor in found)
        good = scores > config.score_threshold
        return Found(xy[good], descriptors[good])

    def publish(
        self, images: tuple[np.ndarray, np.ndarray], left: Found, right: Found
    ) -> Published:
        """What `StereoFrontend` publishes of the pair; `left` and `right` are not used."""
        features = self._frontend(self._config(*images[0].shape))(*images)
        return Published(features.left.keypoints[features.left_index], features.disparity)

    @torch.inference_mode()
    def dense(self, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The keypoint heatmap (H, W), and the unit descriptors of its pixels' cells (D, h, w)."""
        height, width = image.shape
        pipeline = StereoPipeline(self._network, self._config(height, width), height, width)
        grey = F.pad(torch.from_numpy(image)[None, None].float(), pipeline.pad, mode="replicate")
        logits, descriptors = self._network(grey)
        return (
            heatmap(logits)[0, :height, :width].numpy(),
            F.normalize(descriptors[0].float(), dim=0).numpy(),
        )


def _classic(detector: cv2.Feature2D) -> Callable[[np.ndarray], Found]:
    """An OpenCV detector's keypoints, sorted by response."""

    def detect(image: np.ndarray) -> Found:
        keypoints, descriptors = detector.detectAndCompute(image, None)
        if descriptors is None:
            return NOTHING
        order = np.argsort([-k.response for k in keypoints], kind="stable")
        return Found(cv2.KeyPoint.convert(keypoints)[order], descriptors[order])

    return detect


def sift_method(most: int) -> Method:
    """OpenCV's SIFT with its default thresholds, mutual nearest neighbours."""
    return Method("sift", _classic(cv2.SIFT_create(nfeatures=most)))


def sift_flann_method(most: int) -> Method:
    """SIFT matched by FLANN with the ratio test (Lowe, 2004), left to right, as in the study."""
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
    """OpenCV's ORB; bits become -1 and 1, of which the squared distance is 4 times Hamming's."""
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


def external_method(name: str, most: int) -> Method:
    """Somebody's own method, `module:function`; see above.

    Modules are looked for in the working folder too.

    Raises:
        ValueError: no such module or function, or it fails.
    """
    module, _, function = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    with _blaming(name):
        made = getattr(importlib.import_module(module), function)(most)

    def detect(image: np.ndarray) -> Found:
        with _blaming(name):
            xy, descriptors = made(image)
            found = Found(np.asarray(xy, np.float32), np.asarray(descriptors, np.float32))
        if (
            found.xy.ndim != 2
            or found.xy.shape[1] != 2
            or found.descriptors.ndim != 2
            or len(found.xy) != len(found.descriptors)
        ):
            raise ValueError(
                f"method {name} must return keypoints (N, 2) and descriptors (N, D), "
                f"not {found.xy.shape} and {found.descriptors.shape}"
            )
        if len(found.xy) > most:
            raise ValueError(f"method {name} returned {len(found.xy)} keypoints of at most {most}")
        if not np.isfinite(found.xy).all() or not np.isfinite(found.descriptors).all():
            raise ValueError(f"method {name} returned values that are not finite")
        return found if len(found.xy) else NOTHING

    def match(left: Found, right: Found) -> np.ndarray:
        if not len(left.xy) or not len(right.xy):
            return np.zeros((0, 2), int)
        with _blaming(name):
            rows = np.asarray(made.match(*left, *right))
        if rows.size and (
            rows.ndim != 2
            or rows.shape[1] != 2
            or rows.min() < 0
            or (rows.max(0) >= [len(left.xy), len(right.xy)]).any()
        ):
            raise ValueError(f"method {name}: match must return (M, 2) indices of keypoints")
        return rows.reshape(-1, 2).astype(int)

    return Method(name, detect, match if hasattr(made, "match") else None)


@contextmanager
def _blaming(name: str) -> Iterator[None]:
    """Says whose code failed."""
    try:
        yield
    except Exception as error:  # anything can go wrong in others' code
        raise ValueError(f"method {name} failed: {error!r}") from error


def make_method(name: str, most: int) -> Method:
    """A method by name.

    Args:
        name: one of `CLASSICS`, `module:function`, a released network or a weights file.
        most: keypoints per image.

    Raises:
        ValueError: there is none of that name.
    """
    if name in CLASSICS:
        return CLASSICS[name](most)
    if ":" in name:
        return external_method(name, most)
    try:
        return NetworkMethod(name, most)
    except ValueError as error:
        raise ValueError(f"{error}, {', '.join(CLASSICS)} or module:function") from error
