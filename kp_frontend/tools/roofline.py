"""Roofline model: the shortest time that the machine allows for a network.

See Williams et al., "Roofline", 2009. Operations and bytes of the convolutions and matrix products
are counted as they run. All other operations are assumed to be fused into them at no cost. The
peaks of the machine are measured in the same run, by a large matrix product and a large copy.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

HEAVY = {"convolution", "mm", "addmm", "bmm", "baddbmm"}
SIDE = {"cpu": 2048, "cuda": 8192}  # size of the square matrices that measure the peak
REPEATS = 10


class Traffic(TorchDispatchMode):
    """Counts the bytes that convolutions and matrix products read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in HEAVY:
            tensors = [t for t in tree_leaves((args, kwargs, result)) if isinstance(t, Tensor)]
            self.bytes += sum(t.numel() * t.element_size() for t in tensors)
        return result


def count(network: nn.Module, image: Tensor) -> tuple[int, int]:
    """Number of operations (a multiply-add counts as two) and bytes of one call."""
    flops, traffic = FlopCounterMode(display=False), Traffic()
    with torch.inference_mode(), traffic, flops:
        network(image)
    return flops.get_total_flops(), traffic.bytes


def _seconds(call: Callable[[], object], device: str) -> float:
    call()
    took = []
    for _ in range(REPEATS):
        if device == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        took.append(time.perf_counter() - begin)
    return statistics.median(took)


@functools.cache
def peaks(device: str, dtype: torch.dtype) -> tuple[float, float]:
    """Operations per second of a large matrix product, and bytes per second of a large copy."""
    side = SIDE[device]
    a = torch.randn(side, side, device=device).to(dtype)
    out = torch.empty_like(a)
    product = _seconds(lambda: torch.mm(a, a, out=out), device)
    source = torch.zeros(64 * 2**20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = _seconds(lambda: target.copy_(source), device)
    return 2 * side**3 / product, 2 * source.numel() / copy


def shortest_ms(network: nn.Module, image: Tensor) -> float:
    """Shortest time of one call, in milliseconds, by the measured peaks and the network's type."""
    operations, moved = count(network, image)
    dtype = next(network.parameters()).dtype
    most_operations, most_bytes = peaks(image.device.type, dtype)
    return 1e3 * max(operations / most_operations, moved / most_bytes)
