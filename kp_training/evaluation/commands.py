"""The evaluation command of `kp`: evaluate."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from kp_frontend.cli import add_bit_depth, add_command, count, listed, names, positive, rate, size
from kp_frontend.output_paths import make_folder

if TYPE_CHECKING:  # imported where used, so that `kp --help` loads neither torch nor matplotlib
    from rich.table import Table

    from kp_frontend.config import FrontendConfig
    from kp_training.evaluation.bags.stereo import Reading
    from kp_training.evaluation.bags.topics import StereoTopics
    from kp_training.evaluation.methods import Engine
    from kp_training.evaluation.page import Page

METHODS = "tiny,sift,sift_flann,rootsift,orb"


def _middlebury(arguments: argparse.Namespace) -> None:
    from kp_training.evaluation.middlebury.evaluation import evaluate_middlebury
    from kp_training.evaluation.middlebury.report import middlebury_report

    make_folder(arguments.out)
    evaluation = evaluate_middlebury(*_of_pairs(arguments), arguments.show, arguments.disturb)
    _finish_pairs(arguments.out, evaluation.metrics, middlebury_report(evaluation))


def _homography(arguments: argparse.Namespace) -> None:
    from kp_training.evaluation.homography.evaluation import evaluate_homography
    from kp_training.evaluation.homography.report import homography_report

    make_folder(arguments.out)
    evaluation = evaluate_homography(*_of_pairs(arguments))
    _finish_pairs(arguments.out, evaluation.metrics, homography_report(evaluation))


def _bag(arguments: argparse.Namespace) -> None:
    from rich.table import Table

    from kp_training.evaluation.bags import report
    from kp_training.evaluation.bags.evaluation import evaluate_bag
    from kp_training.evaluation.page import shown

    make_folder(arguments.out)
    result, example = evaluate_bag(
        arguments.bag,
        _topics(arguments),
        _config(arguments),
        arguments.out,
        reading=_reading(arguments),
        live=arguments.live,
        rate=arguments.rate,
    )
    methods = list(result["methods"])
    table = Table("metric", *methods, "pairs", title=f"mean over the pairs of {arguments.bag}")
    for row in report.mean_rows(result["methods"]):
        cells = (row.get(m) for m in methods)
        words = (shown(c[0]) if c else "none" for c in cells)
        table.add_row(row["metric"], *words, str(row["pairs"]))
    lines = report.accounting(result)
    if "live" in result:
        lines += report.live_lines(result["live"])
    _finish(arguments.out, result, report.bag_report(result, example), [table], lines)


def _odometry(arguments: argparse.Namespace) -> None:
    from rich.table import Table

    from kp_training.evaluation.odometry import report
    from kp_training.evaluation.odometry.evaluation import evaluate_odometry
    from kp_training.evaluation.page import shown
    from kp_training.evaluation.reasons import grouped

    make_folder(arguments.out)
    result = evaluate_odometry(
        arguments.sequence,
        _methods(arguments.methods),
        _config(arguments),
        _topics(arguments),
        reading=_reading(arguments),
        out=arguments.out,
    )
    rows = report.odometry_rows(result)
    sequence = result["sequence"]
    table = Table(*rows[0], title=f"{sequence['frames']} frames, {sequence['metres']:.1f} m")
    for row in rows:
        table.add_row(*map(shown, row.values()))
    left_out = [f"skipped: {reason}" for reason in grouped(sequence["left_out"])]
    tables = [table]
    if tracks := report.track_rows(result):
        tables.append(Table(*tracks[0], title="tracks"))
        for row in tracks:
            tables[-1].add_row(*map(shown, row.values()))
    _finish(arguments.out, result, report.odometry_report(result), tables, left_out)


def _methods(text: str, further: Iterable[str] = ()) -> list[str]:
    found = [*listed(text), *further]
    if not found:
        raise ValueError("no method is given; list some with --methods")
    return found


def _of_pairs(
    arguments: argparse.Namespace,
) -> tuple[Path, list[str], int, tuple[int, int] | None, bool, Engine]:
    """The common arguments of all evaluations of image pairs, in order."""
    from kp_frontend.config import FrontendConfig
    from kp_training.evaluation.methods import Engine

    a = arguments
    names = _methods(a.methods, a.method)
    FrontendConfig(backend=a.backend, precision=a.precision)  # checks the names
    engine = Engine(a.backend, a.precision)
    return a.folder, names, a.max_keypoints, a.size, a.seeded, engine


def _finish_pairs(out: Path, metrics: dict, page: Page) -> None:
    """`_finish` for an evaluation of image pairs: one table row per metric."""
    from rich.table import Table

    from kp_training.evaluation.page import shown
    from kp_training.evaluation.results import provenance, without_value

    metrics["protocol"] |= provenance()
    names = list(metrics["methods"])
    table = Table("metric", *names, title=f"mean over {len(metrics['scenes'])} scenes")
    for metric in metrics["methods"][names[0]]:
        table.add_row(metric, *(shown(metrics["methods"][name][metric]["mean"]) for name in names))
    tables = [table]
    if "disturbed" in metrics:
        tables.append(Table("disturbance", *names, title="disparity accuracy / correct matches"))
        for found in metrics["disturbed"].values():
            values = (found["methods"][name] for name in names)
            cells = (
                " / ".join(shown(v[m]["mean"]) for m in ("disparity_accuracy", "correct_matches"))
                for v in values
            )
            tables[-1].add_row(found["what"], *cells)
    skipped = [f"skipped: {reason}" for reason in metrics["protocol"]["skipped"]]
    _finish(out, metrics, page, tables, [*without_value(metrics), *skipped])


def _finish(out: Path, metrics: dict, page: Page, tables: list[Table], lines: list[str]) -> None:
    """Write metrics.json and report.html, then print the tables and `lines`."""
    from rich.console import Console

    from kp_training.evaluation.results import write_metrics

    write_metrics(out, metrics)
    page.write(out / "report.html")
    console = Console()
    if not console.is_terminal:  # a file or a pipe: do not truncate columns
        console = Console(width=240)
    for table in tables:
        console.print(table)
    for line in (*lines, *(f"written: {out / file}" for file in ("metrics.json", "report.html"))):
        console.print(line, soft_wrap=True, markup=False)


def _topics(arguments: argparse.Namespace) -> StereoTopics:
    from kp_training.evaluation.bags.topics import StereoTopics

    names = (f.name for f in fields(StereoTopics))
    return StereoTopics(**{name: getattr(arguments, name, None) for name in names})


def _reading(arguments: argparse.Namespace) -> Reading:
    from kp_training.evaluation.bags.stereo import Reading

    names = (f.name for f in fields(Reading) if hasattr(arguments, f.name))
    return Reading(**{name: getattr(arguments, name) for name in names})


def _config(arguments: argparse.Namespace) -> FrontendConfig:
    from kp_frontend.config import FrontendConfig

    names = ("model", "backend", "precision", "threads", "max_keypoints")
    return FrontendConfig(**{n: getattr(arguments, n) for n in names if hasattr(arguments, n)})


def _seconds(text: str) -> float:
    """Argument type: a duration."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1e6:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds")
    return value


