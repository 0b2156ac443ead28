"""`kp bench`: time and memory of the front end and its peers, in one interleaved run.

Every method processes the same stereo pair, from uint8 images to matches. Each round runs all
methods in turn, so that other load on the machine affects them equally. Compare ratios, not times.
Peak memory is measured in a separate process for each method.
"""

from __future__ import annotations

import copy
import json
import multiprocessing
import statistics
import time
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import cast

import cv2
import numpy as np
import skimage.data
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

from kp_frontend.backends import (
    BACKENDS,
    backend_module,
    openvino_backend,
)
from kp_frontend.backends.torch_backend import TorchBackend
from kp_frontend.config import FrontendConfig
from kp_frontend.frontend import StereoFrontend
from kp_frontend.pipeline import StereoPipeline
from kp_frontend.quantization import with_quantized_network
from kp_frontend.tools.doctor import machine
from kp_frontend.tools.gpu_figures import GpuEngine, Network, measure
from kp_frontend.tools.peers import PEERS, Call, Subject
from kp_frontend.tools.roofline import shortest_ms

Memory = dict[str, float | None]  # see `memory`
GPU_ENGINES = ("tensorrt", "cuda")
UNTRACKED = "without tracks"  # the stage that is the whole call without tracks, as the peers'
EAGER = "torch on cuda"  # plain fp32 torch on a GPU, the baseline of the GPU engines
LONGEST = 30.0  # maximum time of one method over all rounds, seconds


@dataclass(frozen=True)
class Row:
    """Measurements of one stage of a method."""

    method: str
    backend: str
    precision: str
    size: str
    stage: str
    median_ms: float
    p95_ms: float
    peak_rss_mb: float | None


def bench_pair(width: int, height: int) -> np.ndarray:
    """Middlebury's Motorcycle (from scikit-image), cropped or enlarged, (2, H, W) uint8."""
    views = skimage.data.stereo_motorcycle()[:2]
    scale = max(1.0, width / views[0].shape[1], height / views[0].shape[0])
    grey = [cv2.cvtColor(view, cv2.COLOR_RGB2GRAY) for view in views]
    large = [cv2.resize(g, None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC) for g in grey]
    return np.stack([image[:height, :width] for image in large])


def ours(method: str, backend: str, images: np.ndarray, parts: bool) -> Subject:
    """The front end; with `parts` also its stages, if the engine can be divided."""
    name, device = ("torch", "cuda") if backend == EAGER else (backend, "cpu")
    name, _, precision = name.partition(":")
    config = FrontendConfig(
        model=method, backend=name, precision=precision or "auto", device=device
    )
    frontend = StereoFrontend(config)
    frontend.warm_up(*images.shape[1:])
    precision = frontend.backend.split()[-1]
    stages: dict[str, Call] = {"total": lambda: frontend(*images)}
    subject = Subject(Path(method).stem, backend.partition(":")[0], precision, stages)
    if parts and backend != EAGER:
        add_parts(subject, frontend, images)
    return subject


def add_parts(subject: Subject, frontend: StereoFrontend, images: np.ndarray) -> None:
    """Add the network, the detection and the call without tracks as separate stages, and the
    roofline of the network."""
    pipeline = StereoPipeline(frontend.network, frontend.config, *images.shape[1:]).eval()
    if subject.precision == "int8":
        pipeline = with_quantized_network(pipeline)
    batch = torch.from_numpy(images)[:, None].float()
    for stage, module in (("network", Network(pipeline)), ("network+detection", Found(pipeline))):
        call = compiled(module, batch, subject.backend, subject.precision)
        if call is not None:
            subject.stages[stage] = call
    if subject.backend not in GPU_ENGINES:  # there, each engine takes long to build
        plain = StereoFrontend(replace(frontend.config, max_motion=0.0))
        plain.warm_up(*images.shape[1:])
        subject.stages[UNTRACKED] = lambda: plain(*images)
    if subject.backend == "torch":
        subject.roofline_ms = shortest_ms(
            copy.deepcopy(frontend.network), F.pad(batch, pipeline.pad, "replicate")
        )
    if subject.backend in GPU_ENGINES:
        subject.gpu = measure(cast(GpuEngine, frontend.engine), pipeline, images)
        subject.roofline_ms = subject.gpu.roofline_ms


