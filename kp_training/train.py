"""The training loop: one stage of a recipe.

The folder of a run contains `labels.npz` (computed once), `split.json`, `last.safetensors` (the
checkpoint to resume from), `best.safetensors` (the weights with the lowest validation loss),
`log.jsonl`, TensorBoard's files, and at the end `run.json`, `card.md` and `curves.png`.

Under `torchrun` the loop is the same. The micro-batches of a step are distributed over the
processes and their gradients averaged, so several processes compute what one would.
"""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader

from kp_frontend.network import (
    KeypointNetwork,
    build_network,
    channels_last,
    load_network,
    save_network,
)
from kp_training.checkpoint import load_checkpoint, save_checkpoint
from kp_training.config import TrainConfig
from kp_training.data import PairDataset, micro_batches
from kp_training.grow import grow
from kp_training.labels import Labels
from kp_training.objective import losses
from kp_training.parallel import Process, join
from kp_training.report import fingerprint, fingerprint_file, write_report
from kp_training.runlog import RunLog, Span
from kp_training.stage_data import check_start, stage_data
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
    span: Span | None = None,
    deadline: float = math.inf,
) -> Path | None:
    """Train a network, or resume an interrupted run.

    Args:
        config: the stage of a recipe.
        images: folder of images, searched recursively.
        out: folder of the run; created if missing, resumed if it has a checkpoint.
        device: torch device.
        workers: number of processes that read images.
        labels_file: labels of these images; if None, those of the recipe are computed and stored in
            `out`.
        start: weights to start from instead of random ones: a released name or a file. The weights
            of a smaller network become the first channels (`grow`).
        middlebury: folder of scenes to validate on as well.
        span: the steps of the whole recipe that this stage has; None if it is the only one.
        deadline: value of `time.monotonic` at which to write a checkpoint and stop.

    Returns:
        The file with the best weights; None if the deadline came first.

    Raises:
        ValueError: there are no images, `out` has a run with another recipe or other images, or
            the weights to start from belong to a larger network.
        FloatingPointError: the loss is not finite or diverges; the last good checkpoint is kept.
    """
    process = join(device)
    check_start(config, start, labels_file)
    torch.manual_seed(config.seed)
    torch.backends.cudnn.benchmark = True  # shapes rarely change
    network = channels_last(_network(config, start).to(process.device))
    out.mkdir(parents=True, exist_ok=True)
    labels, training, held_out = stage_data(config, images, out, labels_file, start, process)
    epoch = math.ceil(len(training) / config.batch)  # steps of one pass over the images
    steps = config.epochs * epoch or config.steps
    validate_every = epoch if config.epochs else config.validate_every

    run = Run(config, process, out, steps, network)
    run.resume(fingerprint(labels), None if start is None else fingerprint_file(start))
    batches = _batches(run, labels, training, workers)
    validator = Validator(config, labels, held_out, process.device, middlebury)
    span = span or Span(config.name, 0, steps)
    with RunLog(out, span, run.progress["step"], quiet=not process.first) as log:
        while run.progress["step"] < steps and not run.patience_is_out():
            if process.from_first(time.monotonic()) > deadline:
                if process.first:
                    run.save(better=False, keep=False)
                return None
            run.step(batches, log)
            step = run.progress["step"]
            if step % validate_every == 0 or step == steps:
                better = run.validate(validator, log)
                if process.first:
                    keep = config.keep_every and step % (config.keep_every * validate_every) == 0
                    run.save(better, bool(keep))
    if process.first:
        write_report(out, config, labels, (training, held_out), run.progress, process)
    process.wait()
    return out / "best.safetensors"


