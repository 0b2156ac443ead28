"""The training loop: `kp train --config C --images DIR --out RUN`.

RUN holds `labels.npz` (computed once) and `split.json`, `last.safetensors` (everything needed to go
on after a stop), `best.safetensors` (the weights with the lowest validation loss), `log.jsonl`,
TensorBoard's files, and at the end `run.json`, `card.md` and `curves.png`.

Started by `torchrun` it is the same loop: a step's micro-batches are dealt to the processes and
their gradients averaged, so that several do together what one would do alone.
"""

from __future__ import annotations

import json
import math
import time
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader

from kp_frontend.network import KeypointNetwork, build_network, load_network, save_network
from kp_training.checkpoint import load_checkpoint, save_checkpoint
from kp_training.config import TrainConfig
from kp_training.data import PairDataset, micro_batches
from kp_training.grow import grow
from kp_training.labels import Labels, label_folder, load_labels
from kp_training.objective import losses
from kp_training.parallel import join
from kp_training.report import fingerprint, fingerprint_file, write_report
from kp_training.runlog import RunLog
from kp_training.splits import split_images
from kp_training.validation import Validator
from kp_training.views import native_bf16

LOG_EVERY = 25  # steps


def train(
    config: TrainConfig,
    images: Path,
    out: Path,
    device: str,
    workers: int = 1,
    labels_file: Path | None = None,
    start: str | Path | None = None,
    middlebury: Path | None = None,
) -> Path:
    """Train a network, or go on with a run that was stopped.

    Args:
        images: folder of images, searched in all depths.
        out: the run's folder; made if missing, resumed if it holds a checkpoint.
        device: torch device.
        labels_file: labels of these images; without it SIFT's are computed and kept in `out`.
        start: weights to start from instead of random ones, a released name or a file; those of a
            smaller network become the first channels (`grow`).
        middlebury: scenes on which to validate too.

    Returns:
        The best weights' file.

    Raises:
        ValueError: no images, a run in `out` that was made with another recipe or other images,
            or weights to start from that are of a larger network.
        FloatingPointError: the loss is not finite or explodes; the last good checkpoint is kept.
    """
    process = join(device)
    device = process.device
    micros, rest = divmod(config.batch // config.micro, process.world)
    if rest:
        raise ValueError(
            f"{process.world} processes cannot share {config.batch // config.micro} micro-batches; "
            f"set micro_batch so that they can"
        )
    torch.manual_seed(config.seed)
    torch.backends.cudnn.benchmark = True  # shapes seldom change
    network = _network(config, start).to(device, memory_format=torch.channels_last)
    out.mkdir(parents=True, exist_ok=True)
    if process.first:
        labels = load_labels(images, labels_file) if labels_file else _labels(images, out)
        training, held_out = split_images(labels, config.seed, out / "split.json")
    process.wait()
    if not process.first:
        labels = load_labels(images, labels_file or out / "labels.npz")
        training, held_out = split_images(labels, config.seed, out / "split.json")
    epoch = math.ceil(len(training) / config.batch)  # steps of one pass over the images
    steps = config.epochs * epoch or config.steps
    validate_every = epoch if config.epochs else config.validate_every

    ema = AveragedModel(network, multi_avg_fn=partial(_average, config.ema), use_buffers=True)
    optimizer = _optimizer(network, config)
    scheduler = _scheduler(optimizer, config, steps)
    progress = {"step": 0, "best": math.inf, "since_best": 0, "usual": None}
    progress |= {"seconds": 0.0, "waited": 0.0, "images": 0, "config": asdict(config)}
    progress["data"] = fingerprint(labels)
    progress["start"] = None if start is None else fingerprint_file(start)
    if (out / "last.safetensors").is_file():
        try:
            stored = load_checkpoint(out / "last.safetensors", ema, network, optimizer, scheduler)
        except RuntimeError as error:  # pages of tensors whose sizes differ
            raise ValueError(
                f"{out} holds a run of another network; choose another folder"
            ) from error
        # Through JSON, as it was stored: tuples come back as lists.
        if stored["config"] != json.loads(json.dumps(asdict(config))):
            raise ValueError(f"{out} holds a run with another recipe; choose another folder")
        if stored["data"] != progress["data"]:
            raise ValueError(f"{out} holds a run on other images or labels; choose another folder")
        if stored["start"] != progress["start"]:
            raise ValueError(f"{out} holds a run from other weights; choose another folder")
        progress |= stored
    model = process.wrap(network)
    bf16 = native_bf16(device)
    data = PairDataset(labels, training, steps * config.batch, config.seed, config.views)
    places = micro_batches(config, progress["step"], steps, process.rank, process.world)
    loader = DataLoader(
        data, batch_sampler=list(places), num_workers=workers, persistent_workers=workers > 0
    )
    batches = iter(loader)
    validator = Validator(config, labels, held_out, device, middlebury)

    with RunLog(out, steps, progress["step"], quiet=not process.first) as log:
        while progress["step"] < steps and not _patience_is_out(progress, config):
            step, begin, waited, sums = progress["step"], time.perf_counter(), 0.0, {}
            network.train()
            for micro in range(micros):
                asked = time.perf_counter()
                batch = {k: v.to(device, non_blocking=True) for k, v in next(batches).items()}
                waited += time.perf_counter() - asked
                # So that a resumed run, and several processes, draw the same numbers.
                place = (step * micros + micro) * process.world + process.rank
                torch.manual_seed(config.seed * 1_000_003 + place)
                last = micro == micros - 1
                with nullcontext() if last or process.world == 1 else model.no_sync():
                    loss, parts = losses(model, batch, config, bf16)
                    (loss / micros).backward()
                _add(sums, {"loss": loss, **parts}, micros)
            row = process.mean({k: v.item() for k, v in sums.items()})
            norm = nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            _check(row["loss"], float(norm), progress, config.explosion, out)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if isinstance(scheduler, LambdaLR):
                scheduler.step()
            ema.update_parameters(network)
            usual = progress["usual"]
            progress["usual"] = row["loss"] if usual is None else 0.98 * usual + 0.02 * row["loss"]
            progress["step"] = step = step + 1
            progress["seconds"] += time.perf_counter() - begin
            progress["waited"] += waited
            progress["images"] += 2 * config.batch
            log.step(step, row, 2 * config.batch, time.perf_counter() - begin, waited, LOG_EVERY)

            if step % validate_every == 0 or step == steps:
                found = validator(ema.module) if process.first else {"loss": 0.0}
                loss = process.from_first(found["loss"])
                _check(loss, 0.0, progress, math.inf, out)
                if isinstance(scheduler, ReduceLROnPlateau):
                    scheduler.step(loss)
                better = loss < progress["best"]
                progress["since_best"] = 0 if better else progress["since_best"] + 1
                progress["best"] = min(loss, progress["best"])
                if not process.first:
                    continue
                log.validation(step, {**found, "rate": optimizer.param_groups[0]["lr"]})
                kept = [out / "best.safetensors"] if better else []
                if config.keep_every and step % (config.keep_every * validate_every) == 0:
                    kept.append(out / f"step_{step:06}.safetensors")
                for path in kept:
                    header = {"config": json.dumps(asdict(config)), "step": str(step)}
                    save_network(ema.module, path, header)
                save_checkpoint(
                    out / "last.safetensors", ema, network, optimizer, scheduler, progress
                )
    if process.first:
        write_report(out, config, labels, (training, held_out), progress, process)
    process.wait()
    return out / "best.safetensors"


def _labels(images: Path, out: Path) -> Labels:
    if (out / "labels.npz").is_file():
        return load_labels(images, out / "labels.npz")
    labels, unreadable = label_folder(images, out / "labels.npz")
    for path in unreadable:
        print(f"left out, cannot be read: {path}")
    print(f"{len(labels)} images, {len(labels.xy) / len(labels):.0f} keypoints each")
    return labels


def _network(config: TrainConfig, start: str | Path | None) -> KeypointNetwork:
    network = build_network(config.size)
    if start is not None:
        grow(load_network(start), network)
    return network


def _optimizer(network: KeypointNetwork, config: TrainConfig) -> torch.optim.Optimizer:
    kind = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[config.optimizer]
    decay = [p for p in network.parameters() if p.ndim > 1]
    no_decay = [p for p in network.parameters() if p.ndim <= 1]
    groups = [{"params": decay}, {"params": no_decay, "weight_decay": 0.0}]
    return kind(groups, lr=config.learning_rate, weight_decay=config.weight_decay)


def _scheduler(optimizer: torch.optim.Optimizer, config: TrainConfig, steps: int) -> LRScheduler:
    """Plateau: a tenth when the validation loss does not fall (torch's defaults). Cosine: linear
    warm-up, then half a cosine down to 1 % of the peak."""

    def share(step: int) -> float:
        if step < config.warmup:
            return (step + 1) / config.warmup
        done = (step - config.warmup) / max(1, steps - config.warmup)
        return 0.01 + 0.99 * (1 + math.cos(math.pi * min(done, 1.0))) / 2

    if config.schedule == "plateau":
        return ReduceLROnPlateau(optimizer)
    return LambdaLR(optimizer, share)


def _average(decay: float, averaged: list[Tensor], current: list[Tensor], count: Tensor) -> None:
    """Exponential moving average whose span grows with the run, so that its start is forgotten."""
    get_ema_multi_avg_fn(min(decay, (1 + int(count)) / (10 + int(count))))(averaged, current, count)


def _add(sums: dict[str, Tensor], parts: dict[str, Tensor], count: int) -> None:
    for name, value in parts.items():
        sums[name] = sums.get(name, 0.0) + value.detach() / count


def _patience_is_out(progress: dict, config: TrainConfig) -> bool:
    return 0 < config.patience <= progress["since_best"]


def _check(loss: float, norm: float, progress: dict, explosion: float, out: Path) -> None:
    """Stop before a step is taken that would spoil the network, or kept that has.

    Raises:
        FloatingPointError: the loss or the gradient's norm is not finite, or the loss more than
            `explosion` times the usual.
    """
    usual = progress["usual"]
    exploded = usual is not None and loss > explosion * abs(usual)
    if math.isfinite(loss) and math.isfinite(norm) and not exploded:
        return
    what = (
        f"loss is {loss:.3g}" if not math.isfinite(loss) or exploded else "gradient is not finite"
    )
    told = f", usually {usual:.3g}" if exploded else ""
    good = out / "last.safetensors"
    kept = f"the last good state is {good}" if good.is_file() else "there is no checkpoint yet"
    raise FloatingPointError(f"{what} at step {progress['step']}{told}; {kept}")
