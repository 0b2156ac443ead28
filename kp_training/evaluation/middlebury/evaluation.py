"""`kp evaluate middlebury`: methods on all scenes of a folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from kp_training.evaluation.image_pairs import (
    PairResult,
    load_usable,
    pair_metrics_file,
    pair_protocol,
    run_method,
)
from kp_training.evaluation.layouts import find_scenes
from kp_training.evaluation.method import Method, Published
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
from kp_training.evaluation.scenes import Scene, load_scene

STEPS = 5  # points of the curves over the number of keypoints, each half of the next


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
    shown: tuple[PairResult, Published] | None = None

    def add(
        self, scene: Scene, result: PairResult, published: Published, counts: Sequence[int]
    ) -> None:
        """Measure a scene's result."""
        name, method = scene.name, self.method
        own_matches = result.matches if method.own_matcher else None
        self.rows[name] = {
            **scene_metrics(scene, result.first, result.second, own_matches),
            **stereo_metrics(*published, scene.disparity),
            "inference_ms": result.milliseconds,
        }
        rows_apart, error = match_errors(scene.disparity, *result.places())
        self.errors[name] = error[np.isfinite(error) & (rows_apart <= ROW_TOLERANCE)]
        left_xy, disparity = published
        error = disparity - at_pixels(scene.disparity, left_xy)
        self.stereo_errors[name] = error[np.isfinite(error)]
        for count in counts:
            left, right = result.first.strongest(count), result.second.strongest(count)
            among = PairResult(left, right, method.match(left, right), result.milliseconds)
            self.curves.setdefault(count, {})[name] = match_metrics(scene, *among.places())


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
    for files, scene in load_usable(found, partial(load_scene, size=size), skipped, "scenes"):
        height, width = scene.left.shape
        scenes[scene.name] = (width, height, scene.release)
        if files.truth.suffix == ".pfm":
            precise.append(scene.name)
        first = shown is None or precise[:1] == [scene.name]
        chosen = scene.name == show if show else first
        if chosen:
            shown = scene
        images = scene.left, scene.right
        for of_method in results.values():
            result = run_method(of_method.method, images, seeded)
            published = of_method.method.publish(images, result.first, result.second)
            of_method.add(scene, result, published, counts)
            if chosen:
                of_method.shown = result, published
    if not scenes:
        raise ValueError(f"no usable scene in {folder}: {'; '.join(skipped)}")
    if shown is None:
        raise ValueError(f"the scene to show, {show}, cannot be used: {'; '.join(skipped)}")
    protocol = pair_protocol(most, size, seeded, skipped, matching=_matching(results))
    rows = {name: of_method.rows for name, of_method in results.items()}
    metrics = pair_metrics_file(scenes, METRICS, rows, protocol)
    return Evaluation(metrics, scenes, results, precise or list(scenes), shown)


def _matching(results: dict[str, MethodResults]) -> str:
    """How the methods were matched, for the protocol."""
    own = [name for name, of_method in results.items() if of_method.method.own_matcher]
    return "mutual nearest neighbours, but the method's own matcher of: " + (
        ", ".join(own) or "none"
    )
