"""CUDA: torch on an NVIDIA GPU, the whole step in one CUDA graph, the network in half precision.

The graph captures the pipeline without compilation. Ahead-of-time compilation (AOTInductor) ended
the process with a segmentation fault (H200, CUDA 13.0, torch 2.11; later versions were not tried),
which is not acceptable in a node.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from kp_frontend.backends import BackendOptions, choose_precision
from kp_frontend.backends.agreement import check_inputs, reference, require
from kp_frontend.backends.cuda_graph import CudaGraphStep, gpu_unavailable
from kp_frontend.network import channels_last
from kp_frontend.pipeline import StereoPipeline

TYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}

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
    """The reason why this machine cannot run the backend, or None."""
    return gpu_unavailable()


def build(
    pipeline: StereoPipeline, example: tuple[Tensor, ...], options: BackendOptions
) -> CudaBackend:
    """Capture the pipeline for the shapes of `example`.

    The default is fp16 instead of bf16: its longer mantissa preserves more keypoint positions at
    the same speed.
    """
    precision = choose_precision(options.precision, "fp16", tuple(TYPES))
    on_gpu = copy.deepcopy(pipeline).cuda()
    check = check_inputs(example)
    expected = reference(on_gpu, check)
    channels_last(on_gpu.network.to(TYPES[precision]))

    backend = CudaBackend(on_gpu, example, precision)
    require("cuda", expected, backend(*(tensor.numpy() for tensor in check)))
    return backend
