"""`kp soak` as a user runs it, for a short while."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import numpy as np
import pytest
from conftest import OTHER_DOMAIN

from kp_frontend.encodings import GreyConverter
from kp_frontend.ros.messages import image_message
from kp_frontend.tools.soak import _memory
from kp_frontend.tools.soak_inputs import BAD_COMPRESSED, GOOD_COMPRESSED, Camera, compressed


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


def test_compressed_images_are_published_as_image_transport_does(monkeypatch):
    monkeypatch.setenv("ROS_DOMAIN_ID", str(OTHER_DOMAIN))
    camera = Camera("compressed")
    topics = {p.topic_name for p in camera.publishers.values()}
    camera.close()
    sides, names = ("left", "right"), ("camera_info", "image/compressed")
    assert topics == {f"/{side}/{name}" for side in sides for name in names}


@pytest.mark.parametrize("name", [name for name in BAD_COMPRESSED if "stamp" not in name])
def test_a_bad_compressed_image_is_refused(name, pair):
    message = compressed(image_message(pair[0], "mono8"))
    BAD_COMPRESSED[name](message)
    with pytest.raises(ValueError, match="compressed image"):
        GreyConverter("auto")(message)


@pytest.mark.parametrize("name", GOOD_COMPRESSED)
def test_a_good_compressed_image_has_the_same_pixels(name, pair):
    message = compressed(image_message(pair[0], "mono8"))
    GOOD_COMPRESSED[name](message)
    grey = GreyConverter("auto")(message).astype(float)
    assert np.abs(grey - pair[0]).mean() < 2
