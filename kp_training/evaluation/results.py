"""Common parts of all evaluations: means over scenes, seeding, provenance of a run."""

from __future__ import annotations

import json
import math
import random
import shlex
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

import cv2
import numpy as np
import torch

from kp_frontend import __version__
from kp_frontend.tools.doctor import machine


def summary(names: Iterable[str], rows: Mapping[str, Mapping[str, float | None]]) -> dict:
    """For each metric, `mean` and `std` over the scenes with a value, and `per_scene`.

    `std` is the population standard deviation over scenes. Scenes without a value have None in
    `per_scene`. If no scene has a value, mean and std are None too.

    Args:
        names: names of the metrics.
        rows: metrics of each scene.
    """
    found = {}
    for name in names:
        values = {scene: row[name] for scene, row in rows.items()}
        known = [value for value in values.values() if value is not None]
        found[name] = {
            "mean": float(np.mean(known)) if known else None,
            "std": float(np.std(known)) if known else None,
            "per_scene": values,
        }
    return found


def without_value(metrics: Mapping) -> list[str]:
    """Lines of text that list the means that exclude scenes."""
    lines = []
    for method, found in metrics["methods"].items():
        for name, metric in found.items():
            values = metric["per_scene"].values()
            missing = sum(value is None for value in values)
            if 0 < missing < len(values):
                lines.append(f"{method}, {name}: no value in {missing} of {len(values)}")
    return lines


def write_metrics(out: Path, metrics: Mapping) -> None:
    """Write OUT/metrics.json. Infinity and NaN, which JSON does not have, become null."""
    (out / "metrics.json").write_text(
        json.dumps(_finite(metrics), indent=1, allow_nan=False) + "\n"
    )


def _finite(value: object) -> object:
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def seed_everything(seed: int = 0) -> None:
    """Seed the random generators of Python, numpy, torch and OpenCV (FLANN's trees)."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    cv2.setRNGSeed(seed)


def command_line() -> str:
    """The current `kp` command line."""
    return shlex.join(["kp", *sys.argv[1:]])


def provenance() -> dict[str, str]:
    """The current command, versions and machine, as text."""
    return {
        "command": command_line(),
        "kp_frontend": __version__,
        "threads": str(torch.get_num_threads()),
        **machine(),
    }
