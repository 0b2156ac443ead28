"""Processes of our own beside this one, over DDS: the node for the demo and the evaluators."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kp_frontend.ros.environment import with_dds_profile


def private_environment() -> dict[str, str]:
    """An environment with a DDS domain of its own on this machine, unless the user chose one.

    Nothing else is disturbed or listened to.
    """
    environment = with_dds_profile(os.environ)
    environment.setdefault("ROS_DOMAIN_ID", str(random.randint(1, 101)))
    environment.setdefault("ROS_AUTOMATIC_DISCOVERY_RANGE", "LOCALHOST")
    return environment


@contextmanager
def process(*command: str, environment: dict[str, str], log: Path) -> Iterator[subprocess.Popen]:
    """Run a Python module in a process of its own, interrupted and waited for at the end."""
    with log.open("w") as file:
        child = subprocess.Popen(
            [sys.executable, "-m", *command], env=environment, stdout=file, stderr=file
        )
        try:
            yield child
        finally:
            if child.poll() is None:
                child.send_signal(signal.SIGINT)
            try:
                child.wait(10)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()


def check_alive(child: subprocess.Popen, log: Path, name: str) -> None:
    """Raise a RuntimeError with its last words if a process has ended."""
    if child.poll() is not None:
        raise RuntimeError(f"{name} ended with status {child.returncode}: {log.read_text()[-500:]}")
