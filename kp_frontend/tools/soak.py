"""`kp soak`: streams images with random faults through the real node and checks the result.

The faults are those of real rigs: broken messages, other encodings, a camera that stops, a covered
lens, swapped topics, a wrong camera_info, clock jumps and offsets, bursts, a driver that restarts,
viewers that subscribe and unsubscribe, parameter changes. At the end, every
image must be counted, latency must be within two frame times, and memory must not have grown.
"""

from __future__ import annotations

import json
import math
import os
import random
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import rclpy
from diagnostic_msgs.msg import DiagnosticArray
from kp_msgs.msg import StereoFeatures as StereoFeaturesMsg
from rclpy.executors import SingleThreadedExecutor
from rclpy.parameter import Parameter
from rclpy.parameter_client import AsyncParameterClient
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from sensor_msgs.msg import Image, PointCloud2

from kp_frontend.ros.messages import ImageMessage, image_message, stamp_ns
from kp_frontend.ros.processes import private_environment, process
from kp_frontend.tools.demo import HEIGHT, WIDTH, camera_infos, load_pair, window_place
from kp_frontend.tools.soak_inputs import BY_TRANSPORT, INFOS, Camera, compressed, dark

LEVELS = {b"\0": "OK", b"\1": "WARN", b"\2": "ERROR", b"\3": "STALE"}
APART = 7_000_000  # ns between the stamps of a pair while the clocks differ
NODE_START = 180.0  # seconds until the node must have subscribed
NODE_END = 2.0  # maximum time to end after an interrupt, seconds
MOST_GROWTH = 0.01  # maximum growth of the node's memory, checked in runs of at least LONG minutes
LONG, SETTLED = 5.0, 60.0  # minutes; seconds before the first memory measurement in such runs


