"""CUDA: torch on an NVIDIA GPU, the whole step in one CUDA graph, the network in half precision.

The pipeline is compiled by torch.compile first. Where this is not possible, the graph captures the
pipeline as it is written, which takes about three times as long.

Ahead-of-time compilation (AOTInductor) is not used: it ended the process with a segmentation fault
(H200, CUDA 13.0, torch 2.11; later versions were not tried).
"""

from __future__ import annotations

import copy
import gc
import logging
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from kp_frontend.backends import BackendOptions, Images, choose_precision, compilation
from kp_frontend.backends.agreement import check_inputs, reference, require
from kp_frontend.backends.compilation import (
    compiled_engine,
    compiler_unavailable,
    triton_version,
)
from kp_frontend.backends.cuda_graph import (
    CudaGraphStep,
    Packed,
    first_sentence,
    gpu_key,
    gpu_unavailable,
)
from kp_frontend.backends.engine_cache import EngineCache, file_digest
from kp_frontend.network import channels_last
from kp_frontend.pipeline import StereoPipeline

log = logging.getLogger(__name__)

TYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


class CudaBackend:
    """The captured pipeline."""

    name = "cuda"

    def __init__(
        self,
        step: Callable[..., Tensor],
        example: tuple[Tensor, ...],
        like: Sequence[np.ndarray],
        precision: str,
        compiled: bool,
    ) -> None:
        self.precision = precision
        self.compiled = compiled
        self.step = CudaGraphStep(step, example, like)

    def __call__(self, images: Images, *others: np.ndarray) -> list[np.ndarray]:
        return self.step(images, *others)


def unavailable() -> str | None:
    """The reason why this machine cannot run the backend, or None."""
    return gpu_unavailable()


def build(
    pipeline: StereoPipeline, example: tuple[Tensor, ...], options: BackendOptions
) -> CudaBackend:
    """Compile and capture the pipeline for the shapes of `example`.

    The default is fp16 instead of bf16: its longer mantissa preserves more keypoint positions at
    the same speed.
    """
    precision = choose_precision(options.precision, "fp16", tuple(TYPES))
    on_gpu = copy.deepcopy(pipeline).cuda()
    check = check_inputs(example)
    expected = reference(on_gpu, check)
    channels_last(on_gpu.network.to(TYPES[precision]))
    key = {"pipeline": pipeline.fingerprint(), "precision": precision}

    def agrees(backend: CudaBackend) -> None:
        require("cuda", expected, backend(*(tensor.numpy() for tensor in check)))

    return capture(on_gpu, example, expected, precision, key, options.cache, agrees)


def capture(
    step: nn.Module,
    example: tuple[Tensor, ...],
    like: Sequence[np.ndarray],
    precision: str,
    key: Mapping[str, str],
    cache: EngineCache,
    check: Callable[[CudaBackend], None],
) -> CudaBackend:
    """A step on the GPU as one graph, compiled if that is possible.

    Args:
        step: a module of fixed shapes.
        example: host tensors that define shapes and types, see `CudaGraphStep`.
        like: arrays of the shapes and types of the results.
        precision: of the network, by name.
        key: what the step depends on, beside this machine and its software.
        cache: of what the compiler gives.
        check: raises `RuntimeError` if the results of the engine are wrong.

    Raises:
        RuntimeError: the step as it is written is wrong, or there is not enough memory.
    """
    packed = Packed(step).eval()

    def checked(call: Callable[..., Tensor], compiled: bool) -> CudaBackend:
        backend = CudaBackend(call, example, like, precision, compiled)
        check(backend)
        return backend

    reason = compiler_unavailable()
    if reason is None:
        whole_key = {"backend": "cuda", **key, **gpu_key(), **_software()}
        inputs = tuple(tensor.cuda() for tensor in example)
        try:
            return compiled_engine(
                packed, inputs, whole_key, cache, lambda call: checked(call, compiled=True)
            )
        except Exception as error:  # a compiler can raise anything
            reason = f"{type(error).__name__}: {first_sentence(error)}"
        gc.collect()  # what failed must not keep the memory of the GPU
        torch.cuda.empty_cache()
    log.warning("the pipeline is not compiled and takes about three times as long: %s", reason)
    return checked(packed, compiled=False)


def _software() -> dict[str, str]:
    """What the compiled code depends on beside the GPU and torch."""
    return {
        "triton": triton_version() or "none",
        "built by": file_digest(__file__) + file_digest(compilation.__file__),
    }
