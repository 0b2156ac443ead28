"""Parts of training: views, losses, recipes, second-round labels."""

from __future__ import annotations

from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
from torch.utils.data import default_collate

from kp_frontend.cli import main
from kp_frontend.network import load_network
from kp_training.config import ViewConfig, load_recipe
from kp_training.data import PairDataset
from kp_training.labels import load_labels
from kp_training.losses import (
    descriptor_loss,
    detector_loss,
    gaussian_heatmap,
    keypoint_target,
    position_loss,
    triplet_loss,
)
from kp_training.relabel import adapted_keypoints, relabel_folder
from kp_training.train import train
from kp_training.views import (
    Layer,
    across_views,
    displacement,
    make_views,
    put_in_front,
    sample,
    warp_image,
    warp_points,
)


def test_warped_points_match_the_warped_image(training_images, training_labels):
    labels = load_labels(training_images, training_labels)
    data = PairDataset(labels, np.arange(4), 12, 5, ViewConfig())
    again = PairDataset(labels, np.arange(4), 12, 5, ViewConfig())
    shown = 0
    for i in range(12):
        item = {k: torch.as_tensor(v)[None] for k, v in data[i].items()}
        assert all(np.array_equal(v, again[i][k], equal_nan=v.dtype.kind == "f")
                   for k, v in data[i].items())  # fmt: skip
        canvas = cv2.GaussianBlur(item["canvas"][0, 0].numpy().astype(np.float32), None, 3)
        canvas = torch.from_numpy(canvas)[None, None]
        points, views = item["keypoints"][:, 0, :, :2], []
        for view in range(2):
            shift = displacement(item["relief"][:, view], item["blocky"], 240, 320)
            image = warp_image(canvas, item["to_view"][:, view], shift)
            place, visible = warp_points(points, item["to_view"][:, view], shift)
            there = sample(canvas, points.nan_to_num(0))[0, 0][visible[0]]
            here = sample(image, place)[0, 0][visible[0]]
            shown += len(here)
            assert (there - here).abs().quantile(0.9) < 3.0  # grey levels
            views.append((place, visible, shift))
        # Both ways from the first view to the second give the same point.
        places, seen, shifts = zip(*views, strict=True)
        shift = torch.stack(shifts)
        maps = {"shift": shift, "known": torch.ones_like(shift)}
        far, seen_far = across_views(places[0], 0, item, maps)
        both = (seen[0] & seen[1] & seen_far)[0]
        assert ((far - places[1])[0][both].norm(dim=-1) < 0.5).float().mean() > 0.95
    assert shown > 1000


def test_front_layers_occlude_the_image_behind(training_images, training_labels):
    labels = load_labels(training_images, training_labels)
    config = replace(load_recipe("tiny")[0], correspondences=600)
    views = {}
    for stereo_share, front_share in ((1.0, 1.0), (0.0, 1.0), (0.0, 0.0)):
        drawn = ViewConfig(
            stereo_share=stereo_share, front_share=front_share, photometric="jitter",
            zoom=(0.9, 1.1), most_keypoints=1000,
        )  # fmt: skip
        data = PairDataset(labels, np.arange(4), 8, 3, drawn)
        batch = default_collate([data[i] for i in range(8)])
        batch["noise"] = torch.full_like(batch["noise"], 0.5)  # no photometric change
        torch.manual_seed(0)
        made = make_views(batch, replace(config, views=drawn))
        views[stereo_share, front_share] = batch, made
    # Homographies have no depth, so there is no front layer.
    torch.testing.assert_close(views[0.0, 1.0][1]["images"], views[0.0, 0.0][1]["images"])
    torch.testing.assert_close(views[0.0, 1.0][1]["sure"][..., :1000], views[0.0, 0.0][1]["sure"])
    assert not views[0.0, 1.0][1]["sure"][..., 1000:].any()
    # Points of both layers look the same in both views; the front layer is the nearest.
    batch, made = views[1.0, 1.0]
    moved = (made["points"][0] - made["points"][1])[..., 0]
    nearest = batch["relief"].flatten(1).amax(1)[:, None]
    of_front = moved > nearest + 1.9
    left, right = (sample(made["images"][v], made["points"][v])[:, 0] for v in (0, 1))
    for layer in (of_front, ~of_front):
        there = layer & made["seen"].all(0)
        assert there.sum() > 200
        apart = (left - right).abs()[there]
        assert apart.median() < 6 and apart.quantile(0.95) < 40  # grey levels
    # Keypoints are labelled on the visible layer, and none at the outlines.
    cover = torch.zeros(8, 1, 512, 512)
    cover[..., 200:300, 200:300] = 1.0
    flat = torch.zeros(8, 240, 320)
    eye = torch.eye(3).expand(8, 3, 3)
    back = Layer(torch.zeros(8, 1, 512, 512), torch.zeros(8, 1, 1, 1), eye, flat)
    front = replace(back, canvas=torch.full((8, 1, 512, 512), 200.0), shift=flat + 10)
    image, (behind, ahead) = put_in_front(back, front, cover)
    assert (image[:, :, 210:230, 192:288] == 200).all() and not image[:, :, :199].any()
    points = torch.tensor([[100.0, 100.0], [250.0, 220.0], [201.0, 220.0], [188.0, 220.0]])
    points = points.expand(8, -1, -1)
    assert behind.place(points)[1][0].tolist() == [True, False, False, False]
    assert ahead.place(points)[1][0].tolist() == [False, True, False, False]
    assert ahead.place(points)[0][0, 1].tolist() == [240.0, 220.0]  # nearer points lie farther left