class Found(nn.Module):
    """The network and the detection of a pipeline."""

    def __init__(self, pipeline: StereoPipeline) -> None:
        super().__init__()
        self.pipeline = pipeline
        self.network = pipeline.network

    def forward(self, grey: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Map grey images (B, 1, H, W) to keypoints."""
        return self.pipeline.features(grey)


def compiled(module: Network | Found, batch: Tensor, backend: str, precision: str) -> Call | None:
    """A part of the pipeline on a backend, ready to call; None if the backend has no parts."""
    if backend == "torch":
        engine = TorchBackend(module.eval())
        return lambda: engine(batch.numpy())
    if backend == "openvino":
        stored = openvino_backend.convert(module.eval(), (batch[:1],))
        model = openvino_backend.ImageModel(
            openvino_backend.compile_model(stored, precision, streams=2)
        )
        images = batch[:1].numpy(), batch[1:].numpy()
        return lambda: model(images)
    return None  # on a GPU, see `measure`


def make_subject(method: str, backend: str, images: np.ndarray, parts: bool) -> Subject:
    """A method on a backend, ready to call."""
    return PEERS[method](images) if method in PEERS else ours(method, backend, images, parts)


def time_all(subjects: list[Subject], rounds: int) -> dict[tuple[int, str], list[float]]:
    """Milliseconds of each (subject, stage), measured in turn, with fewer rounds for slow ones."""
    took: dict[tuple[int, str], list[float]] = {}
    for i, subject in enumerate(subjects):
        for stage, call in subject.stages.items():
            call()  # warm-up
            took[i, stage] = []
    for _ in track(range(rounds), description="rounds", transient=True):
        for (i, stage), times in took.items():
            if len(times) >= 3 and sum(times) > 1e3 * LONGEST:
                continue
            begin = time.perf_counter()
            subjects[i].stages[stage]()
            times.append(1e3 * (time.perf_counter() - begin))
    return took


def _memory_mb(name: str) -> float:
    """Memory of this process in MiB: resident (VmRSS) or peak (VmHWM).

    getrusage is not used: its peak survives exec, so a child would report that of its parent.
    """
    status = Path("/proc/self/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) / 1024


def _gpu_free_mb() -> float:
    """Free GPU memory in MiB, after the overhead of a process that uses the GPU."""
    return torch.cuda.mem_get_info()[0] / 2**20


def _memory(method: str, backend: str, size: tuple[int, int], calls: int, pipe: Connection) -> None:
    gpu_free = _gpu_free_mb() if torch.cuda.is_available() else None
    subject = make_subject(method, backend, bench_pair(*size), parts=False)
    settled = 0.0
    for i in range(calls):
        subject.stages["total"]()
        if i == calls // 10:  # allocators have settled by then
            settled = _memory_mb("VmRSS")
    pipe.send(
        {
            "calls": calls,
            "peak_mb": _memory_mb("VmHWM"),
            "settled_mb": settled,
            "end_mb": _memory_mb("VmRSS"),
            "gpu_mb": None if gpu_free is None else gpu_free - _gpu_free_mb(),
        }
    )


def memory(method: str, backend: str, size: tuple[int, int], calls: int = 3) -> Memory | None:
    """Memory (MiB) of a process that runs a method, including libraries; None if it crashes.

    Returns:
        `calls`, `peak_mb`, resident memory after a tenth of the calls (`settled_mb`) and at the end
        (`end_mb`), and the GPU memory of the engine (`gpu_mb`), None without a GPU.
    """
    context = multiprocessing.get_context("spawn")
    mine, theirs = context.Pipe()
    child = context.Process(target=_memory, args=(method, backend, size, calls, theirs))
    child.start()
    theirs.close()
    try:
        return mine.recv()
    except EOFError:  # it crashed; its error is on the terminal
        return None
    finally:
        child.join()


def ratios(rows: list[Row]) -> list[dict[str, str | float | None]]:
    """Time of each peer divided by the time of each of our engines, by size, with tracks (stage
    `total`) and, where it was measured, without, like the peers.

    `eager` is plain torch on the same GPU; stage `total` is from host memory to host memory, stage
    `GPU` the graph on the GPU without the transfers of the inputs. `after_network` is the share of
    the call outside the network. `of_roofline` is the shortest possible time of the network by the
    measured peaks, divided by its time.
    """
    engines: dict[tuple[str, str, str, str], dict[str, float]] = {}
    for r in rows:
        stages = engines.setdefault((r.method, r.backend, r.precision, r.size), {})
        stages[r.stage] = r.median_ms
    found = []
    for (method, backend, precision, size), stages in engines.items():
        if method in PEERS:
            continue
        plain = engines.get((method, EAGER, "fp32", size), {}).get("total")
        network, shortest = stages.get("network"), stages.get("roofline")
        alone = stages.get("network, GPU", network)
        names = {"method": method, "backend": backend, "precision": precision, "size": size}
        for stage in (stage for stage in ("total", UNTRACKED) if stage in stages):
            mine = stages[stage]
            row: dict[str, str | float | None] = {**names, "stage": stage}
            for (other, _, _, other_size), of_peer in engines.items():
                if other in PEERS and other_size == size:
                    row[other] = of_peer["total"] / mine
            eager = plain is not None and backend in GPU_ENGINES and stage == "total"
            row["eager"] = plain / mine if eager and plain else None
            row["after_network"] = None if network is None else 1 - network / mine
            row["of_roofline"] = shortest / alone if alone and shortest is not None else None
            found.append(row)
    return found


def run_bench(
    sizes: list[tuple[int, int]],
    methods: list[str],
    backends: list[str],
    rounds: int,
    json_file: Path | None,
    memory_calls: int = 3,
) -> dict:
    """Measure, print a table, and write `json_file` if given; returns its content.

    Args:
        sizes: width and height of each size.
        methods: released networks, weights files, names of `PEERS`.
        backends: for our networks, each with a precision if it is not to be `auto`
            (`openvino:int8`); those that this machine cannot run are reported and skipped.
        rounds: number of timed calls of each method.
        json_file: file for the results.
        memory_calls: number of calls of each method for the memory measurement; 0 skips it.

    Raises:
        ValueError: a method or backend is unknown.
    """
    console = Console()
    usable = _usable(backends, console)
    report: dict = {"machine": machine(), "rows": [], "ratios": [], "memory": [], "gpu": []}
    rows: list[Row] = []
    for size in sizes:
        chosen = [(m, b) for m in methods for b in (["opencv"] if m in PEERS else usable)]
        images = bench_pair(*size)
        subjects = [make_subject(m, b, images, parts=True) for m, b in chosen]
        took = time_all(subjects, rounds)
        used = {c: memory(*c, size, memory_calls) if memory_calls else None for c in chosen}
        name = f"{size[0]}x{size[1]}"
        rows += _rows(subjects, took, [used[c] for c in chosen], name)
        report["memory"] += [
            {"method": method, "backend": backend, "size": name, **found}
            for (method, backend), found in used.items()
            if found
        ]
        report["gpu"] += [
            {"method": s.method, "backend": s.backend, "precision": s.precision, "size": name,
             "compiled": s.gpu.compiled, "kernels": s.gpu.kernels}
            for s in subjects
            if s.gpu is not None
        ]  # fmt: skip
        report["rows"] = [vars(row) for row in rows]
        report["ratios"] = ratios(rows)
        if json_file:
            json_file.write_text(json.dumps(report, indent=1) + "\n")
    _print(console, rows, report["ratios"], report["gpu"])
    return report


def _usable(backends: list[str], console: Console) -> list[str]:
    """The backends that this machine can run; prints why others are skipped."""
    unknown = sorted({name.partition(":")[0] for name in backends} - set(BACKENDS))
    if unknown:
        raise ValueError(f"unknown backend {', '.join(unknown)}: use {', '.join(BACKENDS)}")
    usable = []
    for name in backends:
        reason = backend_module(name.partition(":")[0]).unavailable()
        if reason is None:
            usable.append(name)
        else:
            console.print(f"{name} is skipped: {reason}")
    if "cuda" in usable:
        usable.append(EAGER)
    return usable


def _rows(
    subjects: list[Subject],
    took: dict[tuple[int, str], list[float]],
    used: list[Memory | None],
    size: str,
) -> list[Row]:
    """One row for each stage of each subject at a size, and one for its roofline."""
    rows = []
    for (i, stage), times in took.items():
        s, found = subjects[i], used[i]
        median, p95 = statistics.median(times), float(np.percentile(times, 95))
        peak = found["peak_mb"] if found and stage == "total" else None
        rows.append(Row(s.method, s.backend, s.precision, size, stage, median, p95, peak))
    for s in subjects:
        single = {"roofline": s.roofline_ms}  # stages with one figure
        if s.gpu is not None:
            single |= {"GPU": s.gpu.gpu_ms, "network, GPU": s.gpu.network_ms}
        for stage, ms in single.items():
            if ms is not None:
                rows.append(Row(s.method, s.backend, s.precision, size, stage, ms, ms, None))
    return rows


def _print(
    console: Console,
    rows: list[Row],
    ratio_rows: list[dict[str, str | float | None]],
    gpu_rows: list[dict[str, str | int | bool]],
) -> None:
    heads = ("method", "backend", "type", "size", "stage", "median ms", "95 %", "peak MiB")
    table = Table(*heads, title="one stereo pair, from images to matches")
    for row in rows:
        digits = 1 if row.median_ms >= 10 else 3
        numbers = (f"{row.median_ms:.{digits}f}", f"{row.p95_ms:.{digits}f}")
        peak = "" if row.peak_rss_mb is None else f"{row.peak_rss_mb:.0f}"
        table.add_row(row.method, row.backend, row.precision, row.size, row.stage, *numbers, peak)
    console.print(table)
    if gpu_rows:
        table = Table(*gpu_rows[0], title="on the GPU: kernels of one call")
        for gpu_row in gpu_rows:
            table.add_row(*map(str, gpu_row.values()))
        console.print(table)
    if not ratio_rows:
        return
    names = list(ratio_rows[0])
    table = Table(
        *names, title="time of the peer / ours; after_network, of_roofline: shares of our time"
    )
    for ratio in ratio_rows:
        cells = (
            "" if v is None else v if isinstance(v, str) else f"{v:.2f}" for v in ratio.values()
        )
        table.add_row(*cells)
    console.print(table)
