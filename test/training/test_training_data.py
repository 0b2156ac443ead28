"""Training data: labels and their cache, data set layouts, splits, images of bags."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from rosbags.rosbag2 import StoragePlugin, Writer
from rosbags.typesys import Stores, get_typestore

import kp_training.labels as module
from kp_frontend.cli import main
from kp_frontend.network import load_network
from kp_training.classics import classic_keypoints
from kp_training.config import load_recipe
from kp_training.data import PairDataset, micro_batches
from kp_training.labels import Labels, find_images, label_folder, label_in_parts, load_labels
from kp_training.objective import losses
from kp_training.recordings import extract_images
from kp_training.splits import scene_of, split_images
from kp_training.views import make_views, sample


def test_labels_are_stored_and_unreadable_images_listed(training_images, tmp_path):
    images = tmp_path / "images"
    shutil.copytree(training_images, images)
    (images / "broken.png").write_bytes(b"no image")
    labels, unreadable = label_folder(images, tmp_path / "labels.npz", views=2)
    assert [p.name for p in unreadable] == ["broken.png"]
    again = load_labels(images, tmp_path / "labels.npz")
    assert list(again.paths) == ["brick.png", "camera.png", "coins.png", "grass.png"]
    rows = again.of_image(1)
    np.testing.assert_array_equal(rows, labels.of_image(1))
    assert len(rows) > 100
    assert (rows[:, :2] >= 0).all() and (rows[:, :2] < [400, 300]).all()
    assert (np.diff(rows[:, 3]) <= 0).all()  # strongest first
    assert ((again.repeat > 0) & (again.repeat < 1)).all()
    assert json.loads(again.settings) == {"detector": "sift", "most": 2000, "views": 2}
    assert not list(tmp_path.glob("*.part*"))
    shutil.copy(images / "brick.png", images / "coins.png")  # another image of that name
    with pytest.raises(ValueError, match=r"1 of its 4 images differ from those below .* coins.png"):
        load_labels(images, tmp_path / "labels.npz")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no images"):
        label_folder(tmp_path / "empty", tmp_path / "x.npz")


def test_interrupted_labelling_resumes(training_images, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "PART", 1)
    asked = []

    def rows_of(paths):
        for path in paths:
            if len(asked) == 2:
                raise KeyboardInterrupt
            asked.append(path.name)
            yield np.full((2, 5), len(path.name), np.float32)

    with pytest.raises(KeyboardInterrupt):
        label_in_parts(training_images, tmp_path / "labels.npz", rows_of, {"detector": "x"})
    assert not (tmp_path / "labels.npz").exists()
    asked.append("a stop")
    labels, _ = label_in_parts(training_images, tmp_path / "labels.npz", rows_of, {"detector": "x"})
    assert asked == ["brick.png", "camera.png", "a stop", "coins.png", "grass.png"]
    assert [labels.of_image(i)[0, 0] for i in range(4)] == [9, 10, 9, 9]
    # Intermediate results with other settings are not reused.
    asked[:] = ["brick.png"]
    with pytest.raises(KeyboardInterrupt):
        label_in_parts(training_images, tmp_path / "y.npz", rows_of, {"detector": "x"})
    asked[:] = []
    with pytest.raises(KeyboardInterrupt):
        label_in_parts(training_images, tmp_path / "y.npz", rows_of, {"detector": "y"})
    assert asked == ["brick.png", "camera.png"]
    # Nor are those of other images.
    shutil.copytree(training_images, tmp_path / "others")
    shutil.copy(training_images / "coins.png", tmp_path / "others/brick.png")
    asked[:] = []
    with pytest.raises(KeyboardInterrupt):
        label_in_parts(tmp_path / "others", tmp_path / "y.npz", rows_of, {"detector": "x"})
    assert asked == ["brick.png", "camera.png"]


def test_images_that_the_detector_rejects_are_skipped(training_images, tmp_path):
    shutil.copy(training_images / "coins.png", tmp_path)
    cv2.imwrite(str(tmp_path / "tiny.png"), np.zeros((1, 1), np.uint8))
    labels, left_out = label_folder(tmp_path, tmp_path / "labels.npz", views=2, detector="orb")
    assert list(labels.paths) == ["coins.png"] and [p.name for p in left_out] == ["tiny.png"]


def test_detectors_can_be_combined(training_images):
    image = cv2.imread(str(training_images / "camera.png"), cv2.IMREAD_GRAYSCALE)
    sift, orb = (classic_keypoints(image, 400, name) for name in ("sift", "orb"))
    both = classic_keypoints(image, 800, "sift+orb")
    assert len(sift) < len(both) <= len(sift) + len(orb)
    assert both[0, 2] == 1 and (np.diff(both[:, 2]) <= 0).all()
    of_sift = {tuple(xy) for xy in sift[:, :2]}
    others = np.array([xy for xy in both[:, :2] if tuple(xy) not in of_sift])
    assert len(others) > 20
    apart = np.linalg.norm(others[:, None] - sift[None, :, :2], axis=2).min(1)
    assert apart.min() > 3
    assert len(classic_keypoints(np.zeros((50, 60), np.uint8), 100, "sift+orb+fast")) == 0
    with pytest.raises(ValueError, match="unknown detector 'surf'"):
        label_folder(training_images, training_images / "x.npz", detector="sift+surf")


RGBD = [
    "rgbd-dataset/apple/apple_1/apple_1_1_1_crop.png",
    "rgbd-dataset/apple/apple_1/apple_1_1_6_crop.png",
    "rgbd-dataset/apple/apple_2/apple_2_1_1_crop.png",
    "rgbd-dataset/cap/cap_1/cap_1_2_11.png",
    "rgbd-scenes/desk/desk_1/desk_1_7.png",
]


def test_rgbd_object_dataset_uses_colour_images_and_splits_by_instance(tmp_path):
    others = ["apple_1_1_1_depthcrop.png", "apple_1_1_1_maskcrop.png", "apple_1_1_1_loc.txt"]
    beside = [f"rgbd-dataset/apple/apple_1/{name}" for name in others]
    beside += ["rgbd-dataset/cap/cap_1/cap_1_2_11_depth.png"]
    for name in RGBD + beside:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    assert [str(p.relative_to(tmp_path)) for p in find_images(tmp_path)] == sorted(RGBD)
    (tmp_path / "ski_mask.png").write_bytes(b"")  # no matching colour image: an ordinary image
    assert tmp_path / "ski_mask.png" in find_images(tmp_path)
    scenes = [scene_of(name) for name in RGBD]
    assert scenes[0] == scenes[1] == "rgbd-dataset/apple/apple_1" and len(set(scenes)) == 4


@pytest.fixture(scope="module")
def stereo_set(tmp_path_factory):
    """Two pairs of a textured plane in front of another, one with disparity, and their labels."""
    folder = tmp_path_factory.mktemp("stereo")
    rng = np.random.default_rng(0)
    entries = []
    for scene in ("room", "yard"):
        back, front = (
            cv2.GaussianBlur(cv2.resize(np.uint8(rng.random((90, 120)) * 255), (480, 360)), None, 2)
            for _ in range(2)
        )
        disparity = np.full((360, 480), 12, np.uint8)
        disparity[100:250, 180:330] = 40
        views = []
        for side in (0, 1):
            view = np.roll(back, -12 * side, 1)
            shift = 40 * side
            view[100:250, 180 - shift : 330 - shift] = front[100:250, 180:330]
            views.append(view)
        (folder / scene).mkdir()
        cv2.imwrite(str(folder / scene / "left.png"), views[0])
        cv2.imwrite(str(folder / scene / "right.png"), views[1])
        disparity[:5] = 0  # unknown
        cv2.imwrite(str(folder / scene / "disparity.png"), disparity * 4)
        entries.append({"dir": scene, "left": "left.png", "right": "right.png", "scale": 4})
    entries[0]["gt"] = "disparity.png"
    (folder / "scenes.json").write_text(json.dumps(entries))
    labels, unreadable = label_folder(folder, folder / "labels.npz", views=1)
    assert not unreadable
    return labels


def test_real_stereo_pairs_become_corresponding_views(stereo_set, tmp_path):
    names = ["room/left.png", "room/right.png", "yard/left.png", "yard/right.png"]
    assert list(stereo_set.paths) == names  # disparity maps are not listed as images
    train, held_out = split_images(stereo_set, 0, tmp_path / "split.json")
    assert sorted((*train, *held_out)) == [0, 1, 2, 3] and abs(int(train[0]) - int(train[1])) == 1
    config = replace(load_recipe("tiny")[0], correspondences=300)
    config = replace(config, views=replace(config.views, real_share=1.0, zoom=(0.8, 1.2),
                                           photometric="jitter"))  # fmt: skip
    data = PairDataset(stereo_set, np.arange(4), 16, 0, config.views)
    batch = {k: torch.from_numpy(v) for k, v in data_of(data).items()}
    assert int(batch["real"].sum()) == 4  # the pair with disparity, once per epoch
    batch["noise"] = torch.full_like(batch["noise"], 0.5)
    torch.manual_seed(0)
    views = make_views(batch, config)
    real = batch["real"]
    left, right = (sample(views["images"][v][real], views["points"][v][real])[:, 0] for v in (0, 1))
    valid = views["seen"].all(0)[real]
    assert valid.sum() > 400
    apart = (left - right).abs()[valid]
    assert apart.median() < 4 and apart.quantile(0.9) < 20  # grey levels
    moved = (views["points"][0] - views["points"][1])[real]
    assert (moved[..., 1][valid].abs() < 0.01).all()
    # Both surfaces are visible, at their disparities in pixels of the view.
    scale = batch["to_view"][real][:, 0, 0, 0]
    disparity = (moved[..., 0] / scale[:, None])[valid]
    assert ((disparity - 12).abs() < 1).sum() > 100 and ((disparity - 40).abs() < 1).sum() > 20
    assert ((disparity - 12).abs().minimum((disparity - 40).abs()) < 1).float().mean() > 0.95
    # Each view has its own labels.
    assert views["sure"][1][real].sum() > 100
    torch.manual_seed(0)
    total, parts = losses(load_network("tiny"), batch, config)
    assert torch.isfinite(total) and parts["matched"] > 0.3 and "position" not in parts
    torch.manual_seed(0)
    more, parts = losses(load_network("tiny"), batch, replace(config, position_weight=2.0))
    assert 0.01 < parts["position"] < 0.5  # pixels
    torch.testing.assert_close(more - total, 2 * parts["position"])


def data_of(data):
    """All samples of a data set as one batch."""
    items = [data[i] for i in range(len(data))]
    return {name: np.stack([item[name] for item in items]) for name in items[0]}


class Named:
    """Labels with names only, for the split."""

    def __init__(self, paths):
        self.folder, self.paths = Path("nowhere"), np.array(paths)


def test_splits_keep_scenes_whole_and_are_stable(tmp_path):
    names = [f"frame_{i:06}.png" for i in range(2000)] + [f"{i}.jpg" for i in range(300)]
    train, held_out = split_images(Named(names), 0, tmp_path / "split.json")
    sides = [{scene_of(names[i]) for i in side} for side in (train, held_out)]
    assert not sides[0] & sides[1] and len(train) + len(held_out) == 2300
    assert 0.02 < len(held_out) / 2300 < 0.12
    assert len({scene_of(names[i]) for i in range(2000)}) == 40
    # The held-out images do not change when images are added. An existing file is used.
    more, others = [*names, "new.png"], split_images(Named(names), 1, tmp_path / "other.json")
    _, again = split_images(Named(more), 0, tmp_path / "more.json")
    assert {names[i] for i in held_out} == {more[i] for i in again} - {"new.png"}
    assert list(others[1]) != list(held_out)
    fixed = split_images(Named(names), 5, tmp_path / "split.json")
    np.testing.assert_array_equal(fixed[1], held_out)
    with pytest.raises(ValueError, match="does not split"):
        split_images(Named(names[1:]), 0, tmp_path / "split.json")
    # With a single scene, its end is held out.
    train, held_out = split_images(Named(names[:20]), 0, tmp_path / "one.json")
    assert list(held_out) == [18, 19] and list(train) == list(range(18))
    with pytest.raises(ValueError, match="none can be held out"):
        split_images(Named(names[:1]), 0, tmp_path / "single.json")


def test_processes_share_a_step_and_a_resumed_run_skips_finished_steps():
    config = load_recipe("paper")[0]
    whole = [list(places) for places in micro_batches(config, 0, 3)]
    assert [i for m in whole for i in m] == list(range(3 * 256)) and {len(m) for m in whole} == {16}
    shares = [list(micro_batches(config, 1, 3, rank, 2)) for rank in range(2)]
    dealt = [list(m) for pair in zip(*shares, strict=True) for m in pair]
    assert dealt == whole[16:]


def write_bag(path, topics, count=12):
    """A bag with noise images on some topics: mono8, and rgb8 on /colour."""
    store = get_typestore(Stores.ROS2_JAZZY)
    Image, Header, Time = (store.types[name] for name in (
        "sensor_msgs/msg/Image", "std_msgs/msg/Header", "builtin_interfaces/msg/Time"))  # fmt: skip
    rng = np.random.default_rng(0)
    with Writer(path, version=9, storage_plugin=StoragePlugin.MCAP) as writer:
        for topic in topics:
            connection = writer.add_connection(topic, Image.__msgtype__, typestore=store)
            channels = 3 if topic == "/colour" else 1
            for i in range(count):
                small = rng.integers(0, 255, (30, 40, channels), np.uint8)
                pixels = cv2.resize(small, (160, 120)).reshape(120, 160, channels)
                image = Image(
                    header=Header(stamp=Time(sec=i, nanosec=0), frame_id="camera"),
                    height=120, width=160, encoding="rgb8" if channels == 3 else "mono8",
                    is_bigendian=0, step=160 * channels, data=pixels.reshape(-1),
                )  # fmt: skip
                raw = store.serialize_cdr(image, Image.__msgtype__)
                writer.write(connection, i * 10**9, raw)
    return pixels


def test_images_of_a_bag_are_extracted_once(tmp_path):
    last = write_bag(tmp_path / "bag", ["/left", "/colour"])
    with pytest.raises(ValueError, match=r"needs --topic; image topics: /colour, /left"):
        extract_images(tmp_path / "bag", None, tmp_path / "images", 1)
    with pytest.raises(ValueError, match="no images on '/right'"):
        extract_images(tmp_path / "bag", "/right", tmp_path / "images", 1)
    folder = extract_images(tmp_path / "bag", "/colour", tmp_path / "images", 4)
    images = find_images(folder)
    assert [p.name for p in images] == [f"frame_{i:06}.png" for i in range(3)]
    whole = find_images(extract_images(tmp_path / "bag", "/colour", tmp_path / "all", 1))
    grey = cv2.imread(str(whole[-1]), cv2.IMREAD_GRAYSCALE)
    np.testing.assert_array_equal(grey, cv2.cvtColor(last, cv2.COLOR_RGB2GRAY))
    before = images[0].stat().st_mtime_ns
    assert extract_images(tmp_path / "bag", None, tmp_path / "images", 4) == folder
    assert images[0].stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="another folder"):
        extract_images(tmp_path / "bag", "/left", tmp_path / "images", 4)
    # A single file, and a folder of an interrupted call.
    (file,) = (tmp_path / "bag").glob("*.mcap")
    shutil.copy(file, tmp_path / "my.mcap")
    (tmp_path / "again").mkdir()
    (tmp_path / "again/frame_000077.png").write_bytes(b"stale")
    alone = find_images(extract_images(tmp_path / "my.mcap", "/colour", tmp_path / "again", 4))
    assert [p.read_bytes() for p in alone] == [p.read_bytes() for p in images]
    for name in ("no.mcap", "no.bag"):
        (tmp_path / name).write_bytes(b"no bag \x89\xff")
    for bag in ("no.mcap", "no.bag", "missing"):
        with pytest.raises(ValueError, match="bag"):
            extract_images(tmp_path / bag, None, tmp_path / "x", 1)


def test_released_weights_are_fine_tuned_on_a_bag(tmp_path, capsys):
    write_bag(tmp_path / "bag", ["/left"])
    (tmp_path / "short.yaml").write_text(
        "steps: 2\nbatch: 2\nvalidate_every: 2\nwarmup: 1\ncorrespondences: 50\n"
        "views: {height: 96, width: 128}\n"
    )
    words = ["train", "--config", str(tmp_path / "short.yaml"), "--from", "tiny",
             "--bag", str(tmp_path / "bag"), "--every", "2", "--out", str(tmp_path / "run"),
             "--workers", "0"]  # fmt: skip
    assert main(words) == 0
    run = json.loads((tmp_path / "run/run.json").read_text())
    assert run["data"]["images"] == 6 and run["start"].startswith("tiny (sha256")
    assert main(["train", "--out", str(tmp_path / "run3")]) == 1
    assert "--bag" in capsys.readouterr().err


def test_an_image_that_vanishes_during_training_is_skipped(tmp_path, capsys):
    rng = np.random.default_rng(0)
    for name in ("a.png", "b.png", "c.png"):
        cv2.imwrite(str(tmp_path / name), rng.integers(0, 255, (80, 80), np.uint8))
    count = np.zeros(0, np.float32)
    labels = Labels(
        tmp_path, np.array(["a.png", "b.png", "c.png"]), np.zeros(3, np.uint32),
        np.zeros(4, np.int64), np.zeros((0, 2), np.float32), count, count, count,
    )  # fmt: skip
    config = load_recipe("paper")[0].views
    data = PairDataset(labels, np.arange(3), 6, 0, config)
    before = [data[i] for i in range(6)]
    (tmp_path / "b.png").unlink()
    after = [data[i] for i in range(6)]
    assert "b.png can no longer be read (1 so far)" in capsys.readouterr().err
    same = [np.array_equal(x["canvas"], y["canvas"]) for x, y in zip(before, after, strict=True)]
    assert same.count(False) == 2  # its own samples, one in each epoch
    for name in ("a.png", "c.png"):
        (tmp_path / name).write_bytes(b"?")
    with pytest.raises(ValueError, match="no training image can be read any more"):
        data[0]
