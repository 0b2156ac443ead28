"""The training path: labels, views, losses, and a short run."""

from __future__ import annotations

import json
from dataclasses import replace

import cv2
import numpy as np
import pytest
import skimage.data
import torch

from kp_frontend.network import load_network
from kp_training.data import PairDataset, ViewConfig
from kp_training.labels import label_folder, load_labels
from kp_training.losses import descriptor_loss, detector_loss, keypoint_target
from kp_training.relabel import relabel_folder
from kp_training.train import load_config, train
from kp_training.views import displacement, sample, warp_image, warp_points


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for name in ("camera", "brick", "coins", "grass"):
        image = getattr(skimage.data, name)()
        cv2.imwrite(str(folder / f"{name}.png"), cv2.resize(image, (400, 300)))
    return folder


def test_labels_are_stored_and_unreadable_images_listed(images, tmp_path):
    (images / "broken.png").write_bytes(b"no image")
    labels, unreadable = label_folder(images, tmp_path / "labels.npz", views=2)
    (images / "broken.png").unlink()
    assert [p.name for p in unreadable] == ["broken.png"]
    again = load_labels(images, tmp_path / "labels.npz")
    assert list(again.paths) == ["brick.png", "camera.png", "coins.png", "grass.png"]
    rows = again.of_image(1)
    np.testing.assert_array_equal(rows, labels.of_image(1))
    assert len(rows) > 100
    assert (rows[:, :2] >= 0).all() and (rows[:, :2] < [400, 300]).all()
    assert ((again.repeat > 0) & (again.repeat < 1)).all()
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no images"):
        label_folder(tmp_path / "empty", tmp_path / "x.npz")


def test_warped_points_show_what_the_warped_image_shows(images, tmp_path):
    labels, _ = label_folder(images, tmp_path / "labels.npz", views=1)
    data = PairDataset(labels, np.arange(4), 12, 5, ViewConfig())
    again = PairDataset(labels, np.arange(4), 12, 5, ViewConfig())
    shown = 0
    for i in range(12):
        item = {k: torch.as_tensor(v)[None] for k, v in data[i].items()}
        assert all(np.array_equal(v, again[i][k], equal_nan=v.dtype.kind == "f")
                   for k, v in data[i].items())  # fmt: skip
        canvas = cv2.GaussianBlur(item["canvas"][0, 0].numpy().astype(np.float32), None, 3)
        canvas = torch.from_numpy(canvas)[None, None]
        points = item["keypoints"][..., :2]
        for view in range(2):
            shift = displacement(item["relief"][:, view], item["blocky"], 240, 320)
            image = warp_image(canvas, item["to_view"][:, view], shift)
            place, visible = warp_points(points, item["to_view"][:, view], shift)
            there = sample(canvas, points.nan_to_num(0))[0, 0][visible[0]]
            here = sample(image, place)[0, 0][visible[0]]
            shown += len(here)
            assert (there - here).abs().quantile(0.9) < 3.0  # grey levels
    assert shown > 1000


def test_target_is_a_splat_whose_centroid_is_the_keypoint():
    points = torch.tensor([[[20.25, 11.5], [7.5, 3.0], [40.0, 5.0]]])
    weight = torch.tensor([[1.0, 1.0, 0.0]])
    target = keypoint_target(points, weight, 16, 48)
    torch.testing.assert_close(target.sum(1), torch.ones(1, 2, 6))
    heat = torch.nn.functional.pixel_shuffle(target[:, :64], 8)[0, 0]
    # The second keypoint is shared by two cells; the third counts for nothing.
    assert heat[3, 7] == heat[3, 8] == 0.5
    assert heat[:, 30:].sum() == 0
    window = heat[10:14, 18:23]
    y, x = torch.meshgrid(torch.arange(10, 14), torch.arange(18, 23), indexing="ij")
    assert (window * x).sum() == pytest.approx(20.25)
    assert (window * y).sum() == pytest.approx(11.5)
    perfect = target.clamp(min=1e-9).log()
    assert detector_loss(perfect, target) < detector_loss(torch.zeros_like(target), target)


