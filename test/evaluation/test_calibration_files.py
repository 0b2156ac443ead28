"""Folders of images and calibration files as people have them."""

from __future__ import annotations

import os
from pathlib import Path

import cv2
import made_world
import numpy as np
import pytest
import yaml
from made_world import BASELINE, FOCAL, HEIGHT, WIDTH

from kp_frontend.cli import main
from kp_training.evaluation.sequences import open_sequence
from kp_training.image_files import IMAGE_SUFFIXES, files_below
from kp_training.labels import find_images


def save_pairs(left: Path, right: Path, suffix: str = ".png") -> None:
    for i, frame in enumerate(made_world.wall(2)):
        for folder, image in ((left, frame.left), (right, frame.right)):
            folder.mkdir(parents=True, exist_ok=True)
            if suffix in (".avif", ".gif", ".ppm"):  # OpenCV writes these in colour only
                image = cv2.cvtColor(image, cv2.COLOR_GRAY2BGR)
            assert cv2.imwrite(str(folder / f"{i}{suffix}"), image)


def calibration(side: str, **changes) -> str:
    """A file of camera_calibration; an entry that is None is left out."""
    matrices = {
        "camera_matrix": np.array([[FOCAL, 0, 96], [0, FOCAL, 72], [0, 0, 1]]),
        "distortion_coefficients": np.zeros((1, 5)),
        "rectification_matrix": np.eye(3),
        "projection_matrix": np.array(
            [[FOCAL, 0, 96, -FOCAL * BASELINE * (side == "right")], [0, FOCAL, 72, 0], [0, 0, 1, 0]]
        ),
    }
    text = {"image_width": WIDTH, "image_height": HEIGHT, "distortion_model": "plumb_bob"}
    for name, matrix in matrices.items():
        rows, columns = matrix.shape
        text[name] = {"rows": rows, "cols": columns, "data": matrix.ravel().tolist()}
    text |= changes
    return yaml.safe_dump({name: value for name, value in text.items() if value is not None})


@pytest.fixture
def rig(tmp_path) -> Path:
    save_pairs(tmp_path / "left", tmp_path / "right")
    return tmp_path


@pytest.mark.parametrize("suffix", [".yaml", ".yml"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"distortion_model": None},
        {"distortion_model": "radtan"},
        {"distortion_coefficients": {"rows": 1, "cols": 8, "data": [0.0] * 8}},
        {"distortion_coefficients": []},
    ],
)
def test_calibrations_as_they_are_written_are_read(rig, suffix, changes):
    for side in ("left", "right"):
        text = calibration(side, **changes)
        (rig / f"{side}{suffix}").write_text(text if changes else f"%YAML:1.0\n---\n{text}")
    frame = next(open_sequence("folder", rig).frames)
    assert vars(frame.calibration()) == pytest.approx(vars(made_world.wall(1)[0].calibration()))


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_calibration_of_one_side_names_the_missing_one(rig, capsys, side):
    other = {"left": "right", "right": "left"}[side]
    (rig / f"{side}.yaml").write_text(calibration(side))
    assert main(["bag", "make", "folder", str(rig), str(rig / "out.mcap")]) == 1
    words = capsys.readouterr().err
    assert f"calibration of the {side} camera, but {other}.yaml is missing" in words


def test_no_calibration_at_all_is_told(rig, capsys):
    assert main(["bag", "make", "folder", str(rig), str(rig / "out.mcap")]) == 0
    assert "left.yaml and right.yaml are missing" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"image_width": None}, "image_width is missing"),
        ({"image_width": "wide"}, "image_width is not a number of pixels"),
        ({"camera_matrix": {"data": [1.0] * 8}}, "camera_matrix has 8 numbers instead of 9"),
        ({"camera_matrix": None}, "camera_matrix is missing"),
        ({"projection_matrix": {"data": [float("nan")] * 12}}, "non-finite"),
        ({"projection_matrix": {"rows": 3}}, "projection_matrix has no numbers"),
        ({"distortion_model": "odd"}, "distortion model 'odd' is not known"),
        ({"distortion_coefficients": {"data": [0.1] * 15}}, "at most 14 coefficients"),
        ({"distortion_coefficients": {"data": {"a": 1}}}, "has no numbers"),
        ({"image_width": WIDTH + 2}, f"for {WIDTH + 2}x{HEIGHT}, the image has {WIDTH}x{HEIGHT}"),
    ],
)
def test_a_broken_calibration_ends_in_one_line(rig, capsys, changes, words):
    for side in ("left", "right"):
        (rig / f"{side}.yaml").write_text(calibration(side, **changes))
    assert main(["bag", "make", "folder", str(rig), str(rig / "out.mcap")]) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert words in line and "Camera(" not in line