class Soak:
    """The stream, its faults and the counted results."""

    def __init__(self, rate: float, seed: int, transport: str) -> None:
        self.rate, self.random, self.transport = rate, random.Random(seed), transport
        self.bad, self.good = BY_TRANSPORT[transport]
        self.pair = load_pair()
        self.camera = Camera(transport)
        self.node = rclpy.create_node("soak")
        self.executor = SingleThreadedExecutor()
        self.executor.add_node(self.node)
        self.node.create_subscription(StereoFeaturesMsg, "kp_frontend/features", self._features, 10)
        self.node.create_subscription(DiagnosticArray, "/diagnostics", self._diagnostics, 10)
        self.parameters = AsyncParameterClient(self.node, "kp_frontend")
        self.viewers: list = []
        self.frame = 0
        self.clock_offset = 0  # offset of the cameras' clock, ns
        # Monotonic times at which faults that last end.
        self.left_only_until = self.silent_until = self.dark_until = self.swapped_until = 0.0
        self.apart_until = self.info_until = 0.0
        self.info_fault = next(iter(INFOS.values()))
        self.levels: Counter[str] = Counter()  # of the diagnostics
        self.sent: dict[int, float] = {}  # time stamp -> monotonic time
        self.images_sent = 0
        self.latency: list[float] = []
        self.work: list[float] = []  # processing time of each pair in the node, ms
        self.sequences: list[int] = []
        self.counts: dict[str, int] = {}
        self.faults: Counter[str] = Counter()
        self.rss: list[tuple[float, float]] = []
        self.errors: list[str] = []

    def _features(self, message: StereoFeaturesMsg) -> None:
        sent = self.sent.pop(stamp_ns(message), None)
        if sent is not None:
            self.latency.append(1e3 * (time.monotonic() - sent))
        stages = zip(message.stage, message.stage_ms, strict=True)
        self.work.append(sum(ms for stage, ms in stages if stage != "wait"))
        if self.sequences and message.sequence <= self.sequences[-1]:
            self.errors.append(f"sequence {message.sequence} after {self.sequences[-1]}")
        self.sequences.append(message.sequence)

    def _diagnostics(self, message: DiagnosticArray) -> None:
        for status in message.status:
            self.levels[LEVELS[status.level]] += 1
            values = {v.key: int(v.value) for v in status.values if v.value.isdigit()}
            self.counts = values
            balance = values["processed"] + values["dropped"] + values["waiting"]
            if values["received"] != balance:
                self.errors.append(f"counters do not balance: {values}")

    def send(self, spoil: Callable[[Any], None] | None = None, both: bool = False) -> None:
        """Publish the next pair. `spoil` changes its left image, or both images."""
        self.frame += 1
        x, y = window_place(self.frame, self.pair)
        stamp = time.time_ns() + self.clock_offset
        now = time.monotonic()
        infos = dict(zip(("left", "right"), camera_infos(x, y), strict=True))
        if now < self.info_until:
            self.info_fault(infos["right"])
        pictures = [self.pair.left, self.pair.right]
        if now < self.swapped_until:
            pictures.reverse()
        for side, pixels in zip(("left", "right"), pictures, strict=True):
            if side == "right" and now < self.left_only_until:
                continue
            window = pixels[y : y + HEIGHT, x : x + WIDTH]
            image: ImageMessage = image_message(window, "mono8")
            if now < self.dark_until:
                dark(image)
            if self.transport == "compressed":
                image = compressed(image)
            own = stamp + (APART if side == "right" and now < self.apart_until else 0)
            for name, message in (("camera_info", infos[side]), ("image", image)):
                message.header.stamp.sec, message.header.stamp.nanosec = divmod(own, 10**9)
                message.header.frame_id = f"{side}_optical"
                if name == "image" and spoil is not None and (both or side == "left"):
                    spoil(message)
                self.camera.publishers[f"{side}/{name}"].publish(message)
            self.images_sent += 1
        self.sent[stamp] = time.monotonic()
        if len(self.sent) > 1000:
            del self.sent[next(iter(self.sent))]

    def fault(self) -> None:
        """Inject one random fault."""
        name = self.random.choice(
            ("bad", "other encoding", "lonely image", "jump", "burst", "one camera stops",
             "both stop", "driver restarts", "viewers", "parameter", "covered lens", "swapped",
             "clocks apart", "camera_info")
        )  # fmt: skip
        self.faults[name] += 1
        if name == "bad":
            for _ in range(5):
                self.send(self.random.choice(list(self.bad.values())), self.random.random() < 0.5)
        elif name == "other encoding":
            self.send(self.random.choice(list(self.good.values())), both=True)
        elif name == "lonely image":
            self.left_only_until = time.monotonic() + 0.01
            self.send()
        elif name == "jump":
            self.clock_offset += self.random.choice((-60, -5, 30)) * 10**9
        elif name == "burst":
            for _ in range(20):
                self.send()
                time.sleep(0.1 / self.rate)
        elif name == "one camera stops":
            self.left_only_until = time.monotonic() + 1.0
        elif name == "both stop":
            self.silent_until = time.monotonic() + 1.0
        elif name == "driver restarts":
            self.camera.close()
            self.camera = Camera(self.transport)
        elif name == "viewers":
            while self.viewers:
                self.node.destroy_subscription(self.viewers.pop())
            if self.faults[name] % 2:
                for kind, topic in ((PointCloud2, "points"), (Image, "debug_image")):
                    self.viewers.append(
                        self.node.create_subscription(
                            kind, f"kp_frontend/{topic}", lambda _: None, 2
                        )
                    )
        elif name == "covered lens":
            self.dark_until = time.monotonic() + 3.0
        elif name == "swapped":
            self.swapped_until = time.monotonic() + 3.0
        elif name == "clocks apart":
            self.apart_until = time.monotonic() + 1.0
        elif name == "camera_info":
            self.info_until = time.monotonic() + 1.0
            self.info_fault = self.random.choice(list(INFOS.values()))
        else:
            value = self.random.uniform(0.002, 0.02)
            self.parameters.set_parameters([Parameter("score_threshold", value=value)])

    def stream(self, seconds: float, pid: int, tick: Callable[[float], None]) -> None:
        """Send pairs at the rate for a time, with a fault about every 2 seconds."""
        begin = time.monotonic()
        next_pair = next_fault = begin
        while (now := time.monotonic()) < begin + seconds:
            if now >= next_pair:
                if now >= self.silent_until:
                    self.send()
                next_pair = max(next_pair + 1 / self.rate, now)
            if now >= next_fault:
                self.fault()
                self.rss.append((now - begin, rss_mb(pid)))
                next_fault = now + self.random.uniform(1.0, 3.0)
            self.executor.spin_once(timeout_sec=max(0.0, next_pair - time.monotonic()))
            tick(now - begin)
        self.left_only_until = self.dark_until = self.swapped_until = 0.0
        self.apart_until = self.info_until = 0.0

    def wait(self, ready: Callable[[], bool], seconds: float) -> bool:
        """Handle messages until `ready` returns true or the time is up; return `ready()`."""
        end = time.monotonic() + seconds
        while not ready() and time.monotonic() < end:
            self.executor.spin_once(timeout_sec=0.1)
        return ready()

    def send_until_heard(self, seconds: float) -> None:
        """Send pairs until features are received or the time is up."""
        end = time.monotonic() + seconds
        while not self.sequences and time.monotonic() < end:
            self.send()
            self.executor.spin_once(timeout_sec=0.1)

    def all_counted(self) -> bool:
        """Whether the counters contain the last pair that was received, and no image waits."""
        pairs = max(self.sequences, default=-1) + 1
        return self.counts.get("processed") == 2 * pairs and not self.counts["waiting"]

    def close(self) -> None:
        """Leave DDS."""
        self.camera.close()
        self.executor.shutdown()
        self.node.destroy_node()