def test_centroid_of_the_target_is_the_keypoint():
    points = torch.tensor([[[20.25, 11.5], [7.5, 3.0], [40.0, 5.0]]])
    weight = torch.tensor([[1.0, 1.0, 0.0]])
    target = keypoint_target(points, weight, 16, 48)
    assert target.sum() == 2
    heat = target[0]
    # The second keypoint is shared by two pixels; the third has weight 0.
    assert heat[3, 7] == heat[3, 8] == 0.5
    assert heat[:, 30:].sum() == 0
    window = heat[10:14, 18:23]
    y, x = torch.meshgrid(torch.arange(10, 14), torch.arange(18, 23), indexing="ij")
    assert (window * x).sum() == pytest.approx(20.25)
    assert (window * y).sum() == pytest.approx(11.5)
    perfect = target[:, None].logit(eps=1e-6)
    assert detector_loss(perfect, target) < detector_loss(torch.zeros_like(perfect), target)


def test_descriptor_loss_is_low_for_correct_and_high_for_wrong_matches():
    torch.manual_seed(0)
    left = torch.nn.functional.normalize(torch.randn(2, 50, 16), dim=-1)
    points = torch.rand(2, 50, 2) * 1000
    seen = torch.ones(2, 2, 50, dtype=torch.bool)  # in each view
    good, share = descriptor_loss(left, left, points, seen, 0.07)
    bad, none = descriptor_loss(left, left.flip(1), points, seen, 0.07)
    assert good < 0.1 and share == 1
    assert bad > 3 and none < 0.1
    # Points visible in neither view do not count.
    half = seen.clone()
    half[..., 25:] = False
    spoiled = torch.cat([left[:, :25], left[:, 25:].flip(1)], 1)
    assert descriptor_loss(left, spoiled, points, half, 0.07)[1] == 1
    # Points visible in one view are negatives, but not matches.
    spoiled[:, 25:] = left[:, :25]
    alone, confused = half.clone(), descriptor_loss(left, spoiled, points, half, 0.07)[0]
    alone[1, :, 25:] = True
    assert descriptor_loss(left, spoiled, points, alone, 0.07)[0] > confused + 0.2
    assert descriptor_loss(spoiled, left, points, alone.flip(0), 0.07)[0] > confused + 0.2
    spoiled[:, 25:] = torch.nn.functional.normalize(torch.randn(2, 25, 16), dim=-1)
    found = descriptor_loss(left, spoiled, points, alone, 0.07)
    assert found[0] < 0.2 and found[1] > 0.9


def test_position_loss_compares_only_the_views():
    def heat_at(points):  # logits of Gaussian peaks
        y, x = torch.meshgrid(torch.arange(32.0), torch.arange(48.0), indexing="ij")
        apart = (x - points[:, 0, None, None]) ** 2 + (y - points[:, 1, None, None]) ** 2
        return (-apart / 2 + 1.0).logsumexp(0)

    left = torch.tensor([[10.0, 10.0], [30.3, 20.6]])
    right = left - torch.tensor([4.25, 0.0])
    labels, sure = torch.stack([left, right])[:, None], torch.ones(2, 1, 2)
    both, yes = torch.tensor([0.4, -0.3]), torch.tensor([True])

    def loss(off_left, off_right, sure=sure, counts=yes):
        logits = torch.stack([heat_at(left + off_left), heat_at(right + off_right)])[:, None]
        return position_loss(logits, labels, sure, counts)

    # An error that is the same in both views costs little, a difference costs more.
    assert loss(0.0, 0.0) < 0.01 and loss(both, both) < 0.05
    assert loss(both, -both) > 5 * loss(both, both)
    # Points visible in one view, other pairs of views and positions without heat do not count.
    assert loss(both, -both, torch.tensor([[[1.0, 1.0]], [[0.0, 0.0]]])) == 0
    assert loss(both, -both, counts=~yes) == 0
    far = labels.clone()
    far[0, 0, 0, 0] += 20
    logits = torch.stack([heat_at(left), heat_at(right)])[:, None]
    assert position_loss(logits, far, sure, yes) < 0.02
    # Gradient descent reduces it.
    off = torch.tensor([0.5, 0.4], requires_grad=True)
    loss(off, 0.0).backward()
    assert (off.grad > 0).all()


