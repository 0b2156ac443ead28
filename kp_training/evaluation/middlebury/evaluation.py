"""`kp evaluate middlebury`: evaluates methods on all scenes of a folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from kp_training.evaluation.disturbances import Disturbance, find_disturbances
from kp_training.evaluation.image_pairs import (
    PairResult,
    load_usable,
    pair_metrics_file,
    pair_protocol,
    run_method,
)
from kp_training.evaluation.layouts import find_scenes
from kp_training.evaluation.method import Method, Published
from kp_training.evaluation.methods import REFERENCE, Engine, make_method
from kp_training.evaluation.metrics import (
    METRICS,
    ROW_TOLERANCE,
    STRONGEST,
    UNCONSTRAINED,
    Value,
    at_pixels,
    is_correct,
    match_errors,
    match_metrics,
    scene_metrics,
    stereo_metrics,
)
from kp_training.evaluation.reasons import listed
from kp_training.evaluation.results import summary
from kp_training.evaluation.scenes import Scene, load_scene
from kp_training.evaluation.trust import Trust, auc

STEPS = 5  # points of the curves over the number of keypoints, doubling from one to the next


@dataclass
class MethodResults:
    """Results of one method, by scene.

    `rows`: metrics. `errors`: signed disparity errors (pixels, where there is ground truth) of
    unconstrained matches in corresponding rows; `stereo_errors`: of published matches; `trust`:
    these with their standard deviation and confidence. `curves`:
    for each number of keypoints, the metrics of the matches among the strongest ones. `disturbed`:
    the unconstrained metrics of the scenes under each disturbance.
    """

    method: Method
    rows: dict[str, dict[str, Value]] = field(default_factory=dict)
    errors: dict[str, np.ndarray] = field(default_factory=dict)
    stereo_errors: dict[str, np.ndarray] = field(default_factory=dict)
    trust: dict[str, Trust] = field(default_factory=dict)
    curves: dict[int, dict[str, dict[str, Value]]] = field(default_factory=dict)
    disturbed: dict[str, dict[str, dict[str, Value]]] = field(default_factory=dict)
    shown: tuple[PairResult, Published] | None = None

    def add(
        self,
        scene: Scene,
        result: PairResult,
        published: Published,
        counts: Sequence[int],
        precise: bool,
    ) -> None:
        """Measure the result of a scene; `precise`: its map is known to fractions of a pixel."""
        name, method = scene.name, self.method
        error = published.disparity - at_pixels(scene.disparity, published.left_xy)
        known = np.isfinite(error)
        self.trust[name] = Trust(
            error[known], published.sigma[known], published.confidence[known], precise
        )
        own_matches = result.matches if method.own_matcher else None
        self.rows[name] = {
            **scene_metrics(scene, result.first, result.second, own_matches),
            **self._score_metrics(scene, result),
            **stereo_metrics(published.left_xy, published.disparity, scene.disparity),
            **self.trust[name].metrics(),
            "inference_ms": result.milliseconds,
        }
        rows_apart, error = match_errors(scene.disparity, *result.places())
        self.errors[name] = error[np.isfinite(error) & (rows_apart <= ROW_TOLERANCE)]
        self.stereo_errors[name] = self.trust[name].error
        for count in counts:
            self.curves.setdefault(count, {})[name] = self._among(scene, result, count)

    def _among(self, scene: Scene, result: PairResult, count: int) -> dict[str, Value]:
        """Metrics of the matches among the strongest keypoints."""
        left, right = result.first.strongest(count), result.second.strongest(count)
        among = PairResult(left, right, self.method.match(left, right), result.milliseconds)
        return match_metrics(scene, *among.places())

    def _score_metrics(self, scene: Scene, result: PairResult) -> dict[str, Value]:
        """`SCORES`. Keypoints are in the order of their scores; a match ranks as its weaker one."""
        rows_apart, error = match_errors(scene.disparity, *result.places())
        known = np.isfinite(error)
        strength = -result.matches[known].max(1)
        strongest = self._among(scene, result, STRONGEST)
        return {
            "score_auc": auc(strength, is_correct(rows_apart, error)[known]),
            **{f"{n}_256": strongest[n] for n in ("disparity_accuracy", "correct_matches")},
        }

    def add_disturbed(self, scene: Scene, disturbance: Disturbance, seeded: bool) -> None:
        """Measure a scene under a disturbance."""
        images = disturbance.pair(scene.name, scene.left, scene.right)
        left, right, matches, _ = run_method(self.method, images, seeded)
        right = disturbance.undone(right, scene.right.shape)
        if disturbance.degrees:  # some keypoints are gone
            matches = self.method.match(left, right)
        own_matches = matches if self.method.own_matcher else None
        row = scene_metrics(scene, left, right, own_matches)
        self.disturbed.setdefault(disturbance.name, {})[scene.name] = row


@dataclass
class Evaluation:
    """`metrics` is the content of metrics.json; the rest is for the report.

    `scenes`: width, height and release of each scene. `precise`: the scenes with sub-pixel (PFM)
    maps, or all if there are none. `shown`: the scene of the pictures.
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
    engine: Engine = REFERENCE,
    show: str | None = None,
    disturb: Sequence[str] = (),
) -> Evaluation:
    """Evaluate methods on all scenes of a folder.

    Args:
        folder: see `kp_training.evaluation.layouts`.
        methods: names, see `make_method`.
        most: maximum number of keypoints per image.
        size: width and height to resize all scenes to; None keeps their size.
        seeded: seed all random generators for each method and scene, so that runs are identical to
            the last digit.
        engine: backend and precision of the networks.
        show: scene of the report's pictures; None uses the first scene with a PFM map, or the
            first scene.
        disturb: names of disturbances, see `find_disturbances`. The scenes are measured once more
            under each of them.

    Raises:
        ValueError: there is no usable scene, or a method, scene or disturbance is unknown.
    """
    disturbances = find_disturbances(disturb)
    found, skipped = find_scenes(folder)
    if show is not None and show not in [files.name for files in found]:
        raise ValueError(f"unknown scene {show!r}; scenes: {', '.join(f.name for f in found)}")
    results = {name: MethodResults(make_method(name, most, engine)) for name in methods}
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
            of_method.add(scene, result, published, counts, scene.name in precise)
            if chosen:
                of_method.shown = result, published
            for disturbance in disturbances:
                of_method.add_disturbed(scene, disturbance, seeded)
    if not scenes:
        raise ValueError(f"no usable scene in {folder}: {listed(skipped)}")
    if shown is None:
        raise ValueError(f"scene {show} cannot be shown: {listed(skipped)}")
    methods_of = [of_method.method for of_method in results.values()]
    protocol = pair_protocol(most, size, seeded, skipped, methods_of, matching=_matching(results))
    rows = {name: of_method.rows for name, of_method in results.items()}
    metrics = pair_metrics_file(scenes, METRICS, rows, protocol)
    if disturbances:
        metrics["disturbed"] = {d.name: _disturbed(d, results) for d in disturbances}
    return Evaluation(metrics, scenes, results, precise or list(scenes), shown)


def _matching(results: dict[str, MethodResults]) -> str:
    """Description of the matchers, for the protocol."""
    own = [name for name, of_method in results.items() if of_method.method.own_matcher]
    return "mutual nearest neighbours; own matcher: " + (", ".join(own) or "none")


def _disturbed(disturbance: Disturbance, results: dict[str, MethodResults]) -> dict:
    """The part of metrics.json about one disturbance."""
    methods = {
        name: summary(UNCONSTRAINED, of_method.disturbed[disturbance.name])
        for name, of_method in results.items()
    }
    return {"what": disturbance.words, "methods": methods}
