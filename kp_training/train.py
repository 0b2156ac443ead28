"""The training loop: `kp train --config C --images DIR --out RUN`.

RUN holds `labels.npz` (computed once), `last.safetensors` (everything needed to go on after a
stop), `best.safetensors` (the averaged weights with the lowest validation loss) and `log.jsonl`.
"""

from __future__ import annotations

import json
import math
import os
import time
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Subset

from kp_frontend.network import (
    CELL,
    KeypointNetwork,
    build_network,
    load_network,
    save_network,
)
from kp_training.data import PairDataset, ViewConfig
from kp_training.labels import Labels, label_folder, load_labels
from kp_training.losses import descriptor_loss, detector_loss, keypoint_target
from kp_training.views import (
    displacement,
    native_bf16,
    photometric,
    sample,
    warp_image,
    warp_points,
)

CONFIG_DIR = Path(__file__).parent / "config"


@dataclass(frozen=True)
class TrainConfig:
    """A recipe; `config/release.yaml` explains each setting."""

    size: str = "tiny"
    steps: int = 3000
    batch: int = 16
    learning_rate: float = 3e-3
    warmup: int = 100
    weight_decay: float = 1e-4
    ema: float = 0.998
    temperature: float = 0.07
    descriptor_weight: float = 1.0
    correspondences: int = 400
    jitter: float = 0.5
    lowest_repeat: float = 0.5
    validate_every: int = 250
    seed: int = 0
    views: ViewConfig = field(default_factory=ViewConfig)


def load_config(name: str) -> TrainConfig:
    """Read a recipe by name (`release`) or from a YAML file.

    Raises:
        ValueError: no such recipe, or a setting that does not exist.
    """
    path = CONFIG_DIR / f"{name}.yaml"
    path = path if path.is_file() else Path(name)
    if not path.is_file():
        raise ValueError(f"no recipe {name!r}: a YAML file, or one of {_names()}")
    try:
        settings = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    checked = _settings(settings, TrainConfig, path)
    checked["views"] = ViewConfig(**_settings(checked.pop("views", {}), ViewConfig, path))
    return TrainConfig(**checked)


def _settings(given: object, kind: type, path: Path) -> dict[str, Any]:
    """The settings of a recipe, checked against the fields of a config."""
    if not isinstance(given, dict):
        raise ValueError(f"{path}: {given!r} is no list of settings")
    default = kind()
    checked = {}
    for name, value in given.items():
        if name not in {f.name for f in fields(kind)}:
            raise ValueError(f"{path}: unknown setting {name!r}")
        wanted = getattr(default, name)
        if name == "views":
            checked[name] = value
            continue
        if isinstance(wanted, tuple) and isinstance(value, list) and len(value) == len(wanted):
            value = tuple(value)
        if isinstance(wanted, float) and type(value) is int:
            value = float(value)
        if type(value) is not type(wanted):
            raise ValueError(f"{path}: {name} is {value!r}, must be like {wanted!r}")
        checked[name] = value
    return checked


def _names() -> str:
    return ", ".join(sorted(p.stem for p in CONFIG_DIR.glob("*.yaml")))


