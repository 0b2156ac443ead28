"""`kp quantize`: ranges measured on images."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from kp_frontend.backends.agreement import check_images
from kp_frontend.cli import main
from kp_frontend.network import activations, load_for_inference, load_network, read_metadata
from kp_training import quantize as module
from kp_training.quantize import measure_ranges


@pytest.fixture
def images(tmp_path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for i, image in enumerate(check_images(100, 150)):
        cv2.imwrite(str(folder / f"{i}.png"), image)
    (folder / "broken.png").write_text("not an image")
    return folder


def test_quantize_adds_ranges_to_the_weights(images, tmp_path, capsys):
    out = tmp_path / "new" / "int8.safetensors"
    assert main(["quantize", "tiny", "--images", str(images), "--out", str(out)]) == 0
    assert [file.name for file in out.parent.iterdir()] == [out.name]  # nothing half-written
    printed = capsys.readouterr().out
    assert "broken.png" in printed and "measured on 2 images" in printed
    network, released = load_network(out), load_network("tiny")
    assert network.ranges.keys() == activations(network).keys()
    assert network.ranges != released.ranges  # of other images
    for name, tensor in load_file(out).items():
        assert torch.equal(tensor, released.state_dict()[name])
    metadata, expected = read_metadata(out), read_metadata("tiny")
    metadata.pop("ranges"), expected.pop("ranges")
    assert metadata == expected


def test_ranges_are_the_upper_quartile_of_extremes_over_images():
    network = load_for_inference("tiny")
    bright, dark = (np.full((64, 64), value, np.uint8) for value in (255, 0))
    each = [measure_ranges(network, [image]) for image in (bright, dark)]
    both = measure_ranges(network, [bright, dark])
    for name, found in both.items():
        small, large = np.sort(np.abs([ranges[name] for ranges in each]), 0)
        np.testing.assert_allclose(np.abs(found), small + 0.75 * (large - small), rtol=1e-4)
        assert found[0] <= 0 < found[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["nothing", "--images", "."], "no weights 'nothing'"),
        (["tiny", "--images", "nowhere"], "nowhere is not a folder of images"),
        (["tiny"], "give either a folder of images or --bag FILE"),
    ],
)
def test_wrong_options_end_in_one_line(tmp_path, capsys, options, message):
    assert main(["quantize", *options, "--out", str(tmp_path / "out.safetensors")]) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line
    assert not (tmp_path / "out.safetensors").exists()


def test_a_network_that_int8_spoils_is_not_written(images, tmp_path, capsys, monkeypatch):
    def wrong(network, images):
        return {name: (low, high / 50) for name, (low, high) in network.ranges.items()}

    monkeypatch.setattr(module, "measure_ranges", wrong)
    out = tmp_path / "int8.safetensors"
    assert main(["quantize", "tiny", "--images", str(images), "--out", str(out)]) == 1
    assert "does not agree with fp32" in capsys.readouterr().err
    assert not out.exists()
