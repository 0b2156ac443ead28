"""Starts child processes for the demo and the evaluators, for example the node."""

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
    """An environment with a private DDS domain on this machine, unless the user has set one.

    The processes then do not exchange messages with other ROS processes.
    """
    environment = with_dds_profile(os.environ)
    environment.setdefault("ROS_DOMAIN_ID", str(random.randint(1, 101)))
    environment.setdefault("ROS_AUTOMATIC_DISCOVERY_RANGE", "LOCALHOST")
    return environment


@contextmanager
def process(*command: str, environment: dict[str, str], log: Path) -> Iterator[subprocess.Popen]:
    """Run a Python module in a child process. Interrupts it at the end and waits for it."""
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
    """Raise a RuntimeError with the end of its log if a process has ended."""
    if child.poll() is not None:
        raise RuntimeError(f"{name} ended with status {child.returncode}: {log.read_text()[-500:]}")
