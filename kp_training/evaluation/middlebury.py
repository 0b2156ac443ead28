"""`kp evaluate middlebury`: methods on all scenes of a folder."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
from rich.progress import track

from kp_training.evaluation.methods import CLASSICS, network_method
from kp_training.evaluation.metrics import scene_metrics
from kp_training.evaluation.scenes import load_scenes


def _mean_and_std(values: list[float | None]) -> dict[str, float | None]:
    """Over the scenes that have a value; None if none has."""
    known = [value for value in values if value is not None]
    if not known:
        return {"mean": None, "std": None}
    return {"mean": float(np.mean(known)), "std": float(np.std(known))}


def evaluate_middlebury(folder: Path, methods: list[str], most: int = 2048) -> dict:
    """Evaluate methods (`sift`, `orb`, a released network or a weights file) on all scenes.

    Returns:
        The contents of metrics.json.

    Raises:
        ValueError: no scenes, or no such method.
    """
    scenes, skipped = load_scenes(folder)
    if not scenes:
        raise ValueError(f"no usable scene in {folder}: {'; '.join(skipped)}")
    results = {}
    for name in methods:
        method = CLASSICS[name](most) if name in CLASSICS else network_method(name, most)
        rows: dict[str, dict[str, float]] = {}
        for scene in track(scenes, f"{name}"):
            found, took = [], []
            for image in (scene.left, scene.right):
                begin = time.perf_counter()
                found.append(method(image))
                took.append(1e3 * (time.perf_counter() - begin))
            rows[scene.name] = {
                **scene_metrics(scene, *found),
                "inference_ms": float(np.mean(took)),
            }
        results[name] = {
            metric: {
                **_mean_and_std([row[metric] for row in rows.values()]),
                "per_scene": {scene: row[metric] for scene, row in rows.items()},
            }
            for metric in next(iter(rows.values()))
        }
    protocol = {"max_keypoints": most, "matching": "mutual nearest neighbours", "skipped": skipped}
    return {"scenes": [s.name for s in scenes], "protocol": protocol, "methods": results}