@pytest.mark.parametrize("text", ["", "[1, 2]", "a: [", "left: \0", "&a [*a]", "!!python/none x"])
def test_a_file_that_is_no_calibration_ends_in_one_line(rig, capsys, text):
    for side in ("left", "right"):
        (rig / f"{side}.yaml").write_text(text)
    assert main(["bag", "make", "folder", str(rig), str(rig / "out.mcap")]) == 1
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def euroc(root: Path, suffix: str = ".yaml", **changes) -> Path:
    stamps = [10**18, 10**18 + 10**8]
    for side, x in (("cam0", 0.0), ("cam1", BASELINE)):
        at = np.eye(4)
        at[0, 3] = x
        text = {
            "T_BS": {"rows": 4, "cols": 4, "data": at.ravel().tolist()},
            "resolution": [WIDTH, HEIGHT],
            "intrinsics": [FOCAL, FOCAL, 96, 72],
            "distortion_model": "radial-tangential",
            "distortion_coefficients": [0.0] * 4,
        } | changes
        folder = root / "mav0" / side
        (folder / "data").mkdir(parents=True, exist_ok=True)
        (folder / f"sensor{suffix}").write_text("%YAML:1.0\n" + yaml.safe_dump(text))
        for stamp, frame in zip(stamps, made_world.wall(2), strict=True):
            image = frame.left if side == "cam0" else frame.right
            assert cv2.imwrite(str(folder / "data" / f"{stamp}.png"), image)
        rows = [f"{stamp},{stamp}.png" for stamp in stamps]
        (folder / "data.csv").write_text("\n".join(["#stamp,file", *rows]))
    return root


@pytest.mark.parametrize(
    "changes",
    [
        {"distortion_coefficients": [0.0] * 5},
        {"distortion_coefficients": [0.01, 0.0, 0.0, 0.0, 0.001]},
        {"distortion_model": None},
        {
            "distortion_model": "equidistant",
            "distortion_coefficients": [0.01, 0.002, 0.0, 0.0, 0.0],
        },
    ],
)
def test_eurocs_layout_is_read_with_every_lens(tmp_path, changes):
    sequence = open_sequence("euroc", euroc(tmp_path, ".yml", **changes))
    frame = next(sequence.frames)
    assert frame.calibration().baseline == pytest.approx(BASELINE, abs=1e-3)
    assert frame.rectified().left.shape == (HEIGHT, WIDTH)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"T_BS": {"data": [0.0] * 16}}, "T_BS is not a pose"),
        ({"resolution": [0, 0]}, "must be positive"),
        ({"intrinsics": [1.0]}, "intrinsics has 1 numbers instead of 4"),
        ({"distortion_model": "fov"}, "'fov' is not known"),
        ({"T_BS": {"data": np.eye(4).ravel().tolist()}}, ""),  # both cameras at one place
    ],
)
def test_a_broken_sensor_ends_in_one_line(tmp_path, capsys, changes, words):
    euroc(tmp_path, **changes)
    assert main(["bag", "make", "euroc", str(tmp_path), str(tmp_path / "out.mcap")]) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert words in line


def test_poses_of_euroc_are_interpolated(tmp_path):
    euroc(tmp_path)
    truth = tmp_path / "mav0/state_groundtruth_estimate0"
    truth.mkdir()
    rows = [f"{10**18 - 4 * 10**7 + i * 8 * 10**7},{0.8 * i - 0.4},0,0,1,0,0,0" for i in range(3)]
    (truth / "data.csv").write_text("#t,x,y,z,w,x,y,z\n" + "\n".join(rows))
    found = [frame.pose for frame in open_sequence("euroc", tmp_path).frames]
    assert [pose[0, 3] for pose in found] == pytest.approx([0.0, 1.0])
    (truth / "data.csv").write_text("\n".join(rows[:1]) + ",nonsense\nx")
    with pytest.raises(ValueError, match="cannot be read as a table"):
        open_sequence("euroc", tmp_path)


@pytest.mark.parametrize("suffix", sorted(IMAGE_SUFFIXES))
def test_images_of_every_suffix_that_opencv_reads_are_taken(tmp_path, suffix):
    save_pairs(tmp_path / "left", tmp_path / "right", suffix)
    sequence = open_sequence("folder", tmp_path)
    assert len(list(sequence.frames)) == 2
    assert len(find_images(tmp_path)) == 4


def test_links_are_followed_once_and_other_images_are_counted(tmp_path, capsys):
    save_pairs(tmp_path / "in" / "a", tmp_path / "elsewhere")
    os.symlink("../elsewhere", tmp_path / "in" / "linked")
    os.symlink("..", tmp_path / "in" / "a" / "back")
    os.symlink("../elsewhere/0.png", tmp_path / "in" / "one.png")
    os.symlink("nowhere", tmp_path / "in" / "dangling.png")
    assert len(find_images(tmp_path / "in")) == 5
    assert len(files_below(tmp_path / "in")) == 5
    for name in ("x.heic", "y.HEIC", "z.jxl", "notes.txt"):
        (tmp_path / "in" / name).write_bytes(b"?")
    labels = tmp_path / "labels.npz"
    assert main(["label", str(tmp_path / "in"), "--out", str(labels), "--views", "1"]) == 0
    words = capsys.readouterr().out
    assert "skipped: 2 .heic files: OpenCV cannot read this format" in words
    assert "1 .jxl" in words and ".txt" not in words


def test_an_image_that_claims_to_be_too_large_is_left_out(tmp_path):
    save_pairs(tmp_path / "left", tmp_path / "right", ".gif")
    data = bytearray((tmp_path / "left" / "0.gif").read_bytes())
    data[6:10] = b"\xff\xff\xff\xff"  # width and height
    (tmp_path / "left" / "0.gif").write_bytes(data)
    sequence = open_sequence("folder", tmp_path)
    assert len(list(sequence.frames)) == 1 and "cannot be read" in sequence.left_out[-1]
