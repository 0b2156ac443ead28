"""The training commands of `kp`: label, train, uncertainty."""

from __future__ import annotations

import argparse
import math
import shutil
from pathlib import Path

from kp_frontend.cli import add_bit_depth, add_command, count, count_or_zero, device, positive
from kp_frontend.output_paths import check_file, check_folder


def _images(arguments: argparse.Namespace, cache: Path) -> Path:
    """The folder of images of a command. With --bag, the images are extracted to `cache` first.

    Raises:
        ValueError: neither a folder nor a bag is given, or both.
    """
    if (arguments.images is None) == (arguments.bag is None):
        raise ValueError("give either a folder of images or --bag FILE")
    if arguments.bag is None:
        return arguments.images
    from kp_training.recordings import extract_images

    return extract_images(
        arguments.bag, arguments.topic, cache, arguments.every, arguments.bit_depth
    )


def _label(arguments: argparse.Namespace) -> None:
    from kp_training.image_files import files_below, other_images

    check_file(arguments.out, beside=True)
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
    for reason in other_images(files_below(images)):
        print(f"skipped: {reason}")
    for path in unreadable:
        print(f"skipped, not readable: {path}")
    print(f"{len(labels)} images, {len(labels.xy)} keypoints written to {arguments.out}")


def _train(arguments: argparse.Namespace) -> None:
    from kp_training.config import load_recipe
    from kp_training.parallel import join
    from kp_training.stages import train_recipe

    check_folder(arguments.out)
    stages = load_recipe(arguments.config)
    process = join(arguments.device)
    if process.first:  # only the first process extracts the images of a bag
        _images(arguments, arguments.out / "images")
    process.wait()
    best = train_recipe(
        stages,
        _images(arguments, arguments.out / "images"),
        arguments.out,
        arguments.device,
        arguments.workers,
        arguments.labels,
        arguments.start,
        arguments.middlebury,
        arguments.minutes or math.inf,
    )
    if process.first:
        print(best or "stopped in time; run the same command again to resume")


def _quantize(arguments: argparse.Namespace) -> None:
    from kp_frontend.uncertainty import SUFFIX, uncertainty_path
    from kp_training.quantize import quantize

    check_file(arguments.out, beside=True)
    images = _images(arguments, arguments.out.with_name(arguments.out.name + ".images"))
    result = quantize(arguments.model, images, arguments.out, arguments.most)
    # The calibration of the confidence holds for the new file as well.
    calibration = uncertainty_path(arguments.model)
    copy = arguments.out.with_suffix(SUFFIX)
    if calibration.is_file() and calibration.resolve() != copy.resolve():
        shutil.copyfile(calibration, copy)
    for path in result.unreadable:
        print(f"skipped, unreadable: {path}")
    print(f"int8 against fp32: {result.agreement}")
    print(f"{len(result.ranges)} ranges measured on {result.images} images: {arguments.out}")


