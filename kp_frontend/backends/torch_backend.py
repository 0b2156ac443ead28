"""The reference: plain torch, on any device, in fp32 or with int8's rounding (no faster)."""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import Tensor, nn

from kp_frontend.backends import BackendOptions, Images, batch, choose_precision
from kp_frontend.network import channels_last
from kp_frontend.pipeline import StereoPipeline
from kp_frontend.quantization import with_quantized_network


class TorchBackend:
    """Runs the pipeline in plain torch."""

    name = "torch"

    def __init__(self, pipeline: nn.Module, device: str = "cpu", precision: str = "fp32") -> None:
        self.device, self.precision = device, precision
        self.pipeline = channels_last(copy.deepcopy(pipeline).to(device))

    def __call__(self, images: Images, *others: np.ndarray) -> list[np.ndarray]:
        with torch.inference_mode():
            inputs = (batch(images), *others)
            tensors = (torch.from_numpy(array).to(self.device) for array in inputs)
            return [tensor.cpu().numpy() for tensor in self.pipeline(*tensors)]


def unavailable() -> str | None:
    """Always None: torch is a requirement of the package."""
    return None


def build(
    pipeline: StereoPipeline, example: tuple[Tensor, ...], options: BackendOptions
) -> TorchBackend:
    """Wrap the pipeline; `threads` sets torch's process-wide number of threads."""
    precision = choose_precision(options.precision, "fp32", ("fp32", "int8"))
    if precision == "int8":
        pipeline = with_quantized_network(pipeline)
    if options.threads:
        torch.set_num_threads(options.threads)
    return TorchBackend(pipeline, options.device, precision)