def make_views(batch: dict[str, Tensor], config: TrainConfig) -> dict[str, Tensor]:
    """Render both views of a batch, with everything the losses need.

    Returns:
        `images` (2, B, 1, H, W), `target` (2, B, 65, H/8, W/8), `points` (2, B, M, 2) pixels of
        corresponding points in each view, `valid` (B, M) bool.
    """
    height, width = config.views.height, config.views.width
    canvas, keypoints = batch["canvas"].float(), batch["keypoints"]
    fill = batch["fill"][:, None, None, None]
    size = canvas.shape[-1]
    # Descriptors are also trained away from keypoints: a quarter of the points are anywhere.
    anywhere = torch.rand(len(canvas), keypoints.shape[1] // 4, 2, device=canvas.device) * size
    candidates = torch.cat([keypoints[..., :2], anywhere], 1)
    images, targets, places, seen = [], [], [], []
    for view in range(2):
        to_view = batch["to_view"][:, view]
        shift = displacement(batch["relief"][:, view], batch["blocky"], height, width)
        image = fill + warp_image(canvas - fill, to_view, shift)  # outside, samples are 0
        images.append(photometric(image, batch["noise"][:, view]))
        place, visible = warp_points(candidates, to_view, shift)
        places.append(place)
        seen.append(visible & ~candidates.isnan().any(-1))
        labels = slice(0, keypoints.shape[1])
        sure = (keypoints[..., 2] >= config.lowest_repeat) & seen[-1][:, labels]
        targets.append(keypoint_target(place[:, labels], sure.float(), height, width))
    both = seen[0] & seen[1]
    order = (torch.rand(both.shape, device=both.device) + both).topk(config.correspondences, 1)
    chosen = order.indices[..., None].expand(-1, -1, 2)
    return {
        "images": torch.stack(images),
        "target": torch.stack(targets),
        "points": torch.stack([place.gather(1, chosen) for place in places]),
        "valid": order.values >= 1,
    }


def losses(
    network: torch.nn.Module, batch: dict[str, Tensor], config: TrainConfig, bf16: bool = False
) -> tuple[Tensor, dict[str, Tensor]]:
    """Total loss of a batch and its parts (`detector`, `descriptor`, `matched`).

    With `bf16` the network alone runs in bfloat16: geometry and losses need float32.
    """
    views = make_views(batch, config)
    images = views["images"].flatten(0, 1).contiguous(memory_format=torch.channels_last)
    with torch.autocast(images.device.type, torch.bfloat16, bf16):
        logits, descriptors = (out.float() for out in network(images))
    detector = detector_loss(logits, views["target"].flatten(0, 1))
    points = views["points"] + torch.randn_like(views["points"]) * config.jitter
    found = sample(descriptors, (points.flatten(0, 1) + 0.5) / CELL - 0.5)
    left, right = F.normalize(found.transpose(1, 2), dim=-1).chunk(2)
    descriptor, matched = descriptor_loss(
        left, right, views["points"][1], views["valid"], config.temperature
    )
    total = detector + config.descriptor_weight * descriptor
    return total, {"detector": detector, "descriptor": descriptor, "matched": matched}


def learning_rate(step: int, config: TrainConfig) -> float:
    """Linear warm-up, then half a cosine down to 1 % of the peak."""
    if step < config.warmup:
        return config.learning_rate * (step + 1) / config.warmup
    done = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.learning_rate * (0.01 + 0.99 * (1 + math.cos(math.pi * done)) / 2)


def _average(decay: float, averaged: list[Tensor], current: list[Tensor], count: Tensor) -> None:
    """Exponential moving average whose span grows with the run, so that its start is forgotten."""
    get_ema_multi_avg_fn(min(decay, (1 + int(count)) / (10 + int(count))))(averaged, current, count)


def save_checkpoint(
    path: Path,
    ema: AveragedModel,
    network: KeypointNetwork,
    optimizer: torch.optim.Optimizer,
    progress: dict[str, Any],
) -> None:
    """Write network, averaged network, optimiser and progress to one file, atomically."""
    tensors = {f"network.{k}": v for k, v in network.state_dict().items()}
    tensors |= {f"ema.{k}": v for k, v in ema.state_dict().items()}
    for i, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{i}.{k}": v for k, v in state.items()}
    tensors = {
        k: v.detach().cpu().clone(memory_format=torch.contiguous_format) for k, v in tensors.items()
    }
    save_file(tensors, str(path) + ".part", metadata={"progress": json.dumps(progress)})
    os.replace(str(path) + ".part", path)


def load_checkpoint(
    path: Path, ema: AveragedModel, network: KeypointNetwork, optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """Undo `save_checkpoint`; returns the progress.

    Raises:
        ValueError: not a checkpoint.
    """
    parts: dict[str, dict[str, Tensor]] = {"network": {}, "ema": {}, "optimizer": {}}
    try:
        with safe_open(str(path), framework="pt") as file:
            progress = json.loads(file.metadata()["progress"])
            for name in file.keys():  # noqa: SIM118
                part, _, rest = name.partition(".")
                parts[part][rest] = file.get_tensor(name)
    except (SafetensorError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a checkpoint of this package; remove it?") from error
    network.load_state_dict(parts["network"])
    ema.load_state_dict(parts["ema"])
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in parts["optimizer"].items():
        i, _, key = name.partition(".")
        state.setdefault(int(i), {})[key] = tensor
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    return progress


def train(
    config: TrainConfig,
    images: Path,
    out: Path,
    device: str,
    workers: int = 1,
    labels_file: Path | None = None,
    start: str | Path | None = None,
) -> Path:
    """Train a network, or go on with a run that was stopped.

    Args:
        images: folder of images, searched in all depths.
        out: the run's folder; made if missing, resumed if it holds a checkpoint.
        device: torch device.
        labels_file: labels of these images; without it SIFT's are computed and kept in `out`.
        start: weights to start from instead of random ones, a released name or a file.

    Returns:
        The best weights' file.

    Raises:
        ValueError: no images, a run in `out` that was made with another recipe, or weights to
            start from that are of another size of network.
        FloatingPointError: the loss is not finite; the last good checkpoint is kept.
    """
    console = Console()
    out.mkdir(parents=True, exist_ok=True)
    (out / "log.jsonl").touch()
    labels = load_labels(images, labels_file) if labels_file else _labels(images, out, console)
    held_out = np.arange(len(labels)) % 20 == 0  # one image in twenty validates
    torch.manual_seed(config.seed)
    network = build_network(config.size)
    if start is not None:
        given = load_network(start)
        if given.config != network.config:
            raise ValueError(f"{start} is not a network of size {config.size}")
        network.load_state_dict(given.state_dict())
    network = network.to(device, memory_format=torch.channels_last)
    ema = AveragedModel(network, multi_avg_fn=partial(_average, config.ema), use_buffers=True)
    decay = [p for p in network.parameters() if p.ndim > 1]
    no_decay = [p for p in network.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay}, {"params": no_decay, "weight_decay": 0.0}],
        lr=config.learning_rate,
        weight_decay=config.weight_decay,
    )
    bf16 = native_bf16(device)
    step, best = 0, math.inf
    if (out / "last.safetensors").is_file():
        progress = load_checkpoint(out / "last.safetensors", ema, network, optimizer)
        step, best = progress["step"], progress["best"]
        # Through JSON, as it was stored: tuples come back as lists.
        if progress["config"] != json.loads(json.dumps(asdict(config))):
            raise ValueError(f"{out} holds a run with another recipe; choose another folder")
        console.print(f"going on at step {step}")

    def dataset(chosen: np.ndarray, samples: int, seed: int) -> PairDataset:
        return PairDataset(labels, np.flatnonzero(chosen), samples, seed, config.views)

    data = dataset(~held_out, config.steps * config.batch, config.seed)
    rest = Subset(data, range(step * config.batch, len(data)))
    loader = iter(
        DataLoader(rest, config.batch, num_workers=workers, persistent_workers=workers > 0)
    )
    checks = DataLoader(dataset(held_out, 4 * config.batch, config.seed + 1), config.batch)
    bar = Progress(
        TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
        BarColumn(),
        TextColumn("{task.description}"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )
    with bar, (out / "log.jsonl").open("a") as log:
        task = bar.add_task("", total=config.steps, completed=step)
        since, waited, seen = time.perf_counter(), 0.0, 0
        while step < config.steps:
            begin = time.perf_counter()
            batch = {k: v.to(device, non_blocking=True) for k, v in next(loader).items()}
            waited += time.perf_counter() - begin
            torch.manual_seed(config.seed * 1_000_003 + step)  # so that a resumed run is the same
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, config)
            network.train()
            loss, parts = losses(network, batch, config, bf16)
            if not torch.isfinite(loss):
                raise FloatingPointError(
                    f"loss became {loss.item()} at step {step}; "
                    f"the last good state is {out / 'last.safetensors'}"
                )
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            ema.update_parameters(network)
            step, seen = step + 1, seen + 2 * config.batch
            if step % 25 == 0:
                took = time.perf_counter() - since
                row = {
                    "step": step,
                    "loss": loss.item(),
                    **{k: v.item() for k, v in parts.items()},
                    "images_per_s": seen / took,
                    "data_wait": waited / took,
                }
                log.write(json.dumps(row) + "\n")
                log.flush()
                bar.update(task, completed=step, description=_describe(row))
                since, waited, seen = time.perf_counter(), 0.0, 0
            if step % config.validate_every == 0 or step == config.steps:
                row = {"step": step, **validate(ema.module, checks, config, device)}
                log.write(
                    json.dumps({f"validation_{k}" if k != "step" else k: v for k, v in row.items()})
                    + "\n"
                )
                log.flush()
                console.print(f"step {step}, held-out images: {_describe(row)}")
                if row["loss"] < best:
                    best = row["loss"]
                    metadata = {"config": json.dumps(asdict(config)), "step": str(step)}
                    save_network(ema.module, out / "best.safetensors", metadata)
                progress = {"step": step, "best": best, "config": asdict(config)}
                save_checkpoint(out / "last.safetensors", ema, network, optimizer, progress)
                since, waited, seen = time.perf_counter(), 0.0, 0
    return out / "best.safetensors"


@torch.no_grad()
def validate(
    network: KeypointNetwork, loader: DataLoader, config: TrainConfig, device: str
) -> dict[str, float]:
    """Mean losses on held-out images, with the same random views each time."""
    network.eval()
    torch.manual_seed(config.seed)
    rows = []
    for batch in loader:
        total, parts = losses(network, {k: v.to(device) for k, v in batch.items()}, config)
        rows.append({"loss": total.item(), **{k: v.item() for k, v in parts.items()}})
    return {key: sum(row[key] for row in rows) / len(rows) for key in rows[0]}


def _labels(images: Path, out: Path, console: Console) -> Labels:
    if (out / "labels.npz").is_file():
        return load_labels(images, out / "labels.npz")
    labels, unreadable = label_folder(images, out / "labels.npz")
    for path in unreadable:
        console.print(f"[yellow]left out, cannot be read: {path}")
    console.print(f"{len(labels)} images, {len(labels.xy) / len(labels):.0f} keypoints each")
    return labels


def _describe(row: dict[str, float]) -> str:
    words = [
        f"loss {row['loss']:.3f}",
        f"detector {row['detector']:.3f}",
        f"descriptor {row['descriptor']:.3f}",
        f"matched {row['matched']:.2f}",
    ]
    if "images_per_s" in row:
        words += [f"{row['images_per_s']:.0f} images/s", f"waiting {row['data_wait']:.0%}"]
    return "  ".join(words)
