"""Text files of users."""

from __future__ import annotations

from pathlib import Path


def read_text(path: Path) -> str:
    """The text of a file.

    Raises:
        ValueError: it is not UTF-8; the words name the file.
        OSError: it cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text file: byte {error.start} is not UTF-8") from error
