"""Training with several processes (`torchrun`) or with one."""

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
    """This process in the group of processes that train together."""

    rank: int
    world: int
    device: str

    @property
    def first(self) -> bool:
        """Whether this process labels images, validates, writes files and prints."""
        return self.rank == 0

    def wrap(self, network: KeypointNetwork) -> KeypointNetwork | DistributedDataParallel:
        """Average the network's gradients over all processes, on GPUs also batch statistics."""
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
        """The value of the first process; all others wait for it."""
        if self.world == 1:
            return value
        shared = torch.tensor([value], device=self.device, dtype=torch.float64)
        dist.broadcast(shared, 0)
        return shared.item()

    def wait(self) -> None:
        """Wait until all processes have reached this point."""
        if self.world > 1:
            dist.barrier()


def join(device: str) -> Process:
    """Join the group of processes that `torchrun` started; without it, a group of one."""
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
