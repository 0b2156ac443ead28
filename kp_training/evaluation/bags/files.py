"""Which files make a bag, and how they are opened."""

from __future__ import annotations

import re
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import yaml
import zstandard

from kp_training.evaluation.bags import storage_mcap, storage_ros1, storage_sqlite
from kp_training.evaluation.bags.storage import Note, StorageError, StorageFile, reason_of

METADATA = "metadata.yaml"
SUFFIXES = (".mcap", ".db3", ".bag")
FORMATS = (
    (storage_mcap.MAGIC, storage_mcap.McapFile),
    (storage_sqlite.MAGIC, storage_sqlite.SqliteFile),
    (storage_ros1.MAGIC, storage_ros1.Ros1File),
)
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
# What a broken metadata.yaml raises.
UNREADABLE = (
    OSError, UnicodeError, yaml.YAMLError, KeyError, TypeError, ValueError, RecursionError,
)  # fmt: skip


@dataclass
class BagFiles:
    """The files of a bag in order, and the messages of each topic that metadata.yaml counts."""

    paths: list[Path]
    counts: Counter[str] = field(default_factory=Counter)


def find_files(path: Path, note: Note) -> BagFiles:
    """The files of a bag: a file itself, or what the metadata.yaml of a folder lists.

    Without a readable metadata.yaml (a recording that was killed, files that were copied) all bag
    files of the folder are taken, in the order of their names.

    Raises:
        StorageError: nothing is there.
    """
    if not path.is_dir():
        return BagFiles([path])
    remedy = "`ros2 bag reindex` writes it anew"
    there = sorted((p for p in path.iterdir() if _is_bag_file(p)), key=_natural)
    if (path / METADATA).is_file():
        try:
            listed, counts = _read_metadata(path / METADATA)
        except UNREADABLE as error:
            why = reason_of(error)
            note(f"{METADATA} cannot be read ({why}), its folder is read without it: {remedy}")
        else:
            paths = [path / name for name in dict.fromkeys(listed)]
            for missing in [p for p in paths if not p.is_file()]:
                note(f"{missing.name} is listed in {METADATA}, but is not there")
            for more in [p for p in there if p not in paths]:
                note(f"{more.name} is not listed in {METADATA} and is left out: {remedy}")
            found = [p for p in paths if p.is_file()]
            if found:
                return BagFiles(found, counts)
            if not there:
                raise StorageError(f"none of the files that {METADATA} lists is there")
            note(f"none of the files that {METADATA} lists is there, all others are read")
    elif there:
        note(f"the folder has no {METADATA}, its bag files are read without it: {remedy}")
    if not there:
        raise StorageError(f"the folder has neither {METADATA} nor a .mcap, .db3 or .bag file")
    return BagFiles(there)


def is_bag(path: Path) -> bool:
    """Whether a path is a bag, not a folder of images: a file, or a folder with bag files."""
    if not path.is_dir():
        return True
    return (path / METADATA).is_file() or any(_is_bag_file(p) for p in path.iterdir())


def _is_bag_file(path: Path) -> bool:
    return path.is_file() and path.name.removesuffix(".zstd").endswith(SUFFIXES)


def _natural(path: Path) -> list[tuple[int, str]]:
    """Sorts drive_9 before drive_10."""
    return [(int(part or 0), text) for text, part in re.findall(r"(\D*)(\d*)", path.name)]


def _read_metadata(path: Path) -> tuple[list[str], Counter[str]]:
    """Names of the files, and the number of messages of each topic."""
    information = yaml.safe_load(path.read_text())["rosbag2_bagfile_information"]
    names = [Path(name).name for name in information["relative_file_paths"]]
    counts: Counter[str] = Counter()
    for topic in information["topics_with_message_count"]:
        counts[str(topic["topic_metadata"]["name"])] += int(topic["message_count"])
    return names, counts


def open_file(path: Path, note: Note, stack: ExitStack) -> StorageFile:
    """Open a file of a bag by what it holds, whatever its name. It is closed with the stack.

    Raises:
        StorageError: it holds no bag.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        begin = file.read(16)
    if not begin:
        raise StorageError(f"{path.name} is empty")
    if begin.startswith(ZSTD_MAGIC):
        path = _decompress(path, Path(stack.enter_context(TemporaryDirectory(prefix="kp_bag_"))))
        with path.open("rb") as file:
            begin = file.read(16)
    for magic, kind in FORMATS:
        if begin.startswith(magic):
            opened = kind(path, note)
            stack.callback(opened.close)
            return opened
    raise StorageError(f"{path.name} is no bag: it holds neither MCAP, sqlite3 nor a ROS 1 bag")


def _decompress(path: Path, folder: Path) -> Path:
    """A file of a bag that is compressed as a whole."""
    result = folder / path.name.removesuffix(".zstd")
    try:
        with path.open("rb") as source, result.open("wb") as target:
            zstandard.ZstdDecompressor().copy_stream(source, target)
    except zstandard.ZstdError as error:
        raise StorageError(f"{path.name} cannot be decompressed: {reason_of(error)}") from error
    if not result.stat().st_size:
        raise StorageError(f"{path.name} is cut or empty: nothing of it can be decompressed")
    return result
