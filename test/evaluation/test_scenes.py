"""Scenes are found in every layout and read, broken ones are named."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
from made_scenes import write_pfm, write_scene

from kp_training.evaluation.layouts import SceneFiles, find_scenes
from kp_training.evaluation.middlebury.evaluation import evaluate_middlebury
from kp_training.evaluation.scenes import (
    load_scene,
    load_scenes,
    read_disparity,
)

MIDDLEBURY = Path(__file__).parents[3] / "shared/data/middlebury"
needs_middlebury = pytest.mark.skipif(
    not MIDDLEBURY.is_dir(), reason="no Middlebury scenes beside the repository"
)


def test_disparity_maps_are_read(tmp_path):
    values = np.array([[1.5, np.inf, 3.25], [4.0, 5.0, 6.0]], np.float32)
    write_pfm(tmp_path / "d.pfm", values)
    expected = np.where(np.isfinite(values), values, np.nan)
    np.testing.assert_array_equal(read_disparity(tmp_path / "d.pfm", 1), expected)
    for name in ("d.png", "d.pgm"):
        cv2.imwrite(str(tmp_path / name), np.array([[0, 40], [80, 20]], np.uint8))
        np.testing.assert_array_equal(read_disparity(tmp_path / name, 4), [[np.nan, 10], [20, 5]])


@pytest.mark.parametrize(
    ("left", "right", "maps", "height", "pixels"),
    [
        ("im2.ppm", "im6.ppm", ["disp2.pgm", "disp6.pgm"], 381, 3),  # 2001
        ("im0.pgm", "im1.pgm", ["disp0.pgm", "disp1.pgm"], 216, 3),  # 2001 Map
        ("scene1.row3.col3.ppm", "scene1.row3.col4.ppm", ["truedisp.row3.col3.pgm"], 288, 1.5),
        ("im2.png", "im6.png", ["disp2.png", "disp6.png"], 375, 6),  # 2003
        ("imL.png", "imR.png", ["disp2.png", "disp6.png"], 750, 12),
        ("im2.ppm", "im6.ppm", ["disp2.pgm", "disp6.pgm"], 1500, 24),
        ("view1.png", "view5.png", ["disp1.png", "disp5.png"], 1110, 24),  # 2005, 2006
        ("view1.png", "view5.png", ["disp1.png", "disp5.png"], 555, 12),
        ("Illum1/Exp1/view1.png", "Illum1/Exp1/view5.png", ["disp1.png", "disp5.png"], 370, 8),
        ("im0.png", "im1.png", ["disp0.pfm", "disp1.pfm"], 100, 7),  # 2014, 2021
        ("im0.png", "im1.png", ["disp0GT.pfm", "disp1GT.pfm"], 100, 7),  # MiddEval3
    ],
)
def test_every_release_layout_is_found(tmp_path, left, right, maps, height, pixels):
    write_scene(tmp_path / "set/thing", left, right, maps, height)
    found, skipped = find_scenes(tmp_path)
    assert not skipped and [files.name for files in found] == ["set/thing"]
    scene = load_scene(found[0])
    assert (scene.disparity == pixels).all()
    assert (scene.right_disparity is not None) == (len(maps) == 2)
    if len(maps) == 2:
        assert (scene.right_disparity == pixels).all()


def test_masks_are_read_and_size_is_changed(tmp_path):
    write_scene(tmp_path, "im0.png", "im1.png", ["disp0GT.pfm"], 48)
    mask = np.full((48, 64), 255, np.uint8)
    mask[:, :32] = 128
    cv2.imwrite(str(tmp_path / "mask0nocc.png"), mask)
    ((files,), _) = find_scenes(tmp_path)
    assert load_scene(files).mask.mean() == 0.5
    scene = load_scene(files, (128, 48))
    assert scene.left.shape == scene.disparity.shape == scene.mask.shape == (48, 128)
    assert (scene.disparity == 14).all() and scene.mask[:, 64:].all()
    assert not scene.mask[:, :64].any()


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda p: (p / "im1.png").write_bytes(b"no"), "im1.png cannot be read as an image"),
        (lambda p: (p / "disp0.pfm").write_bytes(b"Pf\n9 9\n-1\n"), "disp0.pfm cannot be read"),
        (lambda p: write_pfm(p / "disp0.pfm", np.ones((9, 9))), "disparity 9x9"),
        (lambda p: write_pfm(p / "disp0.pfm", np.full((9, 9), np.inf)), "has no valid disparity"),
        (lambda p: write_pfm(p / "disp1.pfm", np.ones((9, 9))), "right_disparity 9x9"),
        (lambda p: cv2.imwrite(str(p / "im1.png"), np.ones((9, 9))), "right 9x9"),
        (lambda p: (p / "im1.png").unlink(), "has disp0.pfm, but not im0 and im1"),
        (lambda p: (p / "disp0.pfm").unlink(), "has im0 and im1, but no ground truth"),
    ],
)
def test_a_broken_scene_is_named_and_the_others_are_measured(tmp_path, spoil, reason):
    for name in ("good", "bad"):
        maps = ["disp0.pfm", "disp1.pfm"]
        write_scene(tmp_path / name, "im0.png", "im1.png", maps, 100)
    spoil(tmp_path / "bad")
    metrics = evaluate_middlebury(tmp_path, ["orb"], 100).metrics
    assert metrics["scenes"] == ["good"]
    (words,) = metrics["protocol"]["skipped"]
    assert words.startswith("bad: ") and reason in words


def test_unusable_folders_are_reported(tmp_path):
    with pytest.raises(ValueError, match=r"neither scenes\.json nor a scene"):
        load_scenes(tmp_path)
    with pytest.raises(ValueError, match="is not a folder"):
        find_scenes(tmp_path / "nowhere")
    entry = {"dir": "a", "left": "l.png", "right": "r.png", "gt": "d.png", "scale": 1}
    (tmp_path / "scenes.json").write_text(json.dumps([entry, entry | {"refright": True}]))
    scenes, skipped = load_scenes(tmp_path)
    assert scenes == []
    assert skipped == ["a (2): its map belongs to the right image", "a: l.png is missing"]
    with pytest.raises(ValueError, match="no usable scene"):
        evaluate_middlebury(tmp_path, ["sift"])
    (tmp_path / "scenes.json").write_text(json.dumps([entry | {"scale": 0}]))
    with pytest.raises(ValueError, match="must be a list of scenes"):
        find_scenes(tmp_path)


@needs_middlebury
def test_real_scenes_load():
    scenes, skipped = load_scenes(MIDDLEBURY)
    listed = json.loads((MIDDLEBURY / "scenes.json").read_text())
    assert len(scenes) + len(skipped) == len(listed)
    assert len(scenes) >= 30
    for scene in scenes:
        known = scene.disparity[np.isfinite(scene.disparity)]
        assert known.size > 0.2 * scene.disparity.size, scene.name
        assert 0 < known.max() < scene.left.shape[1] / 2, scene.name


@needs_middlebury
def test_layouts_agree_with_the_listing(tmp_path):
    listed, _ = find_scenes(MIDDLEBURY)
    for path in MIDDLEBURY.iterdir():
        if path.is_dir():
            shutil.copytree(
                path, tmp_path / path.name, copy_function=lambda a, b: Path(b).symlink_to(a)
            )
    found, skipped = find_scenes(tmp_path)

    def facts(files: SceneFiles) -> dict:
        paths = dataclasses.asdict(files) | {"release": ""}
        return {k: v.name if isinstance(v, Path) else v for k, v in paths.items()}

    assert skipped == []
    by_name = {files.name: facts(files) for files in found}
    assert by_name == {files.name: facts(files) for files in listed}
