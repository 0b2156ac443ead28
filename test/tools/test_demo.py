"""`kp demo`, shortened: three processes, ground truth, picture, animation and bag."""

from __future__ import annotations

import json
import subprocess
import sys

import cv2
from PIL import Image as PilImage
from rosbags.highlevel import AnyReader

from kp_frontend.ros.environment import typestore


def test_demo_measures_and_leaves_its_files(tmp_path):
    command = [sys.executable, "-m", "kp_frontend.cli", "demo", "--out", str(tmp_path)]
    ended = subprocess.run(
        [*command, "--frames", "12", "--rate", "2"], capture_output=True, text=True, timeout=300
    )
    assert ended.returncode == 0, ended.stderr
    assert "overlay.png" in ended.stdout.splitlines()[-1]
    numbers = json.loads((tmp_path / "demo.json").read_text())
    assert numbers["pairs_sent"] == 12
    assert numbers["pairs_processed"] + sum(numbers["pairs_dropped"].values()) == 12
    assert numbers["matches"] > 100
    assert numbers["matches_within_3px"] > 0.8
    assert cv2.imread(str(tmp_path / "overlay.png")).shape == (960, 1280, 3)
    assert PilImage.open(tmp_path / "stream.gif").n_frames > 1
    with AnyReader([tmp_path / "bag"], default_typestore=typestore()) as bag:
        counts = {c.topic: c.msgcount for c in bag.connections}
        assert counts["/left/image"] == counts["/right/camera_info"] == 12
        assert counts["/kp_frontend/features"] == numbers["pairs_processed"]
        for connection, _, raw in bag.messages():
            message = bag.deserialize(raw, connection.msgtype)
            if connection.topic == "/kp_frontend/features":
                assert len(message.points) == 3 * len(message.left_index)
