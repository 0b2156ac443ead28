"""The data of a training stage: its labels, and their split into training and validation."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from kp_training.config import TrainConfig
from kp_training.image_files import files_below, other_images
from kp_training.labels import Labels, label_folder, load_labels
from kp_training.parallel import Process
from kp_training.relabel import relabel_folder
from kp_training.splits import split_images

OWN = "own"  # source of labels: the network that the stage starts from


def check_start(config: TrainConfig, start: str | Path | None, labels_file: Path | None) -> None:
    """Check before any work that a stage that learns its own keypoints has weights to find them.

    Raises:
        ValueError: it starts from random weights.
    """
    if config.labels.source == OWN and start is None and labels_file is None:
        raise ValueError("the recipe needs trained weights to start from: give --from")


def stage_data(
    config: TrainConfig,
    images: Path,
    out: Path,
    labels_file: Path | None,
    start: str | Path | None,
    process: Process,
) -> tuple[Labels, np.ndarray, np.ndarray]:
    """The labels of a stage, and the indices of their training and validation images.

    The first process creates missing files; the others then read them.

    Args:
        out: folder of the run, for labels and split.
        labels_file: labels to use instead of those of the recipe.
        start: weights that the stage starts from.

    Raises:
        ValueError: there are no usable images or labels.
    """
    file = labels_file or out / "labels.npz"
    if process.first:
        if not file.is_file() and labels_file is None:
            _label(config, images, file, start, process.device)
        labels = load_labels(images, file)
        training, held_out = split_images(labels, config.seed, out / "split.json")
    process.wait()
    if not process.first:
        labels = load_labels(images, file)
        training, held_out = split_images(labels, config.seed, out / "split.json")
    return labels, training, held_out


def _label(
    config: TrainConfig, images: Path, file: Path, start: str | Path | None, device: str
) -> None:
    """Compute the labels of a recipe, and print what was skipped."""
    source, views, most, every = (
        getattr(config.labels, name) for name in ("source", "views", "most", "every")
    )
    if source == OWN:
        assert start is not None  # see `check_start`
        labels, unreadable = relabel_folder(images, file, start, device, views, most, every)
    else:
        labels, unreadable = label_folder(images, file, most, views, source, every)
    for reason in other_images(files_below(images)):
        print(f"skipped: {reason}")
    for path in unreadable:
        print(f"skipped, not readable: {path}")
    print(f"{len(labels)} images, {len(labels.xy) / len(labels):.0f} keypoints per image")
