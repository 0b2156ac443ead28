"""Commands of evaluation: evaluate."""

from __future__ import annotations

import argparse
from pathlib import Path

from kp_frontend.cli import add_command, count, size
from kp_training.evaluation.bags import commands as bag_commands

METHODS = "tiny,sift,sift_flann,rootsift,orb"


def _middlebury(arguments: argparse.Namespace) -> None:
    from kp_training.evaluation.middlebury.evaluation import evaluate_middlebury
    from kp_training.evaluation.middlebury.report import middlebury_report

    arguments.out.mkdir(parents=True, exist_ok=True)
    evaluation = evaluate_middlebury(
        arguments.folder,
        _methods(arguments),
        arguments.max_keypoints,
        arguments.size,
        arguments.seeded,
        arguments.show,
    )
    _write(evaluation.metrics, arguments.out)
    middlebury_report(evaluation).write(arguments.out / "report.html")
    _print(evaluation.metrics, arguments.out)


def _homography(arguments: argparse.Namespace) -> None:
    from kp_training.evaluation.homography.evaluation import evaluate_homography
    from kp_training.evaluation.homography.report import homography_report

    arguments.out.mkdir(parents=True, exist_ok=True)
    evaluation = evaluate_homography(
        arguments.folder,
        _methods(arguments),
        arguments.max_keypoints,
        arguments.size,
        arguments.seeded,
    )
    _write(evaluation.metrics, arguments.out)
    homography_report(evaluation).write(arguments.out / "report.html")
    _print(evaluation.metrics, arguments.out)


def _methods(arguments: argparse.Namespace) -> list[str]:
    names = [name for name in arguments.methods.split(",") if name] + arguments.method
    if not names:
        raise ValueError("no method is given: name some with --methods or --method")
    return names


def _write(metrics: dict, out: Path) -> None:
    """Add how the run came about, and write metrics.json."""
    from kp_training.evaluation.results import provenance, write_metrics

    metrics["protocol"] |= provenance()
    write_metrics(out, metrics)


def _print(metrics: dict, out: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    from kp_training.evaluation.page import shown
    from kp_training.evaluation.results import without_value

    names = list(metrics["methods"])
    table = Table("metric", *names, title=f"mean over {len(metrics['scenes'])} scenes")
    for metric in metrics["methods"][names[0]]:
        table.add_row(metric, *(shown(metrics["methods"][name][metric]["mean"]) for name in names))
    console = Console()
    if not console.is_terminal:  # a file or a pipe: nothing needs to be cut off
        console = Console(width=240)
    console.print(table)
    for line in without_value(metrics):
        console.print(line, soft_wrap=True)
    for reason in metrics["protocol"]["skipped"]:
        console.print(f"skipped: {reason}", soft_wrap=True)
    for file in ("metrics.json", "report.html"):
        console.print(f"written: {out / file}", soft_wrap=True)


def _add_shared(command: argparse.ArgumentParser) -> None:
    """Options of every evaluation of methods on still images."""
    command.add_argument(
        "--out", type=Path, required=True, help="folder for metrics.json and report.html"
    )
    command.add_argument(
        "--methods",
        default=METHODS,
        help="comma-separated: networks by name or weights file, sift, sift_flann (ratio 0.7), "
        f"rootsift, orb (default {METHODS})",
    )
    command.add_argument(
        "--method",
        action="append",
        default=[],
        metavar="MODULE:FUNCTION",
        help="a method of your own, besides; may be given again; see docs/evaluation.md",
    )
    command.add_argument(
        "--max-keypoints", type=count, default=2048, help="per image (default 2048)"
    )
    command.add_argument(
        "--size", type=size, help="bring all images to this size, as 1920x1080 (default: native)"
    )
    command.add_argument(
        "--seeded", action="store_true", help="the same numbers (but for times) in every run"
    )


def add_commands(commands: argparse._SubParsersAction) -> None:
    """Add them to `kp`."""
    evaluate = commands.add_parser("evaluate", help="measure how good the features are")
    kinds = evaluate.add_subparsers(required=True, metavar="KIND")
    middlebury = add_command(
        kinds,
        "middlebury",
        "stereo pairs with ground truth disparity",
        "evaluate middlebury scenes/ --out out --methods tiny,sift,orb",
        _middlebury,
    )
    middlebury.add_argument(
        "folder", type=Path, help="folder of scenes in a Middlebury layout, or with scenes.json"
    )
    middlebury.add_argument("--show", help="scene of the report's pictures (default: the first)")
    _add_shared(middlebury)
    homography = add_command(
        kinds,
        "homography",
        "image pairs with ground truth homographies, as HPatches and Oxford's",
        "evaluate homography hpatches/ --out out --methods tiny,sift,orb",
        _homography,
    )
    homography.add_argument("folder", type=Path, help="folder of sequences")
    _add_shared(homography)
    bag_commands.add_evaluations(kinds)
