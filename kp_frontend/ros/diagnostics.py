"""Diagnostics of the node: a level, a message and values, once a second."""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Set
from dataclasses import dataclass, field

import numpy as np
from diagnostic_msgs.msg import DiagnosticStatus, KeyValue
from rclpy.impl.rcutils_logger import RcutilsLogger

from kp_frontend.features import StereoFeatures
from kp_frontend.health import Finding

WINDOW = 10  # number of reports for the rates
PAIRS = 300  # number of newest pairs for the statistics
SILENCE = 3.0  # seconds without a pair after which to warn
MUCH_DROPPED = 0.1  # share of dropped images above which to warn


@dataclass
class Health:
    """The state of the node besides its counters and statistics. Empty strings mean no problem."""

    active: bool
    silent: float = 0.0  # seconds since the last pair arrived
    why_silent: str = ""
    missing_infos: str = ""
    calibration_problem: str = ""
    clock_problem: str = ""
    findings: list[Finding] = field(default_factory=list)  # of `HealthMonitor`
    raw: bool = False
    failures_in_a_row: int = 0
    last_failure: str = ""
    last_bad: str = ""
    backend: str = ""
    asked_backend: str = "auto"


class Figures:
    """Statistics of the newest pairs. Written by the worker, read by the executor."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pairs: deque[tuple[dict[str, float], int, int, float]] = deque(maxlen=PAIRS)

    def add(self, result: StereoFeatures, latency_ms: float) -> None:
        """Add a published pair."""
        times = {"latency": latency_ms, **result.stage_ms}
        with self._lock:
            self._pairs.append((times, len(result.left), len(result), result.row_offset))

    def clear(self) -> None:
        """Forget all pairs."""
        with self._lock:
            self._pairs.clear()

    def values(self) -> dict[str, float]:
        """Medians, percentiles and the row offset, by name."""
        with self._lock:
            pairs = list(self._pairs)
        if not pairs:
            return {}
        found: dict[str, float] = {
            "keypoints": int(np.median([keypoints for _, keypoints, _, _ in pairs])),
            "matches": int(np.median([matches for _, _, matches, _ in pairs])),
            "matches_in_window": sum(matches for _, _, matches, _ in pairs),
        }
        offsets = [offset for *_, offset in pairs if not math.isnan(offset)]
        if offsets:
            found["row_offset_px"] = round(float(np.median(offsets)), 3)
        for stage in pairs[-1][0]:
            times = [t[stage] for t, *_ in pairs if stage in t]
            for name, value in zip(
                ("p50", "p95", "max"), np.percentile(times, (50, 95, 100)), strict=True
            ):
                found[f"{stage}_ms_{name}"] = round(float(value), 2)
        return found


class LevelLog:
    """Logs each change of level once, and while a level lasts each further cause once."""

    def __init__(self, logger: RcutilsLogger) -> None:
        self._logger = logger
        self._level = DiagnosticStatus.OK
        self._logged: frozenset[str] = frozenset()  # causes since the level changed

    def __call__(self, level: bytes, words: str, causes: Set[str] = frozenset()) -> None:
        """Log a report if it is new."""
        if level != self._level:
            self._level, self._logged = level, frozenset()
        elif not causes - self._logged:
            return
        self._logged |= causes
        if level == DiagnosticStatus.OK:
            self._logger.info(words)
        elif level == DiagnosticStatus.WARN:
            self._logger.warning(words)
        else:
            self._logger.error(words)


class Diagnosis:
    """Creates the diagnostic status. Stores earlier reports to compute rates.

    Args:
        name: name of the node with its namespace.
        log: logs new levels and causes.
    """

    def __init__(self, name: str, log: LevelLog) -> None:
        self._name, self._log = name, log
        self._before: deque[tuple[float, dict[str, int]]] = deque(maxlen=WINDOW + 1)

    def status(
        self, now: float, counts: dict[str, int], figures: dict[str, float], health: Health
    ) -> DiagnosticStatus:
        """The status at a monotonic time in seconds."""
        self._before.append((now, counts))
        then, earlier = self._before[0]
        change = {name: counts[name] - earlier[name] for name in counts}
        level, found = judge(change, health)
        words = "; ".join(finding.words for finding in found)
        words = words or ("stereo features flow" if health.active else "inactive")
        self._log(level, words, {finding.cause for finding in found})
        values = {
            **counts,
            "input_hz": _rate(change["received"] / 2, now - then),
            "output_hz": _rate(change["processed"] / 2, now - then),
            **figures,
            "backend": health.backend,
        }
        return DiagnosticStatus(
            level=level,
            name=f"{self._name}: stereo features",
            hardware_id="none",
            message=words,
            values=[KeyValue(key=k, value=str(v)) for k, v in values.items()],
        )


def _rate(count: float, seconds: float) -> float:
    return round(count / seconds, 2) if seconds > 0 else 0.0


def judge(change: dict[str, int], health: Health) -> tuple[bytes, list[Finding]]:
    """The level and the findings; no findings if there is no problem.

    Args:
        change: increase of each counter over the last reports.
    """
    if not health.active:
        return DiagnosticStatus.OK, []
    errors: list[Finding] = []
    if health.failures_in_a_row:
        words = f"the engine failed {health.failures_in_a_row} times in a row"
        errors.append(Finding("failed", f"{words}: {health.last_failure}"))
    warnings = [*_flow(change, health), *_calibration(health)]
    if health.clock_problem:
        warnings.append(Finding("clocks", health.clock_problem))
    if health.asked_backend != "auto" and health.backend.partition(" ")[0] not in (
        health.asked_backend,
        "none",
    ):
        words = f"{health.asked_backend} failed, {health.backend} is used instead"
        warnings.append(Finding("backend", words))
    if health.silent <= SILENCE:
        warnings += health.findings
    if errors:
        return DiagnosticStatus.ERROR, errors + warnings
    return DiagnosticStatus.WARN if warnings else DiagnosticStatus.OK, warnings


def _flow(change: dict[str, int], health: Health) -> list[Finding]:
    """Findings about the stream: no pairs, or many dropped images."""
    if health.silent > SILENCE:
        words = f"no stereo pair for {health.silent:.0f} s: {health.why_silent}"
        return [Finding("silent", words)]
    if change["dropped"] <= MUCH_DROPPED * change["received"]:
        return []
    reasons = {
        k.removeprefix("dropped_"): n for k, n in change.items() if k.startswith("dropped_") and n
    }
    share = change["dropped"] / max(1, change["received"])
    each = ", ".join(f"{n} {reason}" for reason, n in reasons.items())
    bad = f" (last: {health.last_bad})" if reasons.get("bad") else ""
    return [Finding("dropped", f"{share:.0%} of the images are dropped: {each}{bad}")]


def _calibration(health: Health) -> list[Finding]:
    """Findings about a missing or invalid camera_info."""
    lost = "no pair can be processed" if health.raw else "no depth"
    if health.missing_infos:
        words = f"{lost}: no camera_info comes on {health.missing_infos}"
        return [Finding("no camera_info", words)]
    if health.calibration_problem:
        words = f"{lost}, camera_info cannot be used: {health.calibration_problem}"
        return [Finding("camera_info", words)]
    return []
