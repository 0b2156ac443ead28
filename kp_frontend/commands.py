"""The robot commands of `kp`: demo, node, soak, doctor, bench, export."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from kp_frontend.cli import add_command, count, count_or_zero, names, positive, rate, size
from kp_frontend.output_paths import check_file, check_folder


def _demo(arguments: argparse.Namespace) -> None:
    from rclpy.executors import ExternalShutdownException

    from kp_frontend.tools.demo import run_demo

    check_folder(arguments.out)
    try:
        run_demo(arguments.out, arguments.frames, arguments.rate)
    except ExternalShutdownException:
        sys.exit(143)  # exit status of SIGTERM in a shell


def _node(arguments: argparse.Namespace) -> None:
    from kp_frontend.ros.node import main as run_node

    sys.exit(run_node(arguments.ros_args))


def _soak(arguments: argparse.Namespace) -> None:
    from rclpy.executors import ExternalShutdownException

    from kp_frontend.tools.soak import run_soak

    check_file(arguments.json, beside=True)  # the log
    try:
        result = run_soak(
            arguments.minutes, arguments.json, arguments.rate, arguments.seed, arguments.transport
        )
    except ExternalShutdownException:
        sys.exit(130)  # exit status of SIGINT in a shell
    if result["errors"]:
        raise RuntimeError(f"soak: {len(result['errors'])} errors, see the table above")


def _doctor(arguments: argparse.Namespace) -> None:
    from kp_frontend.tools.doctor import run_doctor

    check_file(arguments.json)
    report = run_doctor(arguments.model, arguments.size)
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


def _bench(arguments: argparse.Namespace) -> None:
    from kp_frontend.tools.bench import run_bench

    check_file(arguments.json)
    run_bench(
        arguments.sizes,
        arguments.methods,
        arguments.backends,
        arguments.rounds,
        arguments.json,
        arguments.memory_calls,
    )


def _export(arguments: argparse.Namespace) -> None:
    from kp_frontend.config import FrontendConfig
    from kp_frontend.tools.export import run_export

    config = FrontendConfig(
        model=arguments.model,
        precision=arguments.precision,
        max_keypoints=arguments.max_keypoints,
        nms_radius=arguments.nms_radius,
        border=arguments.border,
        min_margin=float(arguments.min_margin),
        max_motion=0.0 if arguments.no_tracks else FrontendConfig.max_motion,
    )
    run_export(
        config,
        arguments.size,
        arguments.out,
        arguments.input == "raw",
        arguments.network_only,
        arguments.format,
        arguments.gpu,
    )


def _capability(text: str) -> tuple[int, int]:
    """Argument type: compute capability of a GPU, written `8.9`."""
    major, _, minor = text.partition(".")
    if not (major.isdigit() and minor.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r} is not a compute capability: write it as 8.9")
    return int(major), int(minor)


def _sizes(text: str) -> list[tuple[int, int]]:
    return [size(part) for part in names(text)]


def add_commands(commands: argparse._SubParsersAction) -> None:
    """Add the robot commands to `kp`."""
    for add in (_add_demo, _add_node, _add_soak, _add_doctor, _add_bench, _add_export):
        add(commands)


def _add_demo(commands: argparse._SubParsersAction) -> None:
    command = add_command(
        commands,
        "demo",
        "stream a real stereo pair through the real node and measure the result",
        "demo --out demo_out",
        _demo,
    )
    command.add_argument(
        "--out", type=Path, default=Path("demo_out"), help="folder for the results"
    )
    command.add_argument("--frames", type=count, default=100, help="number of pairs (default 100)")
    command.add_argument("--rate", type=rate, default=10.0, help="pairs per second (default 10)")


def _add_node(commands: argparse._SubParsersAction) -> None:
    command = add_command(
        commands,
        "node",
        "run the node; all further arguments are passed to ROS",
        "node --ros-args -p model:=tiny -r left/image:=/stereo/left/image_rect",
        _node,
    )
    command.set_defaults(ros_args=[])


def _add_soak(commands: argparse._SubParsersAction) -> None:
    command = add_command(
        commands,
        "soak",
        "stream images with random faults through the node; check counters, latency and memory",
        "soak --minutes 10 --json soak.json",
        _soak,
    )
    command.add_argument("--minutes", type=positive, default=10.0, help="duration (default 10)")
    command.add_argument("--rate", type=rate, default=10.0, help="pairs per second (default 10)")
    command.add_argument("--seed", type=int, default=0, help="seed of the faults (default 0)")
    command.add_argument(
        "--transport",
        choices=("raw", "compressed"),
        default="raw",
        help="type of the images: raw (default), or compressed: JPEG and PNG",
    )
    command.add_argument(
        "--json", type=Path, help="file for the result; the log of the node is written next to it"
    )


def _add_doctor(commands: argparse._SubParsersAction) -> None:
    command = add_command(
        commands,
        "doctor",
        "show hardware, versions and backends of this machine, for bug reports",
        "doctor --size 1280x720",
        _doctor,
    )
    command.add_argument(
        "--model", default="tiny", help="network name or weights file (default tiny)"
    )
    command.add_argument(
        "--size", type=size, default="640x480", help="image size (default 640x480)"
    )
    command.add_argument("--json", type=Path, help="file for the report")


def _add_bench(commands: argparse._SubParsersAction) -> None:
    command = add_command(
        commands,
        "bench",
        "measure time and memory of the front end, ORB, SIFT and a SuperPoint-shaped network",
        "bench --sizes 640x480 --methods tiny,orb --json bench.json",
        _bench,
    )
    command.add_argument(
        "--sizes",
        type=_sizes,
        default="640x480,1280x720,1920x1080",
        help="comma-separated list (default 640x480,1280x720,1920x1080)",
    )
    command.add_argument(
        "--methods",
        type=names,
        default="tiny,base,orb,sift,superpoint_shape",
        help="comma-separated list: network names or weights files, orb, sift, superpoint_shape "
        "(default: all)",
    )
    command.add_argument(
        "--backends",
        type=names,
        default="tensorrt,cuda,openvino,torch",
        help="comma-separated list; unavailable backends are skipped (default: all); a precision "
        "can follow a name: openvino:int8",
    )
    command.add_argument(
        "--rounds", type=count, default=30, help="timed calls of each method (default 30)"
    )
    command.add_argument("--json", type=Path, help="file for the results")
    command.add_argument(
        "--memory-calls",
        type=count_or_zero,
        default=3,
        help="calls of each method in a separate process to measure memory (default 3; 0: none)",
    )


def _add_export(commands: argparse._SubParsersAction) -> None:
    command = add_command(
        commands,
        "export",
        "write the whole pipeline, or the network alone, as an ONNX graph or a TensorRT engine",
        "export --format onnx --model tiny --size 640x480 -o tiny.onnx",
        _export,
    )
    command.add_argument(
        "--format",
        choices=("onnx", "tensorrt"),
        default="onnx",
        help="onnx (default), or tensorrt: an engine by the installed TensorRT",
    )
    command.add_argument(
        "--model", default="tiny", help="network name or weights file (default tiny)"
    )
    command.add_argument(
        "--size", type=size, default="640x480", help="image size (default 640x480)"
    )
    command.add_argument(
        "-o",
        "--out",
        type=Path,
        required=True,
        help="file to write; its description is written beside it, with the suffix .json",
    )
    command.add_argument(
        "--precision",
        choices=("auto", "fp32", "fp16", "int8"),
        default="auto",
        help="numeric precision of the network (default auto: fp32 for onnx, fp16 for tensorrt)",
    )
    command.add_argument(
        "--input",
        choices=("rectified", "raw"),
        default="rectified",
        help="type of the input images, as the parameter of the node (default rectified)",
    )
    command.add_argument(
        "--network-only", action="store_true", help="only the network, without what follows it"
    )
    command.add_argument(
        "--no-tracks", action="store_true", help="without tracks, as with max_motion 0"
    )
    command.add_argument(
        "--min-margin", action="store_true", help="for a node with min_margin above 0"
    )
    for name, default in (("max-keypoints", 1024), ("nms-radius", 2), ("border", 4)):
        command.add_argument(
            f"--{name}", type=int, default=default, help=f"as the parameter (default {default})"
        )
    command.add_argument(
        "--gpu",
        type=_capability,
        help="compute capability of the GPU, such as 8.9, for TensorRT for RTX (default: it builds "
        "for 8.6, 8.9 and 12.0; TensorRT builds for the GPU of this machine)",
    )
