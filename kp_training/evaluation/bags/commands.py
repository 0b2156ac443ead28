"""Commands on sequences: bag make, bag info, evaluate bag, evaluate odometry."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from dataclasses import fields
from pathlib import Path

from kp_frontend.cli import add_command, count, rate

LAYOUTS = ("middlebury", "kitti", "euroc", "folder")


def _make(arguments: argparse.Namespace) -> None:
    from rich.console import Console

    from kp_training.evaluation.bags.writer import write_bag
    from kp_training.evaluation.sequences import open_sequence

    given = arguments.rate or (1.0 if arguments.layout == "middlebury" else 10.0)
    sequence = open_sequence(arguments.layout, arguments.folder, given)
    sequence.raw |= arguments.raw
    counts = write_bag(sequence, arguments.out, arguments.storage)
    console = Console()
    for reason in sequence.left_out:
        console.print(f"left out: {reason}")
    console.print(f"{sum(counts.values())} messages written: {arguments.out}", soft_wrap=True)
    _print_topics(arguments.out)


def _info(arguments: argparse.Namespace) -> None:
    _print_topics(arguments.bag, arguments.json)


def _print_topics(path: Path, file: Path | None = None) -> None:
    from rich.console import Console
    from rich.table import Table

    from kp_training.evaluation.bags.reader import Bag

    with Bag(path) as bag:
        table = Table(title=f"{path}: {bag.duration:.3f} s, {bag.count} messages")
        for name in ("topic", "type", "messages", "Hz", "offered"):
            table.add_column(name, overflow="fold")
        topics = []
        for topic in bag.topics.values():
            hertz = (topic.count - 1) / bag.duration if topic.count > 1 and bag.duration else None
            shown = "" if hertz is None else f"{hertz:.2f}"
            table.add_row(topic.name, topic.type, str(topic.count), shown, topic.reliability)
            topics.append(vars(topic) | {"hz": hertz})
        report = {"path": str(path), "seconds": bag.duration, "start_ns": bag.start,
                  "messages": bag.count, "topics": topics}  # fmt: skip
    Console().print(table)
    if file:
        file.write_text(json.dumps(report, indent=1) + "\n")


def _bag(arguments: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.table import Table

    from kp_training.evaluation.bags import report
    from kp_training.evaluation.bags.evaluation import evaluate_bag
    from kp_training.evaluation.page import shown
    from kp_training.evaluation.results import write_metrics

    arguments.out.mkdir(parents=True, exist_ok=True)
    result, example = evaluate_bag(
        arguments.bag,
        _topics(arguments),
        _config(arguments),
        arguments.out,
        slop=arguments.slop,
        raw=arguments.raw,
        live=arguments.live,
        rate=arguments.rate,
    )
    write_metrics(arguments.out, result)
    command = shlex.join(["kp", *sys.argv[1:]])
    report.write_bag_report(result, example, command, arguments.out / "report.html")
    methods = list(result["methods"])
    table = Table("metric", *methods, "pairs", title=f"mean over the pairs of {arguments.bag}")
    for row in report.mean_rows(result["methods"]):
        cells = (row.get(m) for m in methods)
        words = (shown(c[0]) if c else "none" for c in cells)
        table.add_row(row["metric"], *words, str(row["pairs"]))
    console = Console()
    console.print(table)
    lines = report.accounting(result)
    if "live" in result:
        lines += report.live_lines(result["live"])
    for line in lines:
        console.print(line, soft_wrap=True)
    _print_written(console, arguments.out)


def _odometry(arguments: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.table import Table

    from kp_training.evaluation.odometry import report
    from kp_training.evaluation.odometry.evaluation import evaluate_odometry
    from kp_training.evaluation.page import shown
    from kp_training.evaluation.results import write_metrics

    methods = [name for name in arguments.methods.split(",") if name]
    if not methods:
        raise ValueError("no method is given: name some with --methods")
    arguments.out.mkdir(parents=True, exist_ok=True)
    result = evaluate_odometry(
        arguments.sequence,
        methods,
        _config(arguments),
        _topics(arguments),
        slop=arguments.slop,
        raw=arguments.raw,
    )
    write_metrics(arguments.out, result)
    command = shlex.join(["kp", *sys.argv[1:]])
    report.write_odometry_report(result, command, arguments.out / "report.html")
    rows = report.odometry_rows(result)
    sequence = result["sequence"]
    table = Table(*rows[0], title=f"{sequence['frames']} frames, {sequence['metres']:.1f} m")
    for row in rows:
        table.add_row(*map(shown, row.values()))
    console = Console()
    console.print(table)
    for reason in sequence["left_out"]:
        console.print(f"left out: {reason}", soft_wrap=True)
    _print_written(console, arguments.out)


def _print_written(console, out: Path) -> None:  # noqa: ANN001  rich is imported where it is used
    console.print(f"written: {out / 'metrics.json'}, {out / 'report.html'}", soft_wrap=True)


def _topics(arguments: argparse.Namespace):
    from kp_training.evaluation.bags.stereo import StereoTopics

    names = (f.name for f in fields(StereoTopics))
    return StereoTopics(**{name: getattr(arguments, name, None) for name in names})


def _config(arguments: argparse.Namespace):
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
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds")
    return value


def _add_camera(command: argparse.ArgumentParser) -> None:
    """Which topics of a bag are the stereo camera's, and how the front end runs on them."""
    for name, what in (
        ("left", "left images (Image or CompressedImage)"),
        ("right", "right images"),
        ("left-info", "camera_info of the left images"),
        ("right-info", "camera_info of the right images"),
    ):
        command.add_argument(f"--{name}", metavar="T", help=f"topic of the {what}; else guessed")
    command.add_argument(
        "--slop", type=_seconds, default=0.0, metavar="S",
        help="seconds by which the stamps of a pair may differ (default 0)",
    )  # fmt: skip
    command.add_argument("--raw", action="store_true", help="the images are not rectified")
    command.add_argument("--backend", default="auto", help="of the networks (default auto)")
    command.add_argument("--precision", default="auto", help="of the networks (default auto)")
    command.add_argument("--threads", type=count, default=0, help="of a CPU (default all)")
    command.add_argument("--out", type=Path, required=True, help="folder for the results")