def test_triplet_loss_is_low_for_corresponding_descriptors():
    torch.manual_seed(0)
    left = torch.nn.functional.normalize(torch.randn(2, 50, 16), dim=-1)
    points = torch.rand(2, 50, 2) * 1000
    valid = torch.ones(2, 50, dtype=torch.bool)
    good, share = triplet_loss(left, left, points, valid, 1.0)
    bad, none = triplet_loss(left, left.flip(1), points, valid, 1.0)
    assert good < 0.1 < 0.8 < bad and share == 1 and none < 0.1
    assert triplet_loss(left, left, points, valid & False, 1.0)[0] == 0


def test_heatmap_loss_is_lowest_at_the_labels():
    points = torch.tensor([[[20.0, 11.0], [40.0, 5.0]]])
    target = gaussian_heatmap(points, torch.tensor([[1.0, 0.0]]), 16, 48, 1.5)
    assert target[0, 11, 20] == 1 and target[0, :, 30:].sum() == 0
    assert target[0, 11, 22] == pytest.approx(np.exp(-4 / 4.5))
    # For any weight, the loss is lowest at the logits of the targets.
    best = target[:, None].clamp(1e-4, 1 - 1e-4).logit().requires_grad_()
    flat = detector_loss(torch.zeros_like(best), target, 500.0)
    assert detector_loss(best, target, 500.0) < flat < detector_loss(-best, target, 500.0)
    for weight in (1.0, 500.0):
        half = torch.zeros_like(best).requires_grad_()
        detector_loss(half, torch.full_like(target, 0.5), weight).backward()
        assert half.grad.abs().max() < 1e-6


def test_an_invalid_recipe_is_rejected(tmp_path):
    (tmp_path / "slip.yaml").write_text("stepz: 3\n")
    with pytest.raises(ValueError, match="stepz"):
        load_recipe(str(tmp_path / "slip.yaml"))
    with pytest.raises(ValueError, match="unknown recipe"):
        load_recipe("nothing")
    for text, told in (
        ("batch: 0", "batch is 0, must be between 1"),
        ("jitter: .nan", "jitter"),
        ("views: {height: 100}", "height must be a multiple of 16"),
        ("views: {zoom: [a, 1]}", "zoom"),
        ("correspondences: 5000", "most_keypoints"),
        ("temperature: -1", "temperature"),
        (
            "{micro_batch: 1, views: {front_share: 0.5}}",
            "front_share needs a micro-batch of at least two",
        ),
    ):
        (tmp_path / "slip.yaml").write_text(text)
        with pytest.raises(ValueError, match=told):
            load_recipe(str(tmp_path / "slip.yaml"))


def test_image_borders_are_not_labelled():
    for grey in (40.0, 250.0):
        flat = torch.full((240, 320), grey)
        found = [adapted_keypoints(load_network("tiny"), flat, 12, 500, 0) for _ in range(2)]
        assert len(found[0]) < 10  # from the noise; the border alone would add more
        np.testing.assert_array_equal(*found)


def test_second_round_labels_are_repeatable_keypoints_of_the_network(training_images, tmp_path):
    images = training_images
    labels, unreadable = relabel_folder(images, tmp_path / "labels.npz", "tiny", views=4, most=500)
    assert not unreadable and len(labels) == 4
    rows = load_labels(images, tmp_path / "labels.npz").of_image(1)  # camera
    assert len(rows) > 100
    assert (rows[:, :2] >= 0).all() and (rows[:, :2] < [400, 300]).all()
    assert ((rows[:, 2] >= 0) & (rows[:, 2] <= 1)).all()
    # The command produces the same labels.
    options = ["--model", "tiny", "--views", "4", "--most", "500"]
    assert main(["label", str(images), "--out", str(tmp_path / "same.npz"), *options]) == 0
    again = load_labels(images, tmp_path / "same.npz")
    assert again.settings == labels.settings
    np.testing.assert_array_equal(again.xy, labels.xy)
    strong, weak = rows[:50, 2].mean(), rows[-50:, 2].mean()  # strongest first
    assert strong > 0.6 and strong > weak
    config = load_recipe("finetune")[0]
    config = replace(config, steps=2, batch=2, validate_every=2, warmup=1, correspondences=100)
    file = tmp_path / "labels.npz"
    best = train(config, images, tmp_path / "run", "cpu", 0, labels_file=file, start="tiny")
    before, after = load_network("tiny").state_dict(), load_network(best).state_dict()
    moved = [(before[k] - after[k]).abs().max().item() for k in before if before[k].ndim == 4]
    assert 0 < max(moved) < 0.1  # it started from the given weights
