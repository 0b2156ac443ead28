"""What an engine does on a GPU: time without the host, kernels, and share of the roofline."""

from __future__ import annotations

import copy
import statistics
from collections import Counter
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kp_frontend.backends import BackendOptions
from kp_frontend.backends.cuda_backend import TYPES, CudaBackend, capture
from kp_frontend.backends.cuda_graph import CudaGraphStep
from kp_frontend.network import channels_last
from kp_frontend.pipeline import StereoPipeline
from kp_frontend.tools.roofline import shortest_ms

REPLAYS = 30  # of a graph, to measure its time


class GpuEngine(Protocol):
    """An engine that is one CUDA graph."""

    name: str
    precision: str
    step: CudaGraphStep


@dataclass(frozen=True)
class Kernel:
    """What the kernels of one name do in one call."""

    name: str
    calls: int
    ms: float


@dataclass(frozen=True)
class GpuFigures:
    """Figures of an engine on a GPU. The network's are None where it cannot be run alone."""

    gpu_ms: float  # of the graph, without the transfers of the inputs
    compiled: bool
    kernels: int  # number of kernels of a call
    network_ms: float | None  # on the GPU
    roofline_ms: float | None  # shortest time of the network by the measured peaks of the GPU

    @property
    def share(self) -> float | None:
        """Share of the roofline that the network reaches."""
        if self.network_ms is None or self.roofline_ms is None:
            return None
        return self.roofline_ms / self.network_ms


class Network(nn.Module):
    """The network of a pipeline alone; returns one number per image for each of its results."""

    def __init__(self, pipeline: StereoPipeline) -> None:
        super().__init__()
        self.network, self.pad = pipeline.network, pipeline.pad

    def forward(self, grey: Tensor) -> tuple[Tensor, ...]:
        """Run on grey images (B, 1, H, W)."""
        logits, features = self.network(F.pad(grey, self.pad, mode="replicate"))
        return tuple(found.float().amax((1, 2, 3)) for found in (logits, *features))


def graph_ms(step: CudaGraphStep) -> float:
    """Median milliseconds of a graph on the GPU."""
    return statistics.median(step.gpu_ms() for _ in range(REPLAYS))


def kernels(step: CudaGraphStep) -> list[Kernel]:
    """The kernels of one call, those that take longest first; transfers are left out."""
    step.gpu_ms()  # warm-up
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        step.gpu_ms()
        torch.cuda.synchronize()
    calls: Counter[str] = Counter()
    took: Counter[str] = Counter()
    for event in profile.events() or ():
        on_gpu = event.device_type == torch.autograd.DeviceType.CUDA
        if on_gpu and not event.name.startswith(("Memcpy", "Memset")):
            calls[event.name] += 1
            took[event.name] += event.time_range.elapsed_us()
    return [Kernel(name, calls[name], us / 1e3) for name, us in took.most_common()]


def network_engine(pipeline: StereoPipeline, images: np.ndarray, precision: str) -> CudaBackend:
    """The network alone on the GPU, compiled like the pipeline if that is possible.

    Args:
        images: (2, H, W) uint8.
    """
    batch = torch.from_numpy(images)[:, None].float()
    network = Network(copy.deepcopy(pipeline)).eval().cuda()
    channels_last(network.network.to(TYPES[precision]))
    like = [np.zeros(len(images), np.float32)] * 3
    key = {"pipeline": f"network of {pipeline.fingerprint()}", "precision": precision}
    return capture(network, (batch,), like, precision, key, BackendOptions().cache, lambda _: None)


def measure(engine: GpuEngine, pipeline: StereoPipeline, images: np.ndarray) -> GpuFigures:
    """Figures of the engine of a pipeline.

    Args:
        images: (2, H, W) uint8.
    """
    network_ms = roofline = None
    if isinstance(engine, CudaBackend):
        alone = network_engine(pipeline, images, engine.precision)
        network_ms = graph_ms(alone.step)
        batch = torch.from_numpy(images)[:, None].to("cuda", TYPES[engine.precision])
        network = copy.deepcopy(pipeline.network).to("cuda", TYPES[engine.precision])
        padded = F.pad(batch, pipeline.pad, mode="replicate")
        roofline = shortest_ms(channels_last(network), padded)
    compiled = engine.compiled if isinstance(engine, CudaBackend) else True
    count = sum(kernel.calls for kernel in kernels(engine.step))
    return GpuFigures(graph_ms(engine.step), compiled, count, network_ms, roofline)