def add_evaluations(kinds: argparse._SubParsersAction) -> None:
    """Add `bag` and `odometry` to `kp evaluate`."""
    bag = add_command(
        kinds,
        "bag",
        "a bag of any stereo camera, with ground truth or without",
        "evaluate bag drive.mcap --left /left/image_rect --right /right/image_rect --out out",
        _bag,
    )
    bag.add_argument("bag", type=Path, help="rosbag2 folder, .mcap or .db3 file")
    _add_camera(bag)
    bag.add_argument(
        "--gt", dest="disparity", metavar="T",
        help="topic of true disparity (stereo_msgs/DisparityImage); else guessed",
    )  # fmt: skip
    bag.add_argument(
        "--features", metavar="T", help="evaluate the recorded kp_msgs/StereoFeatures instead"
    )
    bag.add_argument("--model", default="tiny", help="network's name or weights file")
    bag.add_argument("--max-keypoints", type=count, default=1024)
    bag.add_argument(
        "--live", action="store_true", help="play it through the running node, too, and compare"
    )
    bag.add_argument(
        "--rate", type=rate, default=1.0, metavar="R",
        help="with --live: play R times as fast as recorded (default 1)",
    )  # fmt: skip

    odometry = add_command(
        kinds,
        "odometry",
        "a plain stereo odometry, the same for all methods, against true poses",
        "evaluate odometry kitti/00 --methods tiny,sift,orb --out out",
        _odometry,
    )
    odometry.add_argument(
        "sequence", type=Path, help="folder in KITTI's or EuRoC's layout, or a bag with poses"
    )
    odometry.add_argument(
        "--methods",
        default="tiny,sift,orb",
        help="comma-separated: sift, orb, a network's name or weights file",
    )
    _add_camera(odometry)
    odometry.add_argument(
        "--poses", dest="pose", metavar="T", help="topic of true poses (PoseStamped); else guessed"
    )
    odometry.add_argument("--max-keypoints", type=count, default=2048)


def add_commands(commands: argparse._SubParsersAction) -> None:
    """Add `kp bag`."""
    bag = commands.add_parser("bag", help="make a bag of a stereo sequence, or look into one")
    kinds = bag.add_subparsers(required=True, metavar="KIND")
    make = add_command(
        kinds,
        "make",
        "write a stereo sequence with calibration and ground truth as a rosbag2",
        "bag make kitti kitti/00 drive.mcap",
        _make,
    )
    make.add_argument("layout", choices=LAYOUTS, help="of the folder")
    make.add_argument("folder", type=Path)
    make.add_argument(
        "out", type=Path,
        help="the bag, a folder in rosbag2's way whatever its name; .db3 stores as sqlite3",
    )  # fmt: skip
    make.add_argument("--storage", choices=("mcap", "sqlite3"), help="instead of what OUT says")
    make.add_argument(
        "--rate", type=rate, help="pairs a second where there are no times (10; middlebury 1)"
    )
    make.add_argument(
        "--raw", action="store_true", help="the images are not rectified (EuRoC's never are)"
    )
    info = add_command(
        kinds, "info", "topics, types, counts and rates of a bag", "bag info drive.mcap", _info
    )
    info.add_argument("bag", type=Path, help="rosbag2 folder, .mcap or .db3 file")
    info.add_argument("--json", type=Path, help="file to write the same to")
