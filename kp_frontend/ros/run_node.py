"""Runs a node in a process of its own: start, spin, and an orderly end."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from typing import TypeVar

import rclpy
from rclpy.exceptions import ParameterException
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
from rclpy.node import Node

from kp_frontend.ros.parameters import warn_of_unknown
from kp_frontend.ros.rclpy_private import RCLError, UnknownROSArgsError

CANNOT_START = (ValueError, ParameterException, RCLError, UnknownROSArgsError)

AnyNode = TypeVar("AnyNode", bound=Node)


def run_node(
    name: str,
    make: Callable[[], AnyNode],
    close: Callable[[AnyNode], None],
    args: list[str] | None = None,
    start: Callable[[AnyNode], None] | None = None,
) -> int:
    """Run a node until it is interrupted.

    Args:
        name: of the node, for the error message.
        make: creates the node.
        close: called at the end, before the node is destroyed.
        args: command line of ROS; None: that of the process.
        start: called before the node spins.

    Returns:
        Exit status: 1 if the node cannot start, else 0.
    """
    # SIGTERM ends the node like an interrupt, also while it builds its engine.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    node = None
    try:
        try:
            rclpy.init(args=args)
            node = make()
            warn_of_unknown(node)
            if start is not None:
                start(node)
        except CANNOT_START as error:
            print(f"{name} cannot start: {' '.join(str(error).split())}", file=sys.stderr)
            return 1
        executor = SingleThreadedExecutor()
        executor.add_node(node)
        executor.spin()
    except (KeyboardInterrupt, ExternalShutdownException):
        return 0
    except RCLError:
        if rclpy.ok():  # otherwise the node was interrupted during a callback
            raise
    finally:
        if node is not None:
            close(node)
            node.destroy_node()
        rclpy.try_shutdown()
    return 0
