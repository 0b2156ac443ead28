"""Commands of the robot: demo, node, soak, doctor, bench."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from kp_frontend.cli import add_command, count, positive, rate, size


def _demo(arguments: argparse.Namespace) -> None:
    from rclpy.executors import ExternalShutdownException

    from kp_frontend.tools.demo import run_demo

    try:
        run_demo(arguments.out, arguments.frames, arguments.rate)
    except ExternalShutdownException:
        sys.exit(143)  # as a shell says SIGTERM


def _node(arguments: argparse.Namespace) -> None:
    from kp_frontend.ros.node import main as run_node

    sys.exit(run_node(arguments.ros_args))


def _soak(arguments: argparse.Namespace) -> None:
    from rclpy.executors import ExternalShutdownException

    from kp_frontend.tools.soak import run_soak

    try:
        result = run_soak(arguments.minutes, arguments.json, arguments.rate, arguments.seed)
    except ExternalShutdownException:
        sys.exit(130)  # as a shell says SIGINT
    if result["errors"]:
        raise RuntimeError(f"soak: {len(result['errors'])} errors, see the table above")


def _doctor(arguments: argparse.Namespace) -> None:
    from kp_frontend.tools.doctor import run_doctor

    report = run_doctor(arguments.model, arguments.size)
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


def _bench(arguments: argparse.Namespace) -> None:
    from kp_frontend.tools.bench import run_bench

    run_bench(
        arguments.sizes,
        arguments.methods.split(","),
        arguments.backends.split(","),
        arguments.rounds,
        arguments.json,
        arguments.memory_calls,
    )


def _sizes(text: str) -> list[tuple[int, int]]:
    return [size(part) for part in text.split(",")]


def add_commands(commands: argparse._SubParsersAction) -> None:
    """Add them to `kp`."""
    demo = add_command(
        commands,
        "demo",
        "replay a real stereo pair through the real node and measure",
        "demo --out demo_out",
        _demo,
    )
    demo.add_argument("--out", type=Path, default=Path("demo_out"), help="folder for the results")
    demo.add_argument("--frames", type=count, default=100, help="pairs to send (default 100)")
    demo.add_argument("--rate", type=rate, default=10.0, help="pairs a second (default 10)")

    node = add_command(
        commands,
        "node",
        "run the node; what follows goes to ROS",
        "node --ros-args -p model:=tiny -r left/image:=/stereo/left/image_rect",
        _node,
    )
    node.set_defaults(ros_args=[])

    soak = add_command(
        commands,
        "soak",
        "stream with random faults through the node; check accounting, latency, memory",
        "soak --minutes 10 --json soak.json",
        _soak,
    )
    soak.add_argument(
        "--minutes", type=positive, default=10.0, help="how long to stream (default 10)"
    )
    soak.add_argument("--rate", type=rate, default=10.0, help="pairs a second (default 10)")
    soak.add_argument("--seed", type=int, default=0, help="of the faults (default 0)")
    soak.add_argument(
        "--json", type=Path, help="file for the result; the node's log goes beside it"
    )

    doctor = add_command(
        commands,
        "doctor",
        "what this machine has, and which backend is taken and why",
        "doctor --size 1280x720",
        _doctor,
    )
    doctor.add_argument("--model", default="tiny", help="network's name or weights file")
    doctor.add_argument(
        "--size", type=size, default="640x480", help="of the images (default 640x480)"
    )
    doctor.add_argument("--json", type=Path, help="file to write the report to")

    bench = add_command(
        commands,
        "bench",
        "time and memory beside ORB, SIFT and a SuperPoint-shaped network",
        "bench --sizes 640x480 --methods tiny,orb --json bench.json",
        _bench,
    )
    bench.add_argument("--sizes", type=_sizes, default="640x480,1280x720,1920x1080")
    bench.add_argument(
        "--methods",
        default="tiny,base,orb,sift,superpoint_shape",
        help="networks by name or weights file, and peers: orb, sift, superpoint_shape",
    )
    bench.add_argument("--backends", default="tensorrt,cuda,openvino,torch")
    bench.add_argument("--rounds", type=count, default=30, help="calls of each (default 30)")
    bench.add_argument("--json", type=Path, help="file to write")
    bench.add_argument(
        "--memory-calls",
        type=int,
        default=3,
        help="calls of each in a process of its own to measure memory (default 3; 0: none)",
    )
