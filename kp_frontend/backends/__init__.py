"""Engines that run the pipeline: one small file each, behind one interface.

Each module has `build(pipeline, example, threads) -> Backend`, which raises `RuntimeError` or
`ImportError` where the machine cannot run it.
"""

from __future__ import annotations

import importlib
import logging
from typing import Protocol

import numpy as np
from torch import Tensor, nn

log = logging.getLogger(__name__)

BACKENDS = ("openvino", "torch")  # in the order in which `auto` tries them


class Backend(Protocol):
    """A compiled pipeline: numpy arrays in, numpy arrays out, in the pipeline's order."""

    name: str
    precision: str

    def __call__(self, *inputs: np.ndarray) -> list[np.ndarray]: ...


def make_backend(
    name: str, pipeline: nn.Module, example: tuple[Tensor, ...], threads: int
) -> Backend:
    """Build the named backend, or with `auto` the first one that this machine can run.

    Args:
        pipeline: the module to run, in eval mode.
        example: inputs that fix every shape and type.
        threads: of a CPU backend; 0 for one per core.

    Raises:
        ValueError: no such backend, or the named one cannot run here.
    """
    if name not in ("auto", *BACKENDS):
        raise ValueError(f"unknown backend {name!r}: auto or one of {', '.join(BACKENDS)}")
    reasons = []
    for choice in BACKENDS if name == "auto" else (name,):
        module = importlib.import_module(f"kp_frontend.backends.{choice}_backend")
        try:
            return module.build(pipeline, example, threads)
        except (ImportError, RuntimeError) as error:
            reasons.append(f"{choice}: {error}")
            log.warning("backend %s cannot be used: %s", choice, error)
    raise ValueError("no usable backend: " + "; ".join(reasons))
