"""Several processes that train together (`torchrun`), or one that trains alone."""

from __future__ import annotations

import atexit
import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from kp_frontend.network import KeypointNetwork


@dataclass(frozen=True)
class Process:
    """This process among those that train together."""

    rank: int
    world: int
    device: str

    @property
    def first(self) -> bool:
        """Whether this is the one that labels, validates, writes and speaks."""
        return self.rank == 0

    def wrap(self, network: KeypointNetwork) -> nn.Module:
        """The network with gradients averaged over the processes, and on GPUs batch statistics."""
        if self.world == 1:
            return network
        if self.device.startswith("cuda"):
            synced = nn.SyncBatchNorm.convert_sync_batchnorm(network)
            return DistributedDataParallel(synced, device_ids=[torch.device(self.device).index])
        return DistributedDataParallel(network)

    def mean(self, values: dict[str, float]) -> dict[str, float]:
        """Means over the processes."""
        if self.world == 1:
            return values
        total = torch.tensor(list(values.values()), device=self.device, dtype=torch.float64)
        dist.all_reduce(total)
        return dict(zip(values, (total / self.world).tolist(), strict=True))

    def from_first(self, value: float) -> float:
        """The first process's value; the others wait for it."""
        if self.world == 1:
            return value
        shared = torch.tensor([value], device=self.device, dtype=torch.float64)
        dist.broadcast(shared, 0)
        return shared.item()

    def wait(self) -> None:
        """Until all processes are here."""
        if self.world > 1:
            dist.barrier()


def join(device: str) -> Process:
    """Join the processes that `torchrun` started; alone without it."""
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    if world == 1:
        return Process(0, 1, device)
    if device.startswith("cuda"):
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
        atexit.register(dist.destroy_process_group)
    return Process(rank, world, device)
