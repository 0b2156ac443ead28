"""`kp soak` as a user runs it, for a short while."""

from __future__ import annotations

import json
import math
import subprocess
import sys

from kp_frontend.tools.soak import _memory


def test_a_short_soak_balances(tmp_path):
    file = tmp_path / "soak.json"
    command = ("-m", "kp_frontend.cli", "soak", "--minutes", "0.25", "--json", str(file))
    ended = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=300)
    result = json.loads(file.read_text())
    # How long things take is the machine's affair here.
    timeless = [e for e in result["errors"] if not e.startswith(("latency", "the node took"))]
    assert not timeless, (timeless, file.with_suffix(".log").read_text())
    assert ended.returncode == bool(result["errors"])
    assert result["received"] == result["processed"] + sum(result["dropped"].values()) > 100
    assert result["processed"] > 20
    assert sum(result["faults"].values()) > 3
    assert 0 < result["latency_ms"]["p50"] <= result["latency_ms"]["p95"]
    assert result["rss_mb"]["start"] > 50
    assert "images: received" in file.with_suffix(".log").read_text()


def test_memory_is_compared_between_the_settled_start_and_the_end():
    samples = [(float(t), 900.0 if t < 60 else 500.0 + t / 60) for t in range(0, 600, 2)]
    start, end = _memory(samples, 10.0)
    assert (round(start, 1), round(end, 1)) == (501.5, 509.5)
    assert all(math.isnan(value) for value in _memory([], 1.0))