def _offset(text: str) -> float:
    """Argument type: a clock offset in seconds."""
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not abs(value) < 1e6:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds")
    return value


def _add_camera(command: argparse.ArgumentParser) -> None:
    """Add the options for the topics of a bag and for the front end."""
    for name, what in (
        ("left", "left images (Image or CompressedImage)"),
        ("right", "right images"),
        ("left-info", "camera_info of the left images"),
        ("right-info", "camera_info of the right images"),
    ):
        command.add_argument(
            f"--{name}", metavar="T", help=f"topic of the {what} (default: guessed)"
        )
    command.add_argument(
        "--slop", type=_seconds, default=0.0, metavar="S",
        help="maximum difference of the time stamps of a pair in seconds (default 0)",
    )  # fmt: skip
    command.add_argument(
        "--offset", type=_offset, default=0.0, metavar="S",
        help="clock of the right camera minus that of the left one in seconds (default 0)",
    )  # fmt: skip
    command.add_argument(
        "--use-receive-times", action="store_true", dest="receive_times",
        help="use the times at which the bag received the messages instead of their time stamps",
    )  # fmt: skip
    command.add_argument("--raw", action="store_true", help="the images are not rectified")
    add_bit_depth(command)
    command.add_argument(
        "--baseline", type=positive, metavar="M",
        help="baseline of the rig in metres, instead of that of camera_info",
    )  # fmt: skip
    command.add_argument("--backend", default="auto", help="backend of the networks (default auto)")
    command.add_argument(
        "--precision", default="auto", help="precision of the networks (default auto)"
    )
    command.add_argument(
        "--threads", type=count, default=0, help="number of CPU threads (default: all cores)"
    )
    command.add_argument("--out", type=Path, required=True, help="folder for the results")


def _add_poses(command: argparse.ArgumentParser) -> None:
    """Add the options for the true poses of a bag."""
    command.add_argument(
        "--poses", dest="pose", metavar="T",
        help="topic of the true poses (PoseStamped, PoseWithCovarianceStamped, Odometry or "
        "TransformStamped; default: guessed)",
    )  # fmt: skip
    command.add_argument(
        "--pose-axes", choices=("optical", "body"), default="optical",
        help="axes of the true poses: those of the left camera, z forward (default), or of a body "
        "frame, x forward",
    )  # fmt: skip