class Run:
    """The state of a run: the network, its moving average, the optimiser and the progress."""

    def __init__(
        self,
        config: TrainConfig,
        process: Process,
        out: Path,
        steps: int,
        network: KeypointNetwork,
    ) -> None:
        self.micros, rest = divmod(config.batch // config.micro, process.world)
        if rest:
            raise ValueError(
                f"{process.world} processes cannot share {config.batch // config.micro} "
                "micro-batches equally; change micro_batch in the recipe"
            )
        self.config, self.process, self.out, self.network = config, process, out, network
        self.steps = steps
        self.begun = {name: tensor.clone() for name, tensor in network.state_dict().items()}
        self.ema = AveragedModel(
            network, multi_avg_fn=partial(_average, config.ema), use_buffers=True
        )
        self.optimizer = _optimizer(network, config)
        self.scheduler = _scheduler(self.optimizer, config, steps)
        self.progress: dict[str, Any] = {
            "step": 0,
            "best": math.inf,
            "since_best": 0,
            "usual": None,
            "seconds": 0.0,
            "waited": 0.0,
            "images": 0,
        }
        self.bf16 = native_bf16(process.device)

    def result(self) -> KeypointNetwork:
        """The network that is validated and saved: with the moving average of the weights.

        With `start_share`, its weights are the mean of these and of those that the stage started
        from. Such a mean is better than either where it was trained and elsewhere (Wortsman et
        al., "Robust fine-tuning of zero-shot models", 2022).
        """
        network = self.ema.module
        assert isinstance(network, KeypointNetwork)
        if not self.config.start_share:
            return network
        network = copy.deepcopy(network)
        for name, tensor in network.state_dict().items():
            if tensor.is_floating_point():
                tensor.lerp_(self.begun[name], self.config.start_share)
        return network

    def resume(self, data: str, start: str | None) -> None:
        """Resume from the checkpoint in the folder of the run, if there is one.

        Args:
            data: fingerprint of the labels.
            start: fingerprint of the weights to start from.

        Raises:
            ValueError: the checkpoint has another network, recipe, labels or start.
        """
        # Convert through JSON, as a checkpoint stores it: tuples become lists.
        config = json.loads(json.dumps(asdict(self.config)))
        self.progress |= {"config": config, "data": data, "start": start}
        path = self.out / "last.safetensors"
        if path.is_file():
            try:
                stored = load_checkpoint(
                    path, self.ema, self.network, self.optimizer, self.scheduler
                )
            except RuntimeError as error:  # tensors of other sizes
                raise ValueError(
                    f"{self.out} has a run of another network; choose another folder"
                ) from error
            for name, what in (
                ("config", "with another recipe"),
                ("data", "on other images or labels"),
                ("start", "from other weights"),
            ):
                if stored[name] != self.progress[name]:
                    raise ValueError(f"{self.out} has a run {what}; choose another folder")
            self.progress |= stored
        self.model = self.process.wrap(self.network)

    def step(self, batches: Iterator[dict[str, Tensor]], log: RunLog) -> None:
        """One optimiser step on the micro-batches of this process.

        Raises:
            FloatingPointError: see `_check`.
        """
        config, process, progress = self.config, self.process, self.progress
        begin = time.perf_counter()
        self.network.train()
        sums, waited = self._gradients(batches)
        row = process.mean({k: v.item() for k, v in sums.items()})
        norm = nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        _check(row["loss"], float(norm), progress, config.explosion, self.out)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if isinstance(self.scheduler, LambdaLR):
            self.scheduler.step()
        self.ema.update_parameters(self.network)
        usual = progress["usual"]
        progress["usual"] = row["loss"] if usual is None else 0.98 * usual + 0.02 * row["loss"]
        progress["step"] += 1
        progress["seconds"] += time.perf_counter() - begin
        progress["waited"] += waited
        progress["images"] += 2 * config.batch
        took = time.perf_counter() - begin
        log.step(progress["step"], row, 2 * config.batch, took, waited, LOG_EVERY)

    def _gradients(self, batches: Iterator[dict[str, Tensor]]) -> tuple[dict[str, Tensor], float]:
        """Accumulate the gradients of a step; return mean losses and seconds waited for data."""
        process, micros = self.process, self.micros
        waited = 0.0
        sums: dict[str, Tensor] = {}
        for micro in range(micros):
            asked = time.perf_counter()
            batch = {k: v.to(process.device, non_blocking=True) for k, v in next(batches).items()}
            waited += time.perf_counter() - asked
            # A resumed run and several processes then draw the same numbers.
            place = (self.progress["step"] * micros + micro) * process.world + process.rank
            torch.manual_seed(self.config.seed * 1_000_003 + place)
            with _without_sync(self.model) if micro < micros - 1 else nullcontext():
                loss, parts = losses(self.model, batch, self.config, self.bf16)
                (loss / micros).backward()
            _add(sums, {"loss": loss, **parts}, micros)
        return sums, waited

    def validate(self, validator: Validator, log: RunLog) -> bool:
        """Validate the averaged network; return whether it is the best so far."""
        progress = self.progress
        found = validator(self.result()) if self.process.first else {"loss": 0.0}
        loss = self.process.from_first(found["loss"])
        _check(loss, 0.0, progress, math.inf, self.out)
        if isinstance(self.scheduler, ReduceLROnPlateau):
            self.scheduler.step(loss)
        better = loss < progress["best"]
        progress["since_best"] = 0 if better else progress["since_best"] + 1
        progress["best"] = min(loss, progress["best"])
        if self.process.first:
            rate = self.optimizer.param_groups[0]["lr"]
            log.validation(progress["step"], {**found, "rate": rate})
        return better

    def save(self, better: bool, keep: bool) -> None:
        """Write the checkpoint, and the weights if they are the best or `keep` is set."""
        step = self.progress["step"]
        kept = [self.out / "best.safetensors"] if better else []
        if keep:
            kept.append(self.out / f"step_{step:06}.safetensors")
        for path in kept:
            header = {"config": json.dumps(asdict(self.config)), "step": str(step)}
            save_network(self.result(), path, header)
        path = self.out / "last.safetensors"
        state = self.ema, self.network, self.optimizer, self.scheduler
        save_checkpoint(path, *state, self.progress)

    def patience_is_out(self) -> bool:
        """Whether the validation loss has stalled for longer than the recipe allows."""
        return 0 < self.config.patience <= self.progress["since_best"]


def _without_sync(
    model: KeypointNetwork | DistributedDataParallel,
) -> AbstractContextManager[None]:
    """Skip averaging gradients over processes, which only the last micro-batch needs."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()


def _batches(
    run: Run, labels: Labels, training: np.ndarray, workers: int
) -> Iterator[dict[str, Tensor]]:
    """The remaining micro-batches of this process, in order."""
    config, process, steps = run.config, run.process, run.steps
    data = PairDataset(labels, training, steps * config.batch, config.seed, config.views)
    places = micro_batches(config, run.progress["step"], steps, process.rank, process.world)
    return iter(
        DataLoader(
            data,
            batch_sampler=[list(place) for place in places],
            num_workers=workers,
            persistent_workers=workers > 0,
        )
    )


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
    """The learning-rate schedule.

    Plateau: divide by 10 when the validation loss stalls (torch's defaults). Cosine: linear
    warm-up, then half a cosine down to 1 % of the peak.
    """

    def share(step: int) -> float:
        if step < config.warmup:
            return (step + 1) / config.warmup
        done = (step - config.warmup) / max(1, steps - config.warmup)
        return 0.01 + 0.99 * (1 + math.cos(math.pi * min(done, 1.0))) / 2

    if config.schedule == "plateau":
        return ReduceLROnPlateau(optimizer)
    return LambdaLR(optimizer, share)


def _average(decay: float, averaged: list[Tensor], current: list[Tensor], count: Tensor) -> None:
    """Exponential moving average with a span that grows with the run, to forget its start."""
    get_ema_multi_avg_fn(min(decay, (1 + int(count)) / (10 + int(count))))(averaged, current, count)


def _add(sums: dict[str, Tensor], parts: dict[str, Tensor], count: int) -> None:
    for name, value in parts.items():
        sums[name] = sums.get(name, 0.0) + value.detach() / count


def _check(loss: float, norm: float, progress: dict, explosion: float, out: Path) -> None:
    """Stop the run before a bad step is applied or a bad checkpoint is written.

    Raises:
        FloatingPointError: the loss or the gradient norm is not finite, or the loss exceeds
            `explosion` times its running average.
    """
    usual = progress["usual"]
    exploded = usual is not None and loss > explosion * abs(usual)
    if math.isfinite(loss) and math.isfinite(norm) and not exploded:
        return
    what = (
        f"loss is {loss:.3g}" if not math.isfinite(loss) or exploded else "gradient is not finite"
    )
    average = f" (running average {usual:.3g})" if exploded else ""
    good = out / "last.safetensors"
    kept = f"the last good state is {good}" if good.is_file() else "there is no checkpoint yet"
    raise FloatingPointError(f"{what} at step {progress['step']}{average}; {kept}")
