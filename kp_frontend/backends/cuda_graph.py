"""A step with fixed shapes as one CUDA graph, from host memory to host memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

WARM_UPS = 3  # warm-up calls before the capture, in which libraries choose their kernels


def gpu_unavailable() -> str | None:
    """The reason why torch cannot use an NVIDIA GPU on this machine, or None."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA"
    if not torch.cuda.is_available():
        return "no NVIDIA GPU or driver that torch can use"
    return None


def gpu_driver() -> str:
    """Version text of the NVIDIA driver; on a Jetson, of the board support package."""
    for file in (Path("/proc/driver/nvidia/version"), Path("/etc/nv_tegra_release")):
        if file.is_file():
            return file.read_text().splitlines()[0]
    return "unknown"


def gpu_key() -> dict[str, str]:
    """Properties of the GPU and its software on which an engine depends."""
    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": f"{properties.name}, {properties.major}.{properties.minor}, "
        f"{properties.multi_processor_count} multiprocessors",
        "driver": gpu_driver(),
        "cuda": str(torch.version.cuda),
        "torch": torch.__version__,
    }


class CudaGraphStep:
    """Copies inputs, computes and copies outputs in one graph launch.

    Host buffers are pinned and device buffers are static, as a graph requires. The first input, the
    images, is copied on the main stream, the others concurrently on a second stream.

    Args:
        step: maps device tensors to device tensors, without host synchronisation.
        example: host tensors that define shapes and types.
    """

    def __init__(self, step: Callable[..., Sequence[Tensor]], example: tuple[Tensor, ...]) -> None:
        self.inputs = [tensor.clone().pin_memory() for tensor in example]
        self.host = [tensor.numpy() for tensor in self.inputs]
        self.on_device = [tensor.cuda() for tensor in example]
        self.stream, beside = torch.cuda.Stream(), torch.cuda.Stream()
        with torch.inference_mode(), torch.cuda.stream(self.stream):
            for _ in range(WARM_UPS):
                results = step(*self.on_device)
            self.outputs = [torch.empty(r.shape, dtype=r.dtype, pin_memory=True) for r in results]
            self.stream.synchronize()
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, stream=self.stream):
                beside.wait_stream(self.stream)
                with torch.cuda.stream(beside):
                    for host, device in zip(self.inputs[1:], self.on_device[1:], strict=True):
                        device.copy_(host, non_blocking=True)
                self.on_device[0].copy_(self.inputs[0], non_blocking=True)
                self.stream.wait_stream(beside)
                self.results = list(step(*self.on_device))
                for host, device in zip(self.outputs, self.results, strict=True):
                    host.copy_(device, non_blocking=True)

    def __call__(self, *inputs: np.ndarray) -> list[np.ndarray]:
        for host, array in zip(self.host, inputs, strict=True):
            if array is not host:  # otherwise the caller has already filled the buffer
                host[...] = array
        with torch.cuda.stream(self.stream):
            self.graph.replay()
        self.stream.synchronize()
        return [tensor.numpy().copy() for tensor in self.outputs]
