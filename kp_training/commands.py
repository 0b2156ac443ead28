"""Commands of training: label, train."""

from __future__ import annotations

import argparse
from pathlib import Path

from kp_frontend.cli import add_command, device


def _label(arguments: argparse.Namespace) -> None:
    if arguments.model:
        from kp_training.relabel import relabel_folder

        labels, unreadable = relabel_folder(
            arguments.images, arguments.out, arguments.model, arguments.device
        )
    else:
        from kp_training.labels import label_folder

        labels, unreadable = label_folder(arguments.images, arguments.out)
    for path in unreadable:
        print(f"left out, cannot be read: {path}")
    print(f"{len(labels)} images, {len(labels.xy)} keypoints: {arguments.out}")


def _train(arguments: argparse.Namespace) -> None:
    from kp_training.train import load_config, train

    config = load_config(arguments.config)
    best = train(
        config,
        arguments.images,
        arguments.out,
        arguments.device,
        arguments.workers,
        arguments.labels,
        arguments.start,
    )
    print(best)


def add_commands(commands: argparse._SubParsersAction) -> None:
    """Add them to `kp`."""
    label = add_command(
        commands,
        "label",
        "label the keypoints of a folder of images: SIFT's, or a network's own",
        "label images/ --out labels.npz",
        _label,
    )
    label.add_argument("images", type=Path, help="folder, searched in all depths")
    label.add_argument("--out", type=Path, required=True, help=".npz file to write")
    label.add_argument(
        "--model",
        help="label with what this network (name or file) finds again in random views of an image",
    )
    label.add_argument(
        "--device", type=device, default="cpu", help="torch device for --model (default cpu)"
    )

    train = add_command(
        commands,
        "train",
        "train a network, or go on with a run that was stopped",
        "train --config release --images images/ --out runs/tiny",
        _train,
    )
    train.add_argument("--config", default="release", help="recipe by name, or a YAML file")
    train.add_argument("--images", type=Path, required=True, help="folder of training images")
    train.add_argument("--out", type=Path, required=True, help="the run's folder")
    train.add_argument("--labels", type=Path, help="from `kp label`; without it SIFT's are made")
    train.add_argument("--from", dest="start", help="weights to start from, by name or file")
    train.add_argument("--device", type=device, default="cpu", help="torch device (default cpu)")
    train.add_argument("--workers", type=int, default=1, help="processes that read images")