def rss_mb(pid: int) -> float:
    """Resident memory of a process in MB; NaN if it has ended."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError):
        return math.nan
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def run_soak(
    minutes: float,
    json_file: Path | None = None,
    rate: float = 10.0,
    seed: int = 0,
    transport: str = "raw",
) -> dict:
    """Stream for some minutes and check the result.

    Args:
        minutes: duration.
        json_file: file for the result.
        rate: pairs per second, except during bursts and pauses.
        seed: seed of the faults.
        transport: type of the images: `raw` or `compressed`.

    Returns:
        The content of the file. `errors` is empty if all checks pass.

    Raises:
        RuntimeError: the node did not start.
    """
    os.environ.update(private_environment())
    log = json_file.with_suffix(".log") if json_file else Path(os.devnull)
    given = ("-p", "reliable:=true", "-p", f"transport:={transport}")
    command = ("kp_frontend.ros.node", "--ros-args", *given)
    rclpy.init()
    soak = Soak(rate, seed, transport)
    try:
        with (
            Progress(transient=True) as bar,
            process(*command, environment=dict(os.environ), log=log) as node,
        ):
            task = bar.add_task("starting the node", total=60 * minutes)
            begin = time.monotonic()
            if not soak.wait(lambda: soak.camera.heard() or node.poll() is not None, NODE_START):
                raise RuntimeError(f"the node is not ready after {NODE_START:.0f} s")
            if node.poll() is None:
                soak.send_until_heard(5.0)
                soak.stream(
                    60 * minutes,
                    node.pid,
                    lambda t: bar.update(task, completed=t, description="streaming"),
                )
            result = _balance(soak, node, minutes, time.monotonic() - begin)
    finally:
        soak.close()
        rclpy.try_shutdown()
    if json_file:
        json_file.write_text(json.dumps(result, indent=1) + "\n")
    Console().print(table(result))
    return result


def _balance(soak: Soak, node: subprocess.Popen, minutes: float, seconds: float) -> dict:
    """Stop the node and check the counters."""
    errors = soak.errors
    if node.poll() is not None:
        errors.append(f"the node died with status {node.returncode}")
    else:
        # The last pair makes the synchroniser drop older images.
        soak.clock_offset += 100 * 10**9
        soak.send()
        last = max(soak.sequences, default=-1)
        soak.wait(lambda: max(soak.sequences, default=-1) > last, 10.0)
        if not soak.wait(soak.all_counted, 10.0):
            errors.append(f"images are not counted at the end: {soak.counts}")
        interrupted = time.monotonic()
        node.send_signal(signal.SIGINT)
        try:
            node.wait(10)
        except subprocess.TimeoutExpired:
            errors.append("the node does not end after an interrupt")
        took = time.monotonic() - interrupted
        if took > NODE_END:
            errors.append(f"the node took {took:.1f} s to end")
        if node.poll():
            errors.append(f"the node ended with status {node.returncode}")
    counts = soak.counts
    dropped = {k.removeprefix("dropped_"): v for k, v in counts.items() if k.startswith("dropped_")}
    received, processed = counts.get("received", 0), counts.get("processed", 0)
    if received != processed + sum(dropped.values()):
        errors.append("received differs from processed + dropped")
    if received > soak.images_sent:
        errors.append(f"{received} images received, only {soak.images_sent} sent")
    if soak.sequences and processed != 2 * (soak.sequences[-1] + 1):
        errors.append(f"{processed} images processed, the last sequence is {soak.sequences[-1]}")
    if not soak.latency:
        errors.append("no features were received")
    latency, work = np.array(soak.latency or [math.nan]), np.array(soak.work or [math.nan])
    p50, p95, worst = (round(float(v), 1) for v in np.percentile(latency, (50, 95, 100)))
    frame = max(1e3 / soak.rate, float(np.percentile(work, 95)))
    if p95 > 2 * frame:
        errors.append(f"95 % latency is {p95} ms, more than two frame times of {frame:.0f} ms")
    start, end = _memory(soak.rss, minutes)
    if minutes >= LONG and end > (1 + MOST_GROWTH) * start:
        errors.append(f"memory grew from {start:.0f} to {end:.0f} MB")
    return {
        "minutes": minutes,
        "transport": soak.transport,
        "seconds": round(seconds, 1),
        "sent": soak.images_sent,
        "received": received,
        "processed": processed,
        "dropped": dropped,
        "latency_ms": {"p50": p50, "p95": p95, "max": worst},
        "frame_ms": round(frame, 1),
        "rss_mb": {"start": round(start, 1), "end": round(end, 1)},
        "faults": dict(soak.faults),
        "levels": dict(soak.levels),
        "errors": errors,
    }


def _memory(samples: list[tuple[float, float]], minutes: float) -> tuple[float, float]:
    """Memory at the start and at the end: medians over a tenth of the run, after settling."""
    times, values = np.array(samples or [(0.0, math.nan)]).T
    begin = SETTLED if minutes >= LONG else 0.0
    span = 6.0 * minutes
    start = values[(times >= begin) & (times <= begin + span)]
    end = values[times >= times[-1] - span]
    return _median(start), _median(end)


def _median(values: np.ndarray) -> float:
    known = values[np.isfinite(values)]
    return float(np.median(known)) if len(known) else math.nan


def table(result: dict) -> Table:
    """The result as a table."""
    dropped = ", ".join(f"{n} {why}" for why, n in result["dropped"].items() if n)
    latency = result["latency_ms"]
    rows = {
        "images sent": result["sent"],
        "received": result["received"],
        "processed": result["processed"],
        "dropped": dropped or "none",
        "faults": ", ".join(f"{n} {name}" for name, n in sorted(result["faults"].items())),
        "diagnostics": ", ".join(f"{n} {name}" for name, n in sorted(result["levels"].items())),
        "latency, sent to features": f"median {latency['p50']} ms, 95 % {latency['p95']} ms, "
        f"longest {latency['max']} ms; a frame takes {result['frame_ms']} ms",
        "memory": f"{result['rss_mb']['start']} MB at the start, {result['rss_mb']['end']} MB at "
        "the end",
        "errors": "\n".join(result["errors"][:20]) or "none",
    }
    shown = Table(title=f"Soak of {result['minutes']:g} min", show_header=False)
    for name, value in rows.items():
        shown.add_row(name, str(value))
    return shown
