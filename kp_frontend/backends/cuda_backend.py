"""CUDA: torch on an NVIDIA GPU, the whole step in one CUDA graph, the network in half precision.

The graph is captured twice: of the pipeline as it is written, and as torch's compiler fuses it
ahead of time; the faster one is used. What the compiler made is kept on disk, as other engines are.
"""

from __future__ import annotations

import copy
import logging
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from kp_frontend.backends import BackendOptions, choose_precision
from kp_frontend.backends.agreement import check_inputs, reference, require
from kp_frontend.backends.cuda_graph import CudaGraphStep, gpu_key, gpu_unavailable
from kp_frontend.backends.engine_cache import file_digest

log = logging.getLogger(__name__)

TYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
CALLS = 30  # of either graph, to see which is faster

Step = Callable[..., Sequence[Tensor]]


class CudaBackend:
    """The captured pipeline."""

    name = "cuda"

    def __init__(self, step: Step, example: tuple[Tensor, ...], precision: str) -> None:
        self.precision = precision
        self.step = CudaGraphStep(step, example)
        self.images = self.step.host[0]

    def __call__(self, *inputs: np.ndarray) -> list[np.ndarray]:
        return self.step(*inputs)


def unavailable() -> str | None:
    """Why this machine cannot run it, or None."""
    return gpu_unavailable()


def build(pipeline: nn.Module, example: tuple[Tensor, ...], options: BackendOptions) -> CudaBackend:
    """Capture the pipeline for the shapes of `example`.

    fp16 rather than bf16: its finer mantissa keeps more keypoints where they are, at equal speed.
    """
    precision = choose_precision(options.precision, "fp16", tuple(TYPES))
    on_gpu = copy.deepcopy(pipeline).cuda()
    check = check_inputs(example)
    expected = reference(on_gpu, check)
    on_gpu.network.to(TYPES[precision], memory_format=torch.channels_last)

    def captured(step: Step) -> CudaBackend:
        backend = CudaBackend(step, example, precision)
        require("cuda", expected, backend(*(tensor.numpy() for tensor in check)))
        return backend

    as_written = captured(on_gpu)
    key = {
        "backend": "cuda",
        "pipeline": pipeline.fingerprint(),
        "precision": precision,
        "built by": file_digest(__file__),
        **gpu_key(),
    }
    inputs = tuple(tensor.cuda() for tensor in example)
    try:
        fused = options.cache.engine(
            key,
            lambda: compile_ahead(on_gpu, inputs),
            lambda stored: captured(load_compiled(stored)),
        )
    except Exception as error:  # no compiler on this machine, say; the graph as written serves
        log.info("torch cannot compile the pipeline, it runs as written: %s", error)
        return as_written
    return min(
        (fused, as_written),
        key=lambda backend: _call_ms(backend, [tensor.numpy() for tensor in check]),
    )


def compile_ahead(module: nn.Module, example: tuple[Tensor, ...]) -> bytes:
    """A module of fixed shapes as torch's compiler (AOTInductor) packages it."""
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        package = torch._inductor.aoti_compile_and_package(
            torch.export.export(module, example, strict=False),
            package_path=str(Path(folder) / "step.pt2"),
        )
        return Path(package).read_bytes()


def load_compiled(stored: bytes) -> Step:
    """What `compile_ahead` gave, ready to be called, in a CUDA graph too."""
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / "step.pt2"
        package.write_bytes(stored)
        return torch._inductor.aoti_load_package(str(package), run_single_threaded=True)


def _call_ms(backend: CudaBackend, inputs: list[np.ndarray]) -> float:
    took = []
    for _ in range(CALLS):
        begin = time.perf_counter()
        backend(*inputs)
        took.append(1e3 * (time.perf_counter() - begin))
    return statistics.median(took)
