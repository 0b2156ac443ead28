"""The reference: plain torch, fp32, on the CPU."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from kp_frontend.backends import BackendOptions, choose_precision


class TorchBackend:
    """Runs the pipeline as it is written."""

    name, precision = "torch", "fp32"

    def __init__(self, pipeline: nn.Module) -> None:
        self.pipeline = pipeline.to(memory_format=torch.channels_last)

    def __call__(self, *inputs: np.ndarray) -> list[np.ndarray]:
        with torch.inference_mode():
            outputs = self.pipeline(*(torch.from_numpy(array) for array in inputs))
        return [tensor.numpy() for tensor in outputs]


def unavailable() -> str | None:
    """None: torch is always there."""
    return None


def build(
    pipeline: nn.Module, example: tuple[Tensor, ...], options: BackendOptions
) -> TorchBackend:
    """Wrap the pipeline; `threads` sets torch's process-wide number of threads."""
    choose_precision(options.precision, "fp32", ("fp32",))
    if options.threads:
        torch.set_num_threads(options.threads)
    return TorchBackend(pipeline)
