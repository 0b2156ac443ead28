"""`kp evaluate middlebury`: methods on all scenes of a folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from rich.progress import track

from kp_training.evaluation.layouts import find_scenes
from kp_training.evaluation.method import Found, Method, Published
from kp_training.evaluation.methods import make_method
from kp_training.evaluation.metrics import (
    METRICS,
    Value,
    at_pixels,
    is_correct,
    match_errors,
    match_metrics,
    scene_metrics,
    stereo_metrics,
)
from kp_training.evaluation.results import seed_everything, summary
from kp_training.evaluation.scenes import Scene, load_scene

STEPS = 5  # points of the curves over the number of keypoints, each half of the next


@dataclass
class SceneResult:
    """What a method found in one scene."""

    left: Found
    right: Found
    matches: np.ndarray  # (M, 2) indices, unconstrained
    correct: np.ndarray  # (M,) float: 1 right, 0 wrong, NaN without ground truth
    published: Published


@dataclass
class Evaluation:
    """Results of all methods; `metrics` is what metrics.json holds, the rest is for the report.

    `errors` and `stereo_errors`: for each method signed disparity errors of unconstrained matches
    in the right rows and of published ones, pixels, of all scenes of `precise`, the names of those
    with PFM maps (of all scenes if there are none). `curves`: for each method and number of
    keypoints the mean metrics of its strongest ones.
    """

    metrics: dict
    scenes: dict[str, tuple[int, int, str]]  # width, height, release
    methods: list[Method]
    errors: dict[str, np.ndarray]
    stereo_errors: dict[str, np.ndarray]
    precise: list[str]
    curves: dict[str, dict[int, dict[str, float | None]]]
    shown: Scene
    shown_results: dict[str, SceneResult] = field(default_factory=dict)


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
    subjects = [make_method(name, most) for name in dict.fromkeys(methods)]
    counts = [most // 2**i for i in reversed(range(STEPS)) if most // 2**i]
    rows: dict[str, dict[str, dict[str, Value]]] = {m.name: {} for m in subjects}
    curves = {m.name: {n: [] for n in counts} for m in subjects}
    errors = {m.name: {} for m in subjects}
    sizes: dict[str, tuple[int, int, str]] = {}
    precise = []
    shown, shown_results = None, {}
    for files in track(found, "scenes"):
        try:
            scene = load_scene(files, size)
        except ValueError as error:
            skipped.append(f"{files.name}: {error}")
            continue
        height, width = scene.left.shape
        sizes[scene.name] = (width, height, scene.release)
        if files.truth.suffix == ".pfm":
            precise.append(scene.name)
        first = shown is None or precise[:1] == [scene.name]
        chosen = scene.name == show if show else first
        for method in subjects:
            if seeded:
                seed_everything()
            result, took = run_method(method, scene)
            rows[method.name][scene.name] = _row(method, scene, result) | {"inference_ms": took}
            errors[method.name][scene.name] = _errors(scene, result)
            for n in counts:
                curves[method.name][n].append(_curve_point(method, scene, result, n))
            if chosen:
                shown, shown_results[method.name] = scene, result
    if not sizes:
        raise ValueError(f"no usable scene in {folder}: {'; '.join(skipped)}")
    if shown is None:
        raise ValueError(f"the scene to show, {show}, cannot be used: {'; '.join(skipped)}")
    protocol = {
        "max_keypoints": most,
        "size": list(size) if size else "native",
        "seeded": seeded,
        "matching": "mutual nearest neighbours, or the method's own matcher: "
        + (", ".join(m.name for m in subjects if m.own_matcher) or "none"),
        "skipped": skipped,
    }
    precise = precise or list(sizes)
    return Evaluation(
        {
            "scenes": list(sizes),
            "protocol": protocol,
            "methods": {name: summary(METRICS, r) for name, r in rows.items()},
        },
        sizes,
        subjects,
        *(
            {name: np.concatenate([e[s][i] for s in precise]) for name, e in errors.items()}
            for i in range(2)
        ),
        precise,
        {
            name: {n: {k: v["mean"] for k, v in summary(points[0], dict(enumerate(points))).items()}
                   for n, points in by_count.items()}
            for name, by_count in curves.items()
        },
        shown,
        shown_results,
    )  # fmt: skip


def run_method(method: Method, scene: Scene) -> tuple[SceneResult, float]:
    """A method's results on a scene, and the milliseconds that detection took on one image."""
    left, right, took = method.detect_timed((scene.left, scene.right))
    matches = method.match(left, right)
    places = left.xy[matches[:, 0]], right.xy[matches[:, 1]]
    rows_apart, error = match_errors(scene.disparity, *places)
    correct = np.where(np.isfinite(error), is_correct(rows_apart, error), np.nan)
    published = method.publish((scene.left, scene.right), left, right)
    return SceneResult(left, right, matches, correct, published), took


def _row(method: Method, scene: Scene, result: SceneResult) -> dict[str, Value]:
    matches = result.matches if method.own_matcher else None
    return scene_metrics(scene, result.left, result.right, matches) | stereo_metrics(
        *result.published, scene.disparity
    )


def _errors(scene: Scene, result: SceneResult) -> tuple[np.ndarray, np.ndarray]:
    """Signed errors where there is ground truth: of unconstrained, and of published matches."""
    left, right = result.matches.T
    rows_apart, error = match_errors(scene.disparity, result.left.xy[left], result.right.xy[right])
    published = result.published.disparity - at_pixels(scene.disparity, result.published.left_xy)
    return error[np.isfinite(error) & (rows_apart <= 2)], published[np.isfinite(published)]


def _curve_point(method: Method, scene: Scene, result: SceneResult, count: int) -> dict[str, Value]:
    """Metrics of the matches among the `count` strongest keypoints of each image."""
    left, right = result.left.strongest(count), result.right.strongest(count)
    matches = method.match(left, right)
    return match_metrics(scene, left.xy[matches[:, 0]], right.xy[matches[:, 1]])
