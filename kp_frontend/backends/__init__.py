"""Engines that run the pipeline: one small file each, behind one interface.

Each module has `unavailable() -> str | None`, why this machine cannot run it, and
`build(pipeline, example, options) -> Backend`, which raises where it fails all the same. `torch` is
the reference: what another engine gives must agree with it (`agreement`), or it is not used.
"""

from __future__ import annotations

import importlib
import logging
from dataclasses import dataclass, field
from types import ModuleType
from typing import Protocol

import numpy as np
from torch import Tensor, nn

from kp_frontend.backends.engine_cache import EngineCache

log = logging.getLogger(__name__)

BACKENDS = ("tensorrt", "cuda", "openvino", "torch")  # in the order in which `auto` tries them
PRECISIONS = ("auto", "fp32", "fp16", "bf16")


@dataclass(frozen=True)
class BackendOptions:
    """What a user may choose about an engine."""

    threads: int = 0  # of a CPU backend; 0: one per core
    precision: str = "auto"  # the fastest that the backend and the machine do well, or one by name
    device: str = "cpu"  # of the backend torch
    cache: EngineCache = field(default_factory=EngineCache)


class Backend(Protocol):
    """A compiled pipeline: numpy arrays in, numpy arrays out, in the pipeline's order."""

    name: str
    precision: str
    # Where the engine wants the images, (2, H, W) uint8; None: it takes them wherever they are.
    images: np.ndarray | None

    def __call__(self, *inputs: np.ndarray) -> list[np.ndarray]: ...


def backend_module(name: str) -> ModuleType:
    """The module of a backend by name."""
    return importlib.import_module(f"kp_frontend.backends.{name}_backend")


def make_backend(
    name: str,
    pipeline: nn.Module,
    example: tuple[Tensor, ...],
    options: BackendOptions,
    left_out: frozenset[str] = frozenset(),
) -> Backend:
    """Build the named backend, or with `auto` the first one that this machine can run.

    Args:
        pipeline: the module to run, in eval mode.
        example: inputs that fix every shape and type.
        left_out: backends that `auto` passes over.

    Raises:
        ValueError: no such backend or precision, or the named one cannot run here.
    """
    if name not in ("auto", *BACKENDS):
        raise ValueError(f"unknown backend {name!r}: auto or one of {', '.join(BACKENDS)}")
    if options.precision not in PRECISIONS:
        raise ValueError(f"unknown precision {options.precision!r}: one of {', '.join(PRECISIONS)}")
    reasons = []
    possible = tuple(choice for choice in BACKENDS if choice not in left_out)
    for choice in possible if name == "auto" else (name,):
        module = backend_module(choice)
        reason = module.unavailable()
        if reason is not None:
            log.info("backend %s is left out: %s", choice, reason)
        else:
            try:
                return module.build(pipeline, example, options)
            except Exception as error:  # whatever a library does, the next engine may serve
                reason = f"{type(error).__name__}: {error}"
                log.warning("backend %s failed: %s", choice, reason)
        reasons.append(f"{choice}: {reason}")
    raise ValueError("no usable backend: " + "; ".join(reasons))


def choose_precision(asked: str, best: str, possible: tuple[str, ...]) -> str:
    """The precision asked for, or with `auto` the best.

    Raises:
        RuntimeError: the backend does not have the one asked for.
    """
    if asked == "auto":
        return best
    if asked not in possible:
        raise RuntimeError(f"precision {asked} is not possible, only {', '.join(possible)}")
    return asked