def _add_shared(command: argparse.ArgumentParser) -> None:
    """Add the options of the evaluations on still images."""
    command.add_argument(
        "--out", type=Path, required=True, help="folder for metrics.json and report.html"
    )
    command.add_argument(
        "--methods",
        default=METHODS,
        help="comma-separated list: network names or weights files, sift, sift_flann (FLANN, ratio "
        f"test 0.7), rootsift, orb (default {METHODS})",
    )
    command.add_argument(
        "--method",
        action="append",
        default=[],
        metavar="MODULE:FUNCTION",
        help="add a method of your own; can be repeated; see docs/evaluation.md",
    )
    command.add_argument(
        "--max-keypoints",
        type=count,
        default=2048,
        help="maximum keypoints per image (default 2048)",
    )
    command.add_argument(
        "--size",
        type=size,
        help="resize all images, for example to 1920x1080 (default: native size)",
    )
    command.add_argument(
        "--seeded",
        action="store_true",
        help="seed all random generators: every run writes the same numbers, except times",
    )
    command.add_argument(
        "--backend", default="torch", help="of the networks: auto, openvino ... (default torch)"
    )
    command.add_argument(
        "--precision", default="auto", help="of the networks: fp32, int8 ... (default auto)"
    )


def _add_bag(kinds: argparse._SubParsersAction) -> None:
    bag = add_command(
        kinds,
        "bag",
        "evaluate a bag of any stereo camera, with or without ground truth",
        "evaluate bag drive.mcap --left /left/image_rect --right /right/image_rect --out out",
        _bag,
    )
    bag.add_argument("bag", type=Path, help="folder, .mcap, .db3 or ROS 1 .bag file")
    _add_camera(bag)
    bag.add_argument(
        "--gt", dest="disparity", metavar="T",
        help="topic of the ground truth disparity (stereo_msgs/DisparityImage; default: guessed)",
    )  # fmt: skip
    bag.add_argument(
        "--features",
        metavar="T",
        help="evaluate recorded kp_msgs/StereoFeatures on topic T instead",
    )
    _add_poses(bag)
    bag.add_argument("--model", default="tiny", help="network name or weights file (default tiny)")
    bag.add_argument("--max-keypoints", type=count, default=1024, help="per image (default 1024)")
    bag.add_argument(
        "--live", action="store_true", help="also play the bag through a running node and compare"
    )
    bag.add_argument(
        "--rate", type=rate, default=1.0, metavar="R",
        help="with --live: playback rate (default 1)",
    )  # fmt: skip


def _add_odometry(kinds: argparse._SubParsersAction) -> None:
    odometry = add_command(
        kinds,
        "odometry",
        "evaluate features by stereo odometry against true poses",
        "evaluate odometry kitti/00 --methods tiny,sift,orb --out out",
        _odometry,
    )
    odometry.add_argument(
        "sequence", type=Path, help="folder in the layout of KITTI or EuRoC, or a bag with poses"
    )
    odometry.add_argument(
        "--methods",
        default="tiny,sift,orb",
        help="comma-separated list: sift, orb, klt (optical flow), networks or weights files "
        "(default tiny,sift,orb)",
    )
    _add_camera(odometry)
    _add_poses(odometry)
    odometry.add_argument(
        "--max-keypoints", type=count, default=2048, help="per image (default 2048)"
    )


def add_commands(commands: argparse._SubParsersAction) -> None:
    """Add the evaluation commands to `kp`."""
    evaluate = commands.add_parser("evaluate", help="measure the quality of features")
    kinds = evaluate.add_subparsers(required=True, metavar="KIND")
    middlebury = add_command(
        kinds,
        "middlebury",
        "evaluate methods on stereo pairs with ground truth disparity",
        "evaluate middlebury scenes/ --out out --methods tiny,sift,orb",
        _middlebury,
    )
    middlebury.add_argument(
        "folder", type=Path, help="folder of scenes in a layout of Middlebury, or with scenes.json"
    )
    middlebury.add_argument("--show", help="scene of the report's pictures (default: the first)")
    middlebury.add_argument(
        "--disturb", type=names, default=[], metavar="NAMES",
        help="also evaluate disturbed images: comma-separated list of right_dim, dark, noise20, "
        "motion9, motion9_right, jpeg20, rotate20; the numbers can be changed; see "
        "docs/evaluation.md",
    )  # fmt: skip
    _add_shared(middlebury)
    homography = add_command(
        kinds,
        "homography",
        "evaluate methods on image pairs with ground truth homographies (HPatches, Oxford)",
        "evaluate homography hpatches/ --out out --methods tiny,sift,orb",
        _homography,
    )
    homography.add_argument("folder", type=Path, help="folder of sequences, searched recursively")
    _add_shared(homography)
    _add_bag(kinds)
    _add_odometry(kinds)
