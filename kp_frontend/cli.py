"""`kp`: one command for everything.

Modules are imported where they are used: `kp evaluate` needs no ROS, `kp demo` no training code.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path


def _demo(arguments: argparse.Namespace) -> None:
    from rclpy.executors import ExternalShutdownException

    from kp_frontend.demo import run_demo

    try:
        run_demo(arguments.out, arguments.frames, arguments.rate)
    except ExternalShutdownException:
        sys.exit(143)  # as a shell says SIGTERM


def _node(arguments: argparse.Namespace) -> None:
    from kp_frontend.ros.node import main as run_node

    sys.exit(run_node(arguments.ros_args))


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


def _middlebury(arguments: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.table import Table

    from kp_training.evaluation import evaluate_middlebury

    metrics = evaluate_middlebury(
        arguments.folder, arguments.methods.split(","), arguments.max_keypoints
    )
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
    names = list(metrics["methods"])
    table = Table("metric", *names, title=f"mean over {len(metrics['scenes'])} scenes")
    for metric in metrics["methods"][names[0]]:
        means = (metrics["methods"][name][metric]["mean"] for name in names)
        cells = ("none" if m is None else f"{m:.3f}" if m < 10 else f"{m:.0f}" for m in means)
        table.add_row(metric, *cells)
    console = Console()
    console.print(table)
    for reason in metrics["protocol"]["skipped"]:
        console.print(f"skipped: {reason}")
    console.print(f"written: {arguments.out / 'metrics.json'}", soft_wrap=True)


def _size(text: str) -> tuple[int, int]:
    """Width and height from `640x480`.

    Raises:
        ValueError: it is not written so, or is absurd.
    """
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(p.isdigit() for p in parts):
        raise ValueError(f"{text!r} is not a size: write it as 640x480")
    width, height = map(int, parts)
    if not (64 <= width <= 8192 and 64 <= height <= 8192):
        raise ValueError(f"{text}: both sides must be between 64 and 8192")
    return width, height


def _doctor(arguments: argparse.Namespace) -> None:
    from kp_frontend.doctor import run_doctor

    report = run_doctor(arguments.model, _size(arguments.size))
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


def _bench(arguments: argparse.Namespace) -> None:
    from kp_frontend.bench import run_bench

    run_bench(
        [_size(text) for text in arguments.sizes.split(",")],
        arguments.methods.split(","),
        arguments.backends.split(","),
        arguments.rounds,
        arguments.json,
        arguments.memory_calls,
    )


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _rate(text: str) -> float:
    try:
        rate = float(text)
    except ValueError:
        rate = 0.0
    if not 0 < rate < 1e6:
        raise argparse.ArgumentTypeError(f"{text!r} is not a rate in Hz")
    return rate


def _device(text: str) -> str:
    if text == "cpu":  # always there, and torch takes seconds to import
        return text
    import torch

    try:
        torch.empty(0, device=text)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise argparse.ArgumentTypeError(f"torch cannot use {text!r}: {reason}") from error
    return text


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="kp", description="Stereo feature front end for ROS 2.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(group, name: str, text: str, example: str, run) -> argparse.ArgumentParser:  # noqa: ANN001
        command = group.add_parser(
            name, help=text, description=text, epilog=f"example: kp {example}"
        )
        command.set_defaults(run=run)
        return command

    demo = add(
        commands,
        "demo",
        "replay a real stereo pair through the real node and measure",
        "demo --out demo_out",
        _demo,
    )
    demo.add_argument("--out", type=Path, default=Path("demo_out"), help="folder for the results")
    demo.add_argument("--frames", type=_count, default=100, help="pairs to send (default 100)")
    demo.add_argument("--rate", type=_rate, default=10.0, help="pairs a second (default 10)")

    add(
        commands,
        "node",
        "run the node; what follows goes to ROS",
        "node --ros-args -p model:=tiny -r left/image:=/stereo/left/image_rect",
        _node,
    )

    doctor = add(
        commands,
        "doctor",
        "what this machine has, and which backend is taken and why",
        "doctor --size 1280x720",
        _doctor,
    )
    doctor.add_argument("--model", default="tiny", help="network's name or weights file")
    doctor.add_argument("--size", default="640x480", help="of the images (default 640x480)")
    doctor.add_argument("--json", type=Path, help="file to write the report to")

    bench = add(
        commands,
        "bench",
        "time and memory beside ORB, SIFT and a SuperPoint-shaped network",
        "bench --sizes 640x480 --methods tiny,orb --json bench.json",
        _bench,
    )
    bench.add_argument("--sizes", default="640x480,1280x720,1920x1080")
    bench.add_argument(
        "--methods",
        default="tiny,base,orb,sift,superpoint_shape",
        help="networks by name or weights file, and peers: orb, sift, superpoint_shape",
    )
    bench.add_argument("--backends", default="tensorrt,cuda,openvino,torch")
    bench.add_argument("--rounds", type=_count, default=30, help="calls of each (default 30)")
    bench.add_argument("--json", type=Path, help="file to write")
    bench.add_argument(
        "--memory-calls",
        type=int,
        default=3,
        help="calls of each in a process of its own to measure memory (default 3; 0: none)",
    )

    label = add(
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
        "--device", type=_device, default="cpu", help="torch device for --model (default cpu)"
    )

    train = add(
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
    train.add_argument("--device", type=_device, default="cpu", help="torch device (default cpu)")
    train.add_argument("--workers", type=int, default=1, help="processes that read images")

    evaluate = commands.add_parser("evaluate", help="measure how good the features are")
    kinds = evaluate.add_subparsers(required=True, metavar="KIND")
    middlebury = add(
        kinds,
        "middlebury",
        "stereo pairs with ground truth disparity",
        "evaluate middlebury scenes/ --out out --methods tiny,sift,orb",
        _middlebury,
    )
    middlebury.add_argument("folder", type=Path, help="folder with scenes.json")
    middlebury.add_argument("--out", type=Path, required=True, help="folder for metrics.json")
    middlebury.add_argument(
        "--methods",
        default="tiny,sift,orb",
        help="comma-separated: sift, orb, a network's name or weights file",
    )
    middlebury.add_argument("--max-keypoints", type=_count, default=2048)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; a user's mistake ends in one line and exit status 1."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    if arguments.run is _node:
        arguments.ros_args = rest
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        arguments.run(arguments)
    except (ValueError, OSError, RuntimeError, FloatingPointError) as error:
        print(f"kp: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
