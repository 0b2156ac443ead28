"""The command line: what a user gets wrong ends in one line, not in a traceback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from kp_frontend.cli import main
from kp_frontend.output_paths import check_file, check_folder
from kp_frontend.ros.environment import share_folder, typestore


@pytest.fixture
def folder(tmp_path):
    """An image to train on, files that are not what they are said to be, and a dark scene."""
    noise = np.random.default_rng(0).integers(0, 256, (300, 400), np.uint8)
    (tmp_path / "images").mkdir()
    cv2.imwrite(str(tmp_path / "images/one.png"), cv2.GaussianBlur(noise, (0, 0), 2))
    (tmp_path / "junk.npz").write_bytes(b"junk")
    np.savez(tmp_path / "foreign.npz", a=np.zeros(3))
    (tmp_path / "list.yaml").write_text("- a\n")
    (tmp_path / "broken.yaml").write_text("a: [b\n")
    (tmp_path / "words.yaml").write_text("steps: many\n")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/last.safetensors").write_bytes(b"junk")
    for name, scenes in (("number", 3), ("keys", [{"dir": "."}])):
        (tmp_path / name).mkdir()
        (tmp_path / name / "scenes.json").write_text(json.dumps(scenes))
    (tmp_path / "dark").mkdir()
    for name in ("l.png", "r.png"):
        cv2.imwrite(str(tmp_path / "dark" / name), np.zeros((240, 320), np.uint8))
    cv2.imwrite(str(tmp_path / "dark/gt.png"), np.full((240, 320), 9, np.uint8))
    (tmp_path / "dark/cut.pfm").write_bytes(b"Pf\n")
    scene = {"dir": ".", "left": "l.png", "right": "r.png", "gt": "gt.png", "scale": 1}
    scenes = [scene, scene | {"gt": "cut.pfm"}]
    (tmp_path / "dark/scenes.json").write_text(json.dumps(scenes))
    return tmp_path


@pytest.mark.parametrize(
    "command",
    [
        "label {0}/nowhere --out {0}/l.npz",
        "label {0}/images --out {0}/run",
        "label {0}/images --out {0}/l.npz --model nothing",
        "train --images {0}/images --labels {0}/junk.npz --out {0}/out",
        "train --images {0}/images --labels {0}/foreign.npz --out {0}/out",
        "train --images {0}/images --config {0}/list.yaml --out {0}/out",
        "train --images {0}/images --config {0}/broken.yaml --out {0}/out",
        "train --images {0}/images --config {0}/words.yaml --out {0}/out",
        "train --images {0}/images --from {0}/junk.npz --out {0}/out",
        "train --images {0}/images --out {0}/run",
        "evaluate middlebury {0}/images --out {0}/out",
        "evaluate middlebury {0}/number --out {0}/out",
        "evaluate middlebury {0}/keys --out {0}/out",
        "evaluate middlebury {0}/dark --methods nothing --out {0}/out",
        "evaluate middlebury {0}/dark --methods orb --show nothing --out {0}/out",
        "evaluate middlebury {0}/dark --method nothing:f --out {0}/out",
        "evaluate middlebury {0}/dark --methods orb --out {0}/junk.npz",
        "evaluate homography {0}/images --out {0}/out",
        "evaluate homography {0}/nowhere --out {0}/out",
    ],
)
def test_a_mistake_ends_in_one_line(folder, capfd, command):
    assert main(command.format(folder).split()) == 1
    words = capfd.readouterr().err.strip().splitlines()
    assert len(words) == 1 and words[0].startswith("kp: ")


@pytest.mark.parametrize(
    "command",
    [
        "bench --json",
        "doctor --json",
        "soak --json",
        "bag info {0}/none.mcap --json",
        "label {0}/images --out",
        "quantize tiny --images {0}/images --out",
        "uncertainty tiny --scenes {0}/dark --out",
    ],
)
def test_a_file_that_cannot_be_written_is_named_before_the_work(folder, capfd, command):
    for path, reason in (("run", "run is a folder"), ("junk.npz/out", "junk.npz is a file")):
        assert main([*command.format(folder).split(), str(folder / path)]) == 1
        (line,) = capfd.readouterr().err.splitlines()
        assert f"{folder}/{reason}, not a" in line


@pytest.mark.parametrize(
    "command",
    [
        "demo",
        "train --images {0}/images",
        "evaluate middlebury {0}/dark",
        "evaluate homography {0}/images",
        "evaluate bag {0}/none.mcap",
        "evaluate odometry {0}/none",
    ],
)
def test_a_folder_that_cannot_be_written_is_named_before_the_work(folder, capfd, command):
    for path in ("junk.npz", "junk.npz/out"):
        assert main([*command.format(folder).split(), "--out", str(folder / path)]) == 1
        assert capfd.readouterr().err == f"kp: {folder}/junk.npz is a file, not a folder\n"


def test_the_checks_of_paths_write_nothing(tmp_path):
    file = tmp_path / "new" / "result.json"
    check_file(file)
    assert file.parent.is_dir() and not list(file.parent.iterdir())
    file.write_text("before")
    check_file(file)
    assert file.read_text() == "before"
    check_folder(tmp_path / "other" / "run")
    assert not (tmp_path / "other").exists()


def test_a_device_is_not_replaced(tmp_path, folder, capfd):
    check_file(Path(os.devnull))  # it can be written to
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for command in (["label"], ["quantize", "tiny", "--images"]):
        assert main([*command, str(folder / "images"), "--out", str(pipe)]) == 1
        assert capfd.readouterr().err == f"kp: {pipe} is a device or a pipe, not a file\n"
    assert pipe.is_fifo()


def test_an_error_of_the_system_without_a_path_is_its_reason(monkeypatch, capfd):
    monkeypatch.setattr("kp_frontend.tools.doctor.run_doctor", lambda *_: {})
    assert main(["doctor", "--json", "/dev/full"]) == 1
    assert capfd.readouterr().err == "kp: No space left on device\n"


@pytest.mark.parametrize(
    "command",
    [
        "demo --rate 0",
        "demo --frames -3",
        "demo --no-such-option",
        "train --images x --out y --device abacus",
        "evaluate middlebury x --out y --max-keypoints 0",
        "evaluate middlebury x --out y --size 1920",
        "train --images x --out y --workers -1",
        "bench --rounds 0",
        "bench --memory-calls -1",
        "bench --sizes 640",
        "bench --sizes ,",
        "bench --methods= --sizes 640x480",
        "evaluate middlebury x --out y --disturb ,",
        "bench --sizes 640x480,10x10",
    ],
)
def test_a_wrong_option_is_refused(command, capfd):
    with pytest.raises(SystemExit) as refused:
        main(command.split())
    assert refused.value.code == 2
    assert "Traceback" not in capfd.readouterr().err


def test_dark_scenes_are_measured_and_unreadable_ones_named(folder):
    arguments = ["evaluate", "middlebury", str(folder / "dark"), "--out", str(folder / "out")]
    assert main([*arguments, "--methods", "tiny,sift,orb"]) == 0
    metrics = json.loads((folder / "out/metrics.json").read_text())
    assert metrics["scenes"] == ["."]
    assert "cut.pfm" in metrics["protocol"]["skipped"][0]
    for method in metrics["methods"].values():
        assert method["total_matches"]["mean"] == 0
        assert method["disparity_error_px"]["mean"] is None


def test_every_command_has_help_with_an_example():
    for command in (
        "demo",
        "node",
        "doctor",
        "bench",
        "label",
        "train",
        "evaluate middlebury",
        "evaluate homography",
    ):
        words = [sys.executable, "-m", "kp_frontend.cli", *command.split(), "--help"]
        ended = subprocess.run(words, capture_output=True, text=True, timeout=60)
        assert ended.returncode == 0
        assert f"example: kp {command}" in " ".join(ended.stdout.split())


def test_a_command_of_ros_without_ros_ends_in_one_line(monkeypatch, capfd):
    monkeypatch.setitem(sys.modules, "rclpy.executors", None)
    assert main(["demo"]) == 1
    (line,) = capfd.readouterr().err.splitlines()
    assert "rclpy" in line and "make setup" in line


def test_files_of_a_checkout_are_found_without_installation(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    monkeypatch.delenv("AMENT_PREFIX_PATH", raising=False)
    assert (share_folder() / "config" / "stereo.yaml").is_file()
    assert "kp_msgs/msg/StereoFeatures" in typestore().types