def test_descriptor_loss_knows_right_from_wrong():
    torch.manual_seed(0)
    left = torch.nn.functional.normalize(torch.randn(2, 50, 16), dim=-1)
    points = torch.rand(2, 50, 2) * 1000
    valid = torch.ones(2, 50, dtype=torch.bool)
    good, share = descriptor_loss(left, left, points, valid, 0.07)
    bad, none = descriptor_loss(left, left.flip(1), points, valid, 0.07)
    assert good < 0.1 and share == 1
    assert bad > 3 and none < 0.1
    # Rows that do not count have no say.
    half = valid.clone()
    half[:, 25:] = False
    spoiled = torch.cat([left[:, :25], left[:, 25:].flip(1)], 1)
    assert descriptor_loss(left, spoiled, points, half, 0.07)[1] == 1


def test_a_short_run_learns_and_goes_on_where_it_stopped(images, tmp_path):
    config = load_config("release")
    config = replace(config, steps=12, batch=2, validate_every=6, warmup=2, ema=0.5,
                     correspondences=100)  # fmt: skip
    best = train(config, images, tmp_path / "whole", "cpu", workers=0)
    network = load_network(best)
    rows = [json.loads(line) for line in (tmp_path / "whole/log.jsonl").read_text().splitlines()]
    losses = [row["validation_loss"] for row in rows if "validation_loss" in row]
    assert len(losses) == 2 and losses[1] < losses[0]

    class Stopped(Exception):
        pass

    import kp_training.train as module

    save = module.save_checkpoint

    def save_then_stop(*arguments):
        save(*arguments)
        raise Stopped

    module.save_checkpoint = save_then_stop
    try:
        with pytest.raises(Stopped):
            train(config, images, tmp_path / "halves", "cpu", workers=0)
    finally:
        module.save_checkpoint = save
    resumed = load_network(train(config, images, tmp_path / "halves", "cpu", workers=0))
    for (name, a), b in zip(
        network.state_dict().items(), resumed.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=name)
    with pytest.raises(ValueError, match="another recipe"):
        train(replace(config, steps=13), images, tmp_path / "halves", "cpu", workers=0)


def test_a_recipe_with_a_slip_is_refused(tmp_path):
    (tmp_path / "slip.yaml").write_text("stepz: 3\n")
    with pytest.raises(ValueError, match="stepz"):
        load_config(str(tmp_path / "slip.yaml"))
    with pytest.raises(ValueError, match="no recipe"):
        load_config("nothing")


def test_second_round_labels_are_what_the_network_finds_again(images, tmp_path):
    labels, unreadable = relabel_folder(images, tmp_path / "labels.npz", "tiny", views=4, most=500)
    assert not unreadable and len(labels) == 4
    rows = load_labels(images, tmp_path / "labels.npz").of_image(1)  # camera
    assert len(rows) > 100
    assert (rows[:, :2] >= 0).all() and (rows[:, :2] < [400, 300]).all()
    assert ((rows[:, 2] >= 0) & (rows[:, 2] <= 1)).all()
    strong, weak = rows[:50, 2].mean(), rows[-50:, 2].mean()  # strongest first
    assert strong > 0.6 and strong > weak
    config = load_config("release_second")
    config = replace(config, steps=2, batch=2, validate_every=2, warmup=1, correspondences=100)
    file = tmp_path / "labels.npz"
    best = train(config, images, tmp_path / "run", "cpu", 0, labels_file=file, start="tiny")
    before, after = load_network("tiny").state_dict(), load_network(best).state_dict()
    moved = [(before[k] - after[k]).abs().max().item() for k in before if before[k].ndim == 4]
    assert 0 < max(moved) < 0.1  # it went on from the weights it was given
