"""What the node says of itself at 1 Hz: a level, plain words, and the figures behind them."""

from __future__ import annotations

import math
import threading
from collections import deque
from dataclasses import dataclass

import numpy as np
from diagnostic_msgs.msg import DiagnosticStatus, KeyValue

from kp_frontend.features import StereoFeatures

WINDOW = 10  # reports over which rates are taken
PAIRS = 300  # newest pairs over which times and counts are taken
SILENCE = 3.0  # seconds without a pair that are worth a warning
MUCH_DROPPED = 0.1  # of the images, worth a warning
ROWS_OFF = 0.5  # pixels of median row offset that are worth a warning
ENOUGH_MATCHES = 1000  # in all, before the row offset is judged


@dataclass
class Health:
    """What is known besides the figures; None or empty where all is well."""

    active: bool
    silent: float = 0.0  # seconds since the last pair came
    why_silent: str = ""
    missing_infos: str = ""
    calibration_problem: str = ""
    raw: bool = False
    failures_in_a_row: int = 0
    last_failure: str = ""
    last_bad: str = ""
    backend: str = ""
    asked_backend: str = "auto"


class Figures:
    """Times and counts of the newest pairs. Written by the worker, read by the executor."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pairs: deque[tuple[dict[str, float], int, int, float]] = deque(maxlen=PAIRS)

    def add(self, result: StereoFeatures, latency_ms: float) -> None:
        """A pair was published."""
        times = {"latency": latency_ms, **result.stage_ms}
        with self._lock:
            self._pairs.append((times, len(result.left), len(result), result.row_offset))

    def clear(self) -> None:
        """Forget all pairs."""
        with self._lock:
            self._pairs.clear()

    def values(self) -> dict[str, float]:
        """Medians, percentiles and the row offset by name."""
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


class Diagnosis:
    """Makes the status of a report; remembers earlier ones for the rates."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._before: deque[tuple[float, dict[str, int]]] = deque(maxlen=WINDOW + 1)

    def status(
        self, now: float, counts: dict[str, int], figures: dict[str, float], health: Health
    ) -> DiagnosticStatus:
        """The status at a monotonic time in seconds."""
        self._before.append((now, counts))
        then, earlier = self._before[0]
        change = {name: counts[name] - earlier[name] for name in counts}
        level, words = judge(change, figures, health)
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


def judge(change: dict[str, int], figures: dict[str, float], health: Health) -> tuple[bytes, str]:
    """Level and words.

    Args:
        change: by how much each counter grew over the last reports.
        figures: as `Figures.values` gives them.
    """
    if not health.active:
        return DiagnosticStatus.OK, "inactive"
    errors, warnings = [], []
    if health.failures_in_a_row:
        errors.append(
            f"the engine failed {health.failures_in_a_row} times in a row: {health.last_failure}"
        )
    if health.silent > SILENCE:
        warnings.append(f"no stereo pair for {health.silent:.0f} s: {health.why_silent}")
    elif change["received"] and change["dropped"] > MUCH_DROPPED * change["received"]:
        reasons = {
            k.removeprefix("dropped_"): n
            for k, n in change.items()
            if k.startswith("dropped_") and n
        }
        share = change["dropped"] / change["received"]
        each = ", ".join(f"{n} {reason}" for reason, n in reasons.items())
        bad = f" (last: {health.last_bad})" if reasons.get("bad") else ""
        warnings.append(f"{share:.0%} of the images are dropped: {each}{bad}")
    if health.asked_backend != "auto" and health.backend.partition(" ")[0] not in (
        health.asked_backend,
        "none",
    ):
        warnings.append(f"{health.asked_backend} failed, {health.backend} is used instead")
    lost = "no pair can be processed" if health.raw else "no depth"
    if health.missing_infos:
        warnings.append(f"{lost}: no camera_info comes on {health.missing_infos}")
    elif health.calibration_problem:
        warnings.append(f"{lost}, camera_info cannot be used: {health.calibration_problem}")
    offset = figures.get("row_offset_px", 0.0)
    if abs(offset) > ROWS_OFF and figures["matches_in_window"] >= ENOUGH_MATCHES:
        warnings.append(
            f"the right image's rows are {offset:+.2f} px off the left's: calibrate the rig again"
        )
    if errors:
        return DiagnosticStatus.ERROR, "; ".join(errors + warnings)
    if warnings:
        return DiagnosticStatus.WARN, "; ".join(warnings)
    return DiagnosticStatus.OK, "stereo features flow"
