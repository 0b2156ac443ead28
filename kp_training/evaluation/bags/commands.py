"""Commands on bags: bag make, bag info."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from kp_frontend.cli import add_command, rate
from kp_frontend.output_paths import check_file

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
        console.print(f"left out: {reason}", soft_wrap=True, markup=False)
    written = f"{sum(counts.values())} messages written: {arguments.out}"
    console.print(written, soft_wrap=True, markup=False)
    _print_topics(arguments.out)


def _info(arguments: argparse.Namespace) -> None:
    check_file(arguments.json)
    _print_topics(arguments.bag, arguments.json)


def _print_topics(path: Path, file: Path | None = None) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from kp_training.evaluation.bags.reader import Bag

    console = Console()
    with Bag(path) as bag:
        bag.note_missing()
        table = Table(title=Text(f"{path}: {bag.duration:.3f} s, {bag.count} messages"))
        for name in ("topic", "type", "messages", "Hz", "offered"):
            table.add_column(name, overflow="fold")
        topics = []
        for topic in bag.topics.values():
            hertz = (topic.count - 1) / bag.duration if topic.count > 1 and bag.duration else None
            shown = "" if hertz is None else f"{hertz:.2f}"
            kind = topic.type if topic.readable else f"{topic.type} ({topic.encoding})".strip()
            cells = (topic.name, kind, str(topic.count), shown, topic.reliability)
            table.add_row(*map(Text, cells))
            topics.append(vars(topic) | {"hz": hertz})
        report = {"path": str(path), "seconds": bag.duration, "start_ns": bag.start,
                  "messages": bag.count, "topics": topics, "notes": bag.notes}  # fmt: skip
    console.print(table)
    for note in bag.notes:
        console.print(f"note: {note}", soft_wrap=True, markup=False)
    if file:
        file.write_text(json.dumps(report, indent=1) + "\n")


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
    make.add_argument(
        "--storage", choices=("mcap", "sqlite3"), help="default: by the suffix of OUT"
    )
    make.add_argument(
        "--rate", type=rate, help="pairs a second where there are no times (10; middlebury 1)"
    )
    make.add_argument(
        "--raw", action="store_true", help="the images are not rectified (EuRoC's never are)"
    )
    info = add_command(
        kinds, "info", "topics, types, counts and rates of a bag", "bag info drive.mcap", _info
    )
    info.add_argument("bag", type=Path, help="folder, .mcap, .db3 or ROS 1 .bag file")
    info.add_argument("--json", type=Path, help="file to write the same to")
