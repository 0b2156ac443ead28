"""`kp evaluate middlebury`: methods on all scenes of a folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.progress import track

from kp_training.evaluation.layouts import find_scenes
from kp_training.evaluation.method import Found, Method, Published
from kp_training.evaluation.methods import make_method
from kp_training.evaluation.metrics import (
    METRICS,
    ROW_TOLERANCE,
    Value,
    at_pixels,
    match_errors,
    match_metrics,
    scene_metrics,
    stereo_metrics,
)
from kp_training.evaluation.results import seed_everything, summary
from kp_training.evaluation.scenes import Scene, load_scene

STEPS = 5  # points of the curves over the number of keypoints, each half of the next


class SceneResult(NamedTuple):
    """What a method found in one scene; `matches` (M, 2) are indices, unconstrained."""

    left: Found
    right: Found
    matches: np.ndarray
    published: Published


@dataclass
class MethodResults:
    """All of one method: of each scene its metrics, signed disparity errors (pixels, where there is
    ground truth) of unconstrained matches in the right rows and of published ones, and for each
    number of keypoints the metrics of matches among the strongest ones."""

    method: Method
    rows: dict[str, dict[str, Value]] = field(default_factory=dict)
    errors: dict[str, np.ndarray] = field(default_factory=dict)
    stereo_errors: dict[str, np.ndarray] = field(default_factory=dict)
    curves: dict[int, dict[str, dict[str, Value]]] = field(default_factory=dict)
    shown: SceneResult | None = None

    def add(self, scene: Scene, result: SceneResult, took: float, counts: Sequence[int]) -> None:
        """Measure a scene's result."""
        name, method = scene.name, self.method
        own_matches = result.matches if method.own_matcher else None
        self.rows[name] = {
            **scene_metrics(scene, result.left, result.right, own_matches),
            **stereo_metrics(*result.published, scene.disparity),
            "inference_ms": took,
        }
        rows_apart, error = match_errors(scene.disparity, *_places(*result[:3]))
        self.errors[name] = error[np.isfinite(error) & (rows_apart <= ROW_TOLERANCE)]
        left_xy, disparity = result.published
        error = disparity - at_pixels(scene.disparity, left_xy)
        self.stereo_errors[name] = error[np.isfinite(error)]
        for count in counts:
            left, right = result.left.strongest(count), result.right.strongest(count)
            places = _places(left, right, method.match(left, right))
            self.curves.setdefault(count, {})[name] = match_metrics(scene, *places)


@dataclass
class Evaluation:
    """`metrics` is what metrics.json holds, the rest is for the report.

    `scenes`: width, height and release of each. `precise`: those with sub-pixel (PFM) maps, all if
    there are none. `shown`: the scene of the pictures.
    """

    metrics: dict
    scenes: dict[str, tuple[int, int, str]]
    results: dict[str, MethodResults]
    precise: list[str]
    shown: Scene


def evaluate_middlebury(
    folder: Path,
    methods: Sequence[str],
    most: int = 2048,
    size: tuple[int, int] | None = None,
    seeded: bool = False,
    show: str | None = None,
) -> Evaluation:
    """Evaluate methods on all scenes of a folder.

    Args:
        folder: see `kp_training.evaluation.layouts`.
        methods: names, see `make_method`.
        most: keypoints per image.
        size: width and height to bring all scenes to; None: as they are.
        seeded: seed all random generators for each method and scene, so that a run can be repeated
            to the last digit.
        show: the scene whose pictures the report has; None: the first with a PFM map, or the first.

    Raises:
        ValueError: no usable scene, or no such method or scene.
    """
    found, skipped = find_scenes(folder)
    if show is not None and show not in [files.name for files in found]:
        raise ValueError(f"no scene {show!r}: there are {', '.join(f.name for f in found)}")
    results = {name: MethodResults(make_method(name, most)) for name in methods}
    counts = [most // 2**i for i in reversed(range(STEPS)) if most // 2**i]
    scenes: dict[str, tuple[int, int, str]] = {}
    precise: list[str] = []
    shown = None
    for files in track(found, "scenes"):
        try:
            scene = load_scene(files, size)
        except ValueError as error:
            skipped.append(f"{files.name}: {error}")
            continue
        height, width = scene.left.shape
        scenes[scene.name] = (width, height, scene.release)
        if files.truth.suffix == ".pfm":
            precise.append(scene.name)
        first = shown is None or precise[:1] == [scene.name]
        chosen = scene.name == show if show else first
        if chosen:
            shown = scene
        for of_method in results.values():
            if seeded:
                seed_everything()
            result, took = run_method(of_method.method, scene)
            of_method.add(scene, result, took, counts)
            if chosen:
                of_method.shown = result
    if not scenes:
        raise ValueError(f"no usable scene in {folder}: {'; '.join(skipped)}")
    if shown is None:
        raise ValueError(f"the scene to show, {show}, cannot be used: {'; '.join(skipped)}")
    own = [name for name, of_method in results.items() if of_method.method.own_matcher]
    protocol = {
        "max_keypoints": most,
        "size": list(size) if size else "native",
        "seeded": seeded,
        "matching": "mutual nearest neighbours, but the method's own matcher of: "
        + (", ".join(own) or "none"),
        "skipped": skipped,
    }
    metrics = {
        "scenes": list(scenes),
        "protocol": protocol,
        "methods": {name: summary(METRICS, r.rows) for name, r in results.items()},
    }
    return Evaluation(metrics, scenes, results, precise or list(scenes), shown)


def run_method(method: Method, scene: Scene) -> tuple[SceneResult, float]:
    """A method's results on a scene, and the milliseconds that detection took on one image."""
    images = scene.left, scene.right
    left, right, took = method.detect_timed(images)
    matches = method.match(left, right)
    return SceneResult(left, right, matches, method.publish(images, left, right)), took


def _places(left: Found, right: Found, matches: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where matches (M, 2) are in the left and in the right image, (M, 2) each."""
    return left.xy[matches[:, 0]], right.xy[matches[:, 1]]
