"""Data sets that become bags: KITTI, Middlebury, EuRoC and plain folders."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml
from made_bags import COUNT, evaluate
from made_world import FOCAL, HEIGHT, WIDTH

from kp_frontend.calibration import StereoCalibration
from kp_frontend.cli import main
from kp_training.evaluation.bags import writer
from kp_training.evaluation.bags.reader import Bag
from kp_training.evaluation.bags.stereo import StereoBag
from kp_training.evaluation.bags.topics import StereoTopics, choose_topics
from kp_training.evaluation.sequences import FIRST_STAMP, open_sequence

DATA = Path(__file__).parents[3] / "shared/data"


def save(path: Path, image: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), image)


def test_kitti_layout_is_read(frames, tmp_path, capsys):
    for i, frame in enumerate(frames):
        save(tmp_path / "image_0" / f"{i:06}.png", frame.left)
        save(tmp_path / "image_1" / f"{i:06}.png", frame.right)
    save(tmp_path / "image_0" / "000009.png", frames[0].left)
    rows = [" ".join(map(str, c.p.reshape(-1))) for c in frames[0].cameras]
    (tmp_path / "calib.txt").write_text(f"P0: {rows[0]}\nP1: {rows[1]}\n")
    poses = [" ".join(map(str, f.pose[:3].reshape(-1))) for f in frames]
    (tmp_path / "poses.txt").write_text("\n".join(poses))
    (tmp_path / "times.txt").write_text("\n".join(str(0.25 * i) for i in range(COUNT)))
    out = tmp_path / "out.mcap"
    assert main(["bag", "make", "kitti", str(tmp_path), str(out)]) == 0
    assert "left out: 000009.png: only on one side" in capsys.readouterr().out
    with Bag(out) as bag:
        found = list(StereoBag(bag, choose_topics(bag, StereoTopics())).frames())
    assert [f.stamp - FIRST_STAMP for f in found] == [250_000_000 * i for i in range(COUNT)]
    for ours, theirs in zip(frames, found, strict=True):
        np.testing.assert_array_equal(ours.left, theirs.left)
        np.testing.assert_allclose(ours.pose, theirs.pose, atol=1e-12)
        assert ours.calibration() == theirs.calibration()
    (tmp_path / "poses.txt").write_text("\n".join(poses[:-1]))
    assert main(["bag", "make", "kitti", str(tmp_path), str(out)]) == 1
    assert "4 pairs, but 3 poses" in capsys.readouterr().err


def test_middlebury_and_folder_layouts_are_read(frames, tmp_path):
    root = tmp_path / "scenes"
    for name in ("a", "b"):
        save(root / name / "l.png", frames[0].left)
        save(root / name / "r.png", frames[0].right)
        truth = np.nan_to_num(frames[0].disparity * 4).astype(np.uint8)
        save(root / name / "d.png", truth)
    (root / "a" / "calib.txt").write_text(
        f"cam0=[{FOCAL} 0 90; 0 {FOCAL} 70; 0 0 1]\ncam1=[{FOCAL} 0 95; 0 {FOCAL} 70; 0 0 1]\n"
        f"doffs=5\nbaseline=120\nwidth={WIDTH}\nheight={HEIGHT}\n"
    )
    entry = {"left": "l.png", "right": "r.png", "gt": "d.png", "scale": 4}
    (root / "scenes.json").write_text(json.dumps([{"dir": n, **entry} for n in ("a", "b", "c")]))
    writer.write_bag(sequence := open_sequence("middlebury", root, 1.0), tmp_path / "m.mcap")
    assert len(sequence.left_out) == 1 and sequence.left_out[0].startswith("c:")
    with Bag(tmp_path / "m.mcap") as bag:
        a, b = StereoBag(bag, choose_topics(bag, StereoTopics())).frames()
    assert b.stamp - a.stamp == 10**9
    assert [a.camera, b.camera] == ["a/left_optical", "b/left_optical"]
    assert a.calibration() == StereoCalibration(FOCAL, FOCAL, 90, 70, 0.12, -5)
    assert b.calibration() is None
    np.testing.assert_array_equal(a.disparity, frames[0].disparity)
    # Scenes are no sequence: nothing is said of time.
    methods = evaluate(tmp_path / "m.mcap", tmp_path)["methods"]["tiny"]
    assert "track_survival" not in methods and methods["stereo_accuracy"]["count"] == 2

    for i, frame in enumerate(frames[:2]):
        save(tmp_path / "rig" / "left" / f"{i}.png", frame.left)
        save(tmp_path / "rig" / "right" / f"{i}.png", frame.right)
    for side, camera in zip(("left", "right"), frames[0].cameras, strict=True):
        parts = {"camera_matrix": camera.k, "distortion_coefficients": camera.d,
                 "rectification_matrix": camera.r, "projection_matrix": camera.p}  # fmt: skip
        text = {name: {"data": value.reshape(-1).tolist()} for name, value in parts.items()}
        text |= {"image_width": WIDTH, "image_height": HEIGHT, "distortion_model": "plumb_bob"}
        (tmp_path / "rig" / f"{side}.yaml").write_text(yaml.safe_dump(text))
    one, two = open_sequence("folder", tmp_path / "rig", 20).frames
    assert two.stamp - one.stamp == 50_000_000
    np.testing.assert_array_equal(two.right, frames[1].right)
    assert asdict(one.calibration()) == asdict(frames[0].calibration())
    (tmp_path / "rig" / "left.yaml").write_text("nothing: here")
    with pytest.raises(ValueError, match="is not a ROS camera calibration"):
        open_sequence("folder", tmp_path / "rig")


@pytest.mark.skipif(not DATA.is_dir(), reason="no data sets beside the repository")
def test_the_real_layouts_are_read():
    kitti = open_sequence("kitti", DATA / "sequences/kitti_sequence_1")
    frame = next(kitti.frames)
    assert kitti.length == 51 and frame.left.shape == (370, 1226)
    assert frame.calibration().baseline == pytest.approx(0.537, abs=1e-3)
    euroc = open_sequence("euroc", DATA / "sequences/euroc_v1_01_excerpt")
    frame = next(euroc.frames)
    assert euroc.raw and euroc.length == 24 and frame.left.shape == (480, 752)
    assert frame.calibration().baseline == pytest.approx(0.11, abs=1e-3)
    assert frame.rectified().left.shape == (480, 752)
