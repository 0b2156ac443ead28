"""Cache of built engines on disk.

The name of a file contains a digest of everything that the engine depends on. Its first lines
repeat this as text and add a digest of the rest. A file that is damaged, truncated, stale or from
another machine is therefore recognised: it is logged and rebuilt, and never used.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

log = logging.getLogger(__name__)
T = TypeVar("T")
KEPT = 64  # maximum number of engines; the oldest are deleted first
MAGIC = b"kp_frontend engine 1\n"


def default_folder() -> Path:
    """`$KP_ENGINE_CACHE`, or `kp_frontend` in the user's cache folder."""
    if os.environ.get("KP_ENGINE_CACHE"):
        return Path(os.environ["KP_ENGINE_CACHE"])
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "kp_frontend"


@dataclass(frozen=True)
class EngineCache:
    """A folder of engines.

    Nothing in it is unpickled here. torch unpickles parts of what it compiled itself, so the folder
    must belong to the user who runs the front end, as the default folder does.
    """

    folder: Path = field(default_factory=default_folder)

    def path(self, key: Mapping[str, str]) -> Path:
        """File of the engine of a key."""
        digest = hashlib.sha256(_words(key)).hexdigest()[:24]
        return self.folder / f"{key['backend']}-{digest}.engine"

    def read(self, key: Mapping[str, str]) -> bytes | None:
        """Read the engine of a key; None if there is none, or (with a warning) a bad file."""
        path = self.path(key)
        try:
            stored = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            log.warning("the engine cache cannot be read: %s", error)
            return None
        head, _, engine = stored.removeprefix(MAGIC).partition(b"\n\n")
        expected = _words(key) + hashlib.sha256(engine).hexdigest().encode()
        if not stored.startswith(MAGIC) or head != expected:
            log.warning(
                "%s is damaged or not an engine of kp_frontend; rebuilding the engine", path
            )
            return None
        return engine

    def write(self, key: Mapping[str, str], engine: bytes) -> None:
        """Store an engine, atomically. A folder that is not writable causes only a warning."""
        head = _words(key) + hashlib.sha256(engine).hexdigest().encode()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=self.folder) as folder:
                file = Path(folder) / "engine"
                file.write_bytes(MAGIC + head + b"\n\n" + engine)
                os.replace(file, self.path(key))
            engines = sorted(self.folder.glob("*.engine"), key=lambda p: p.stat().st_mtime)
            for old in engines[:-KEPT]:
                old.unlink(missing_ok=True)
        except OSError as error:
            log.warning("the engine could not be stored and will be rebuilt next time: %s", error)

    def engine(
        self,
        key: Mapping[str, str],
        build: Callable[[], bytes],
        load: Callable[[bytes], T],
        duration: str | None = None,
    ) -> T:
        """The engine of a key, loaded from disk or built.

        Args:
            key: everything that the engine depends on, as text, including `backend`.
            build: builds the serialised engine.
            load: loads and checks it; raises `RuntimeError` if it must not be used.
            duration: how long `build` takes, which is logged; None if it is not worth a message.

        Raises:
            RuntimeError: a newly built engine fails the check.
        """
        stored = self.read(key)
        if stored is not None:
            try:
                return load(stored)
            except RuntimeError as error:
                reason = " ".join(str(error).split())  # OpenVINO's errors have several lines
                log.warning("%s cannot be used, rebuilding the engine: %s", self.path(key), reason)
        if duration is not None:
            log.info(
                "building the engine of backend %s takes %s; it is stored in %s for later starts",
                key["backend"],
                duration,
                self.folder,
            )
        built = build()
        ready = load(built)
        self.write(key, built)
        return ready


def file_digest(path: str) -> str:
    """Digest of a file, such as the code that builds an engine, for the key of the engine."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]


def _words(key: Mapping[str, str]) -> bytes:
    return json.dumps(dict(key), sort_keys=True).encode() + b"\n"