def _uncertainty(arguments: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.table import Table

    from kp_frontend.uncertainty import save_uncertainty, uncertainty_path
    from kp_training.evaluation.metrics import TRUST
    from kp_training.evaluation.page import shown
    from kp_training.evaluation.results import summary
    from kp_training.uncertainty import cross_validated, fit, point_metrics
    from kp_training.uncertainty_samples import (
        PointPairs,
        collect_made_pairs,
        collect_scenes,
    )

    out = arguments.out or uncertainty_path(arguments.model)
    check_file(out)
    samples, skipped = collect_scenes(arguments.model, arguments.scenes, arguments.leave_out)
    made: list[PointPairs] = []
    if arguments.images:
        made, more = collect_made_pairs(arguments.model, arguments.images, arguments.most)
        skipped += more
    rows = cross_validated(samples)
    means = summary(TRUST, rows)
    table = Table("scene", *TRUST, title="cross-validated by scene")
    for name, row in rows.items():
        table.add_row(name, *(shown(row[metric]) for metric in TRUST))
    table.add_section()
    table.add_row("mean", *(shown(means[metric]["mean"]) for metric in TRUST))
    console = Console()
    console.print(table)
    result = fit(samples, made)
    positions = {"matches of the scenes": point_metrics(result, [s.point_pairs for s in samples])}
    if len(made) > 1:
        half = fit(samples, made[::2])
        positions["made views, fitted to half of the images"] = point_metrics(half, made[1::2])
    for kind, found in positions.items():
        values = ", ".join(f"{metric} {shown(value)}" for metric, value in found.items())
        console.print(f"positions, {kind}: {values}", soft_wrap=True)
    for reason in skipped:
        console.print(f"skipped: {reason}", soft_wrap=True)
    save_uncertainty(result, out)
    console.print(f"written: {out}", soft_wrap=True)


def _add_bag(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--bag", type=Path, help="use the images of this bag (rosbag2 folder, .mcap, .bag)"
    )
    command.add_argument("--topic", help="image topic of the bag; required if the bag has several")
    command.add_argument(
        "--every", type=count, default=5, help="use every n-th image of the bag (default 5)"
    )
    add_bit_depth(command)


def add_commands(commands: argparse._SubParsersAction) -> None:
    """Add the training commands to `kp`."""
    _add_label(commands)
    _add_quantize(commands)
    _add_train(commands)


def _add_label(commands: argparse._SubParsersAction) -> None:
    label = add_command(
        commands,
        "label",
        "create keypoint labels for images, from SIFT, ORB, FAST or a trained network",
        "label images/ --out labels.npz --detector sift+orb",
        _label,
    )
    label.add_argument(
        "images", type=Path, nargs="?", help="folder of images, searched recursively"
    )
    label.add_argument("--out", type=Path, required=True, help=".npz file to write")
    label.add_argument(
        "--detector",
        default="sift",
        help="sift, orb or fast, or several joined by + (default sift)",
    )
    label.add_argument(
        "--model",
        help="label with the keypoints of this network (name or file) that repeat in "
        "random views of the image (homographic adaptation)",
    )
    label.add_argument(
        "--device", type=device, default="cpu", help="torch device for --model (default cpu)"
    )
    label.add_argument(
        "--views",
        type=count,
        help="number of random views for the repeat rate (default 5; 12 with --model)",
    )
    label.add_argument(
        "--most",
        type=count,
        default=2000,
        help="maximum number of keypoints per image (default 2000)",
    )
    _add_bag(label)


def _add_quantize(commands: argparse._SubParsersAction) -> None:
    quantize = add_command(
        commands,
        "quantize",
        "measure a network's ranges on images, so that it can run in int8",
        "quantize tiny --images images/ --out tiny_int8.safetensors",
        _quantize,
    )
    quantize.add_argument("model", help="network's name or weights file")
    quantize.add_argument("--images", type=Path, help="folder of training images")
    quantize.add_argument(
        "--out", type=Path, required=True, help=".safetensors file to write; may be the model"
    )
    quantize.add_argument(
        "--most", type=count, default=100, help="images to measure on (default 100)"
    )
    _add_bag(quantize)


def _add_train(commands: argparse._SubParsersAction) -> None:
    train = add_command(
        commands,
        "train",
        "train a network by a recipe, or resume an interrupted run",
        "train --config tiny --images images/ --out runs/tiny",
        _train,
    )
    train.add_argument(
        "--config",
        default="tiny",
        help="recipe: tiny, base, finetune (needs --from), paper, or a YAML file (default tiny)",
    )
    train.add_argument(
        "--images", type=Path, help="folder of training images, searched recursively"
    )
    train.add_argument("--out", type=Path, required=True, help="folder of the run")
    train.add_argument(
        "--labels",
        type=Path,
        help="labels from `kp label` for the first stage; those of the recipe are computed if "
        "omitted",
    )
    train.add_argument("--from", dest="start", help="weights to start from: a name or a file")
    train.add_argument("--device", type=device, default="cpu", help="torch device (default cpu)")
    train.add_argument(
        "--minutes",
        type=positive,
        help="stop after this time with a checkpoint; the same command resumes",
    )
    train.add_argument(
        "--workers",
        type=count_or_zero,
        default=1,
        help="number of processes that read images (default 1)",
    )
    train.add_argument(
        "--middlebury",
        type=Path,
        help="folder of scenes for `kp evaluate middlebury`, to validate on as well",
    )
    _add_bag(train)

    uncertainty = add_command(
        commands,
        "uncertainty",
        "calibrate the standard deviations and the confidence that a network publishes",
        "uncertainty runs/tiny/best.safetensors --scenes middlebury/ --images images/",
        _uncertainty,
    )
    uncertainty.add_argument("model", help="network: a name or a weights file")
    uncertainty.add_argument(
        "--scenes",
        type=Path,
        required=True,
        help="folder of scenes as for `kp evaluate middlebury`; those with PFM maps calibrate "
        "the standard deviation of the disparity",
    )
    uncertainty.add_argument(
        "--images",
        type=Path,
        help="folder of training images: views of them, whose truth is exact, calibrate the "
        "standard deviation of the positions",
    )
    uncertainty.add_argument(
        "--most", type=count, default=100, help="images to make views of (default 100)"
    )
    uncertainty.add_argument(
        "--out",
        type=Path,
        help="file to write (default: NAME.uncertainty.safetensors beside the weights, where "
        "the front end looks for it)",
    )
    uncertainty.add_argument(
        "--leave-out", action="append", default=[], metavar="SCENE", help="may be repeated"
    )
