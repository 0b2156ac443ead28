"""Backends that run the pipeline, one file each, with a common interface.

Each module has two functions. `unavailable() -> str | None` returns the reason why this machine
cannot run the backend, or None. `build(pipeline, example, options) -> Backend` builds the engine
and raises an exception if it fails. `torch` is the reference: the results of other backends must
agree with it (`agreement`), otherwise they are not used.
"""

from __future__ import annotations

import importlib
import logging
from dataclasses import dataclass, field
from types import ModuleType
from typing import TYPE_CHECKING, Protocol

import numpy as np
from torch import Tensor

from kp_frontend.backends.engine_cache import EngineCache

if TYPE_CHECKING:
    from kp_frontend.pipeline import StereoPipeline

log = logging.getLogger(__name__)

BACKENDS = ("tensorrt", "cuda", "openvino", "torch")  # `auto` tries them in this order
# A pair as one array (2, H, W) or as two (H, W), uint8.
Images = np.ndarray | tuple[np.ndarray, np.ndarray]
PRECISIONS = ("auto", "fp32", "fp16", "bf16", "int8")


@dataclass(frozen=True)
class BackendOptions:
    """User options of an engine."""

    threads: int = 0  # number of threads of a CPU backend; 0: one per core
    precision: str = "auto"  # by name; auto: the fastest precision that the machine supports well
    device: str = "cpu"  # torch device, for the backend torch only
    engine: str = ""  # file with an exported graph or an engine, for the backend tensorrt only
    cache: EngineCache = field(default_factory=EngineCache)


class Backend(Protocol):
    """A compiled pipeline: numpy arrays in, numpy arrays out, in the pipeline's order.

    The engine makes the only copy of the images, to where its device reads them.
    """

    name: str
    precision: str

    def __call__(self, images: Images, *others: np.ndarray) -> list[np.ndarray]: ...


def batch(images: Images) -> np.ndarray:
    """A pair as one array (2, H, W)."""
    return images if isinstance(images, np.ndarray) else np.stack(images)


def backend_module(name: str) -> ModuleType:
    """Import the module of a backend by name."""
    return importlib.import_module(f"kp_frontend.backends.{name}_backend")


def make_backend(
    name: str,
    pipeline: StereoPipeline,
    example: tuple[Tensor, ...],
    options: BackendOptions,
    left_out: frozenset[str] = frozenset(),
) -> Backend:
    """Build the named backend, or with `auto` the first one that this machine can run.

    Args:
        pipeline: the module to run, in eval mode.
        example: inputs that define all shapes and types.
        options: user options.
        left_out: backends that `auto` skips.

    Raises:
        ValueError: the backend or precision is unknown, or no backend can run on this machine.
    """
    if name not in ("auto", *BACKENDS):
        raise ValueError(f"unknown backend {name!r}: use auto or one of {', '.join(BACKENDS)}")
    if options.precision not in PRECISIONS:
        raise ValueError(
            f"unknown precision {options.precision!r}: use one of {', '.join(PRECISIONS)}"
        )
    reasons = []
    possible = tuple(choice for choice in BACKENDS if choice not in left_out)
    for choice in possible if name == "auto" else (name,):
        module = backend_module(choice)
        reason = module.unavailable()
        if reason is not None:
            log.info("backend %s is not available: %s", choice, reason)
        else:
            if options.engine and choice != "tensorrt":
                log.warning("engine %s is not used: it is for the backend tensorrt", options.engine)
            try:
                return module.build(pipeline, example, options)
            except Exception as error:  # libraries can raise anything; try the next backend
                reason = " ".join(f"{type(error).__name__}: {error}".split())  # in one line
                log.warning("backend %s failed: %s", choice, reason)
        reasons.append(f"{choice}: {reason}")
    raise ValueError("no usable backend: " + "; ".join(reasons))


def choose_precision(asked: str, best: str, possible: tuple[str, ...]) -> str:
    """The requested precision, or the best one for `auto`.

    Raises:
        RuntimeError: the backend does not support the requested precision.
    """
    if asked == "auto":
        return best
    if asked not in possible:
        raise RuntimeError(f"precision {asked} is not supported, only {', '.join(possible)}")
    return asked
