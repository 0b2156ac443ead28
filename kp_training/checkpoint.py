"""Checkpoints: the full state of a run, to resume it, in one safetensors file, written atomically.

Random numbers need no state: each one depends only on the seed and its position in the run.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.swa_utils import AveragedModel

from kp_frontend.network import KeypointNetwork


def save_checkpoint(
    path: Path,
    ema: AveragedModel,
    network: KeypointNetwork,
    optimizer: torch.optim.Optimizer,
    scheduler: LRScheduler,
    progress: dict[str, Any],
) -> None:
    """Write networks, optimiser, scheduler and progress (JSON-serialisable) to `path`."""
    tensors = {f"network.{k}": v for k, v in network.state_dict().items()}
    tensors |= {f"ema.{k}": v for k, v in ema.state_dict().items()}
    for i, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{i}.{k}": v for k, v in state.items()}
    tensors = {
        k: v.detach().cpu().clone(memory_format=torch.contiguous_format) for k, v in tensors.items()
    }
    schedule = {
        "rates": [group["lr"] for group in optimizer.param_groups],
        "scheduler": scheduler.state_dict(),
    }
    metadata = {"progress": json.dumps(progress), "schedule": json.dumps(schedule)}
    Path(str(path) + ".part").write_bytes(save(tensors, metadata))
    os.replace(str(path) + ".part", path)


def load_checkpoint(
    path: Path,
    ema: AveragedModel,
    network: KeypointNetwork,
    optimizer: torch.optim.Optimizer,
    scheduler: LRScheduler,
) -> dict[str, Any]:
    """Load what `save_checkpoint` wrote, in place.

    Returns:
        The progress.

    Raises:
        ValueError: the file is not a checkpoint.
    """
    parts: dict[str, dict[str, Tensor]] = {"network": {}, "ema": {}, "optimizer": {}}
    try:
        with safe_open(str(path), framework="pt") as file:
            progress = json.loads(file.metadata()["progress"])
            schedule = json.loads(file.metadata()["schedule"])
            for name in file.keys():  # noqa: SIM118
                part, _, rest = name.partition(".")
                parts[part][rest] = file.get_tensor(name)
        network.load_state_dict(parts["network"])
        ema.load_state_dict(parts["ema"])
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in parts["optimizer"].items():
            i, _, key = name.partition(".")
            state.setdefault(int(i), {})[key] = tensor
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": state, "param_groups": groups})
        scheduler.load_state_dict(schedule["scheduler"])
        for group, rate in zip(optimizer.param_groups, schedule["rates"], strict=True):
            group["lr"] = float(rate)
    except (SafetensorError, LookupError, TypeError, ValueError, AttributeError, RuntimeError,
            OSError) as error:  # fmt: skip
        raise ValueError(
            f"{path} is not a checkpoint of kp_training; remove it to start over"
        ) from error
    return progress
