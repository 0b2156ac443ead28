"""torch.compile for the GPU, with its result in the engine cache."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn

from kp_frontend.backends.engine_cache import EngineCache

T = TypeVar("T")
Compiled = Callable[..., Tensor]

LEAST_CAPABILITY = (7, 0)  # of a GPU that Triton supports
DURATION = "about a minute on a desktop and some minutes on a Jetson"
# Folders in which torch and Triton look for what they have compiled before.
FOLDERS = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")


def c_compiler() -> str | None:
    """Path of the C compiler that Triton uses, or None."""
    named = os.environ.get("CC")
    return shutil.which(named) if named else shutil.which("gcc") or shutil.which("clang")


def triton_version() -> str | None:
    """Version of Triton, or None."""
    if importlib.util.find_spec("triton") is None:
        return None
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "of unknown version"


def compiler_unavailable() -> str | None:
    """The reason why torch cannot compile for the GPU of this machine, or None."""
    if triton_version() is None:
        return "Triton is not installed (`pip install triton`)"
    if c_compiler() is None:
        return "Triton needs a C compiler (`apt install gcc python3-dev`)"
    capability = torch.cuda.get_device_capability()
    if capability < LEAST_CAPABILITY:
        have, need = (".".join(map(str, version)) for version in (capability, LEAST_CAPABILITY))
        return f"the GPU has compute capability {have}, Triton needs {need}"
    return None


@contextmanager
def own_folders() -> Iterator[None]:
    """Let torch and Triton work in an empty folder, so that only the engine cache is trusted."""
    before = {name: os.environ.get(name) for name in FOLDERS}
    with tempfile.TemporaryDirectory(prefix="kp_compile_", ignore_cleanup_errors=True) as folder:
        for name in FOLDERS:
            os.environ[name] = os.path.join(folder, name.lower())
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value


def compiled_engine(
    step: nn.Module,
    example: tuple[Tensor, ...],
    key: Mapping[str, str],
    cache: EngineCache,
    capture: Callable[[Compiled], T],
) -> T:
    """The engine that `capture` makes of a compiled step.

    What torch compiled is stored in the engine cache, from where a new process loads it in seconds.

    Args:
        step: a module of fixed shapes.
        example: its inputs, on its device.
        key: everything that the result depends on.
        cache: where it is stored.
        capture: makes an engine of the compiled step and checks it; raises `RuntimeError` if it
            must not be used.

    Raises:
        Exception: any error of the compiler, or that of `capture`.
    """
    # Private, but without it the file would also hold what this process compiled before.
    from torch.compiler._cache import CacheArtifactManager

    compiled = torch.compile(step, fullgraph=True, dynamic=False)

    def build() -> bytes:
        torch.compiler.reset()  # also what a stored file led to that was refused
        with CacheArtifactManager.with_fresh_cache():
            with torch.inference_mode():
                compiled(*example)
            saved = torch.compiler.save_cache_artifacts()
        if saved is None:
            raise RuntimeError("torch's caches of compiled code are switched off")
        return saved[0]

    def load(stored: bytes) -> T:
        torch.compiler.load_cache_artifacts(stored)
        return capture(compiled)

    with own_folders():
        return cache.engine(key, build, load, DURATION)
