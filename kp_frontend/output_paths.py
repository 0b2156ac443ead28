"""Checks of the paths that a command writes to, before it starts minutes or hours of work."""

from __future__ import annotations

import tempfile
from pathlib import Path


def check_file(path: Path | None, beside: bool = False) -> None:
    """Check that a file can be written; makes its folder. An existing file is not changed.

    Args:
        path: the file; None if a command writes none.
        beside: whether the command writes other files next to it, such as a new file that then
            replaces it. A device cannot be replaced.

    Raises:
        ValueError: the path is a folder, nothing can be written there, or, with `beside`, it is a
            device or a pipe.
    """
    if path is None:
        return
    try:
        if path.is_dir():
            raise ValueError(f"{path} is a folder, not a file")
        exists = path.exists()  # also a device or a pipe, such as /dev/stdout
        if exists and beside and not path.is_file():
            raise ValueError(f"{path} is a device or a pipe, not a file")
        if exists:
            path.open("ab").close()
    except OSError as error:
        raise ValueError(f"cannot write to {path}: {error.strerror}") from error
    if beside:
        make_folder(path.parent)
    elif not exists:
        make_folder(path.resolve().parent)  # a link may point to another folder


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
