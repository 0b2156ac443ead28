"""Checks of the paths that a command writes to, before it starts minutes or hours of work."""

from __future__ import annotations

import tempfile
from pathlib import Path


def check_file(path: Path | None) -> None:
    """Check that a file can be written; makes its folder. An existing file is not changed.

    Args:
        path: the file; None if a command writes none.

    Raises:
        ValueError: the path is a folder, or nothing can be written there.
    """
    if path is None:
        return
    try:
        if path.is_dir():
            raise ValueError(f"{path} is a folder, not a file")
        if path.exists():  # also a device or a pipe, such as /dev/stdout
            path.open("ab").close()
            return
    except OSError as error:
        raise ValueError(f"cannot write to {path}: {error.strerror}") from error
    make_folder(path.resolve().parent)


def make_folder(path: Path) -> None:
    """Make a folder for results, unless it exists.

    Raises:
        ValueError: as `check_folder`.
    """
    check_folder(path)
    path.mkdir(parents=True, exist_ok=True)


def check_folder(path: Path) -> None:
    """Check that a folder exists or can be made, and that files can be written to it.

    Raises:
        ValueError: the path, or a part of it, is a file, or nothing can be written there.
    """
    path = path.absolute()
    try:
        existing = next(p for p in (path, *path.parents) if p.exists())
        if not existing.is_dir():
            raise ValueError(f"{existing} is a file, not a folder")
        tempfile.TemporaryFile(dir=existing).close()
    except OSError as error:
        raise ValueError(f"cannot write to {path}: {error.strerror}") from error
