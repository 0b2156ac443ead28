"""Training by a recipe: `kp train --config RECIPE --images DIR --out RUN`.

A recipe is a list of stages. Each stage is a run of the training loop in a folder of its own,
`RUN/1_NAME`, `RUN/2_NAME` ..., and starts from the best weights of the stage before. A recipe of
one stage uses RUN itself. RUN gets `best.safetensors`, and `run.json`, `card.md` and `curves.png`
of all stages.
"""

from __future__ import annotations

import math
import os
import shutil
import time
from pathlib import Path

from kp_training.config import TrainConfig
from kp_training.parallel import join
from kp_training.report import write_recipe_report
from kp_training.runlog import Span
from kp_training.train import train


def train_recipe(
    stages: tuple[TrainConfig, ...],
    images: Path,
    out: Path,
    device: str,
    workers: int = 1,
    labels_file: Path | None = None,
    start: str | Path | None = None,
    middlebury: Path | None = None,
    minutes: float = math.inf,
) -> Path | None:
    """Train a network by all stages of a recipe, or resume an interrupted run.

    Args:
        stages: from `load_recipe`.
        labels_file: labels for the first stage; None uses those of the recipe.
        start: weights that the first stage starts from; None for random ones.
        minutes: time after which to write a checkpoint and stop.

    See `train` for the others.

    Returns:
        The file with the final weights; None if the time was over before the end.

    Raises:
        ValueError: the first stage needs weights to start from, or see `train`.
        FloatingPointError: see `train`.
    """
    deadline = time.monotonic() + 60 * minutes
    process = join(device)
    if len(stages) == 1:
        return train(
            stages[0], images, out, device, workers, labels_file, start, middlebury,
            deadline=deadline,
        )  # fmt: skip
    total = sum(stage.steps for stage in stages)
    before = 0
    folders = [out / f"{i}_{stage.name}" for i, stage in enumerate(stages, 1)]
    for i, (stage, folder) in enumerate(zip(stages, folders, strict=True)):
        name = f"stage {i + 1} of {len(stages)}, {stage.name},"
        best = train(
            stage, images, folder, device, workers, labels_file if i == 0 else None, start,
            middlebury, Span(name, before, total), deadline,
        )  # fmt: skip
        if best is None:
            return None
        start, before = best, before + stage.steps
    if process.first:
        shutil.copyfile(folders[-1] / "best.safetensors", out / "best.safetensors.part")
        os.replace(out / "best.safetensors.part", out / "best.safetensors")
        write_recipe_report(out, folders)
    process.wait()
    return out / "best.safetensors"
