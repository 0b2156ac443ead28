"""Commands of training: label, train."""

from __future__ import annotations

import argparse
from pathlib import Path

from kp_frontend.cli import add_command, count, device


def _images(arguments: argparse.Namespace, cache: Path) -> Path:
    """The folder of images that the command is about; those of a bag are extracted first.

    Raises:
        ValueError: neither a folder nor a bag is given, or both are.
    """
    if (arguments.images is None) == (arguments.bag is None):
        raise ValueError("give a folder of images, or --bag FILE")
    if arguments.bag is None:
        return arguments.images
    from kp_training.recordings import extract_images

    return extract_images(arguments.bag, arguments.topic, cache, arguments.every)


def _label(arguments: argparse.Namespace) -> None:
    images = _images(arguments, arguments.out.with_name(arguments.out.name + ".images"))
    amount = {"most": arguments.most}
    if arguments.views:
        amount["views"] = arguments.views
    if arguments.model:
        from kp_training.relabel import relabel_folder

        labels, unreadable = relabel_folder(
            images, arguments.out, arguments.model, arguments.device, **amount
        )
    else:
        from kp_training.labels import label_folder

        labels, unreadable = label_folder(
            images, arguments.out, detector=arguments.detector, **amount
        )
    for path in unreadable:
        print(f"left out, cannot be read: {path}")
    print(f"{len(labels)} images, {len(labels.xy)} keypoints: {arguments.out}")


def _train(arguments: argparse.Namespace) -> None:
    from kp_training.config import load_config
    from kp_training.parallel import join
    from kp_training.train import train

    config = load_config(arguments.config)
    process = join(arguments.device)
    if process.first:  # it alone extracts the images of a bag; the others then find them
        _images(arguments, arguments.out / "images")
    process.wait()
    best = train(
        config,
        _images(arguments, arguments.out / "images"),
        arguments.out,
        arguments.device,
        arguments.workers,
        arguments.labels,
        arguments.start,
        arguments.middlebury,
    )
    if process.first:
        print(best)


def _add_bag(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--bag", type=Path, help="take the images of this bag (folder, .mcap, .bag)"
    )
    command.add_argument("--topic", help="image topic of the bag; needed if it has several")
    command.add_argument(
        "--every", type=count, default=5, help="take one of so many images of the bag (default 5)"
    )


def add_commands(commands: argparse._SubParsersAction) -> None:
    """Add them to `kp`."""
    label = add_command(
        commands,
        "label",
        "label the keypoints of images: SIFT's and others', or a network's own",
        "label images/ --out labels.npz --detector sift+orb",
        _label,
    )
    label.add_argument("images", type=Path, nargs="?", help="folder, searched in all depths")
    label.add_argument("--out", type=Path, required=True, help=".npz file to write")
    label.add_argument(
        "--detector", default="sift", help="sift, orb, fast, or several joined by + (default sift)"
    )
    label.add_argument(
        "--model",
        help="label with what this network (name or file) finds again in random views of an image",
    )
    label.add_argument(
        "--device", type=device, default="cpu", help="torch device for --model (default cpu)"
    )
    label.add_argument(
        "--views",
        type=count,
        help="random views in which a keypoint may be found again (default 5, of a network 12)",
    )
    label.add_argument(
        "--most", type=count, default=2000, help="keypoints of an image at most (default 2000)"
    )
    _add_bag(label)

    train = add_command(
        commands,
        "train",
        "train a network, or go on with a run that was stopped",
        "train --config release --images images/ --out runs/tiny",
        _train,
    )
    train.add_argument("--config", default="release", help="recipe by name, or a YAML file")
    train.add_argument("--images", type=Path, help="folder of training images")
    train.add_argument("--out", type=Path, required=True, help="the run's folder")
    train.add_argument("--labels", type=Path, help="from `kp label`; without it SIFT's are made")
    train.add_argument("--from", dest="start", help="weights to start from, by name or file")
    train.add_argument("--device", type=device, default="cpu", help="torch device (default cpu)")
    train.add_argument("--workers", type=int, default=1, help="processes that read images")
    train.add_argument(
        "--middlebury", type=Path, help="scenes for `kp evaluate middlebury`, to validate on too"
    )
    _add_bag(train)
