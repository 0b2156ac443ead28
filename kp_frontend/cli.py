"""The `kp` command with its subcommands.

Each package defines its own commands (`commands.py`). Modules are imported where they are used, so
`kp evaluate` needs no ROS and `kp demo` needs no training code.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from kp_frontend import __version__

# What bad input raises, once it has been turned into words.
USER_ERRORS = (ValueError, OSError, RuntimeError, FloatingPointError)
GROUPS = (
    "kp_frontend.commands",
    "kp_training.commands",
    "kp_training.evaluation.commands",
    "kp_training.evaluation.bags.commands",
)


def listed(text: str) -> list[str]:
    """The names in a comma-separated list. Spaces around them are ignored."""
    return [name for part in text.split(",") if (name := part.strip())]


def names(text: str) -> list[str]:
    """Argument type: names in a comma-separated list."""
    found = listed(text)
    if not found:
        raise argparse.ArgumentTypeError("the list is empty")
    return found


def count(text: str) -> int:
    """Argument type: a whole number above 0."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def count_or_zero(text: str) -> int:
    """Argument type: a whole number, 0 or above."""
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 0 or above")
    return int(text)


def positive(text: str) -> float:
    """Argument type: a number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def rate(text: str) -> float:
    """Argument type: a rate in Hz."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"{text!r} is not a rate in Hz")
    return value


def size(text: str) -> tuple[int, int]:
    """Argument type: width and height, written `640x480`."""
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(p.isdigit() for p in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size: write it as 640x480")
    width, height = map(int, parts)
    if not (64 <= width <= 8192 and 64 <= height <= 8192):
        raise argparse.ArgumentTypeError(f"{text}: both sides must be between 64 and 8192")
    return width, height


def device(text: str) -> str:
    """Argument type: a torch device of this machine."""
    if text == "cpu":  # always available, and importing torch takes seconds
        return text
    import torch

    try:
        torch.empty(0, device=text)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise argparse.ArgumentTypeError(f"torch cannot use {text!r}: {reason}") from error
    return text


def add_command(
    group: argparse._SubParsersAction,
    name: str,
    text: str,
    example: str,
    run: Callable[[argparse.Namespace], None],
) -> argparse.ArgumentParser:
    """Add a command that calls `run`. Its help shows `text` and an example."""
    command = group.add_parser(name, help=text, description=text, epilog=f"example: kp {example}")
    command.set_defaults(run=run)
    return command


def add_bit_depth(command: argparse.ArgumentParser) -> None:
    """Add `--bit-depth` to a command that reads images of a bag."""
    from kp_frontend.encodings import BIT_DEPTH_CHOICES

    command.add_argument(
        "--bit-depth",
        choices=BIT_DEPTH_CHOICES,
        default="auto",
        help="number of used bits in 16-bit images of a bag; auto (default): the bits of the "
        "largest value so far; with a number, 16UC1 is read as an image too",
    )


@contextmanager
def engine_builds_shown() -> Iterator[None]:
    """Print a line on stderr when an engine is built, which can take minutes."""
    logger = logging.getLogger("kp_frontend.backends.engine_cache")
    handler, level = logging.StreamHandler(), logger.level
    handler.setFormatter(logging.Formatter("kp: %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def _words(error: Exception) -> str:
    """The message of an error; for one of the operating system, the path, if any, and the
    reason."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; a user's mistake ends in one line and exit status 1."""
    os.environ.setdefault("OPENCV_LOG_LEVEL", "OFF")  # a damaged image is reported by the command
    parser = argparse.ArgumentParser(prog="kp", description="Stereo feature front end for ROS 2.")
    parser.add_argument("--version", action="version", version=f"kp {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for group in GROUPS:
        importlib.import_module(group).add_commands(commands)
    arguments, rest = parser.parse_known_args(argv)
    if hasattr(arguments, "ros_args"):
        arguments.ros_args = rest
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        with engine_builds_shown():
            arguments.run(arguments)
    except ImportError as error:  # a command of ROS where ROS is missing
        if (error.name or "").startswith(("kp_frontend", "kp_training")):
            raise
        print(
            f"kp: {error}; run `make setup`, or source a ROS 2 workspace and install "
            "requirements.txt",
            file=sys.stderr,
        )
        return 1
    except USER_ERRORS as error:
        print(f"kp: {_words(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
