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
    check_folder(path.resolve().parent)


def check_folder(path: Path) -> None:
    """Check that files can be written to a folder; makes it.

    Raises:
        ValueError: the path is a file, or nothing can be written there.
    """
    try:
        if path.exists() and not path.is_dir():
            raise ValueError(f"{path} is a file, not a folder")
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise ValueError(f"cannot write to {path}: {error.strerror}") from error
