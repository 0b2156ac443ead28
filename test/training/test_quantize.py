"""`kp quantize`: ranges measured on images."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from kp_frontend.backends.agreement import check_images
from kp_frontend.cli import main
from kp_frontend.network import (
    KeypointNetwork,
    activations,
    convolutions,
    load_for_inference,
    load_network,
    read_metadata,
)
from kp_frontend.quantization import quantized
from kp_training import quantize as module
from kp_training.quantize import measure_corrections, measure_ranges, narrowed_ranges


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
    files = {file.name for file in out.parent.iterdir()}  # nothing half-written
    assert files == {"int8.safetensors", "int8.uncertainty.safetensors"}
    printed = capsys.readouterr().out
    assert "broken.png" in printed and "measured on 2 images" in printed
    network, released = load_network(out), load_network("tiny")
    assert network.ranges.keys() == activations(network).keys()
    assert network.ranges != released.ranges  # of other images
    for name, tensor in released.state_dict().items():
        assert torch.equal(tensor, network.state_dict()[name])
    assert network.corrections.keys() == convolutions(network).keys()
    metadata, expected = read_metadata(out), read_metadata("tiny")
    metadata.pop("ranges"), expected.pop("ranges")
    assert metadata == expected


def test_ranges_are_means_of_extremes_over_images():
    network = load_for_inference("tiny")
    bright, dark = (np.full((64, 64), value, np.uint8) for value in (255, 0))
    each = [measure_ranges(network, [image]) for image in (bright, dark)]
    both = measure_ranges(network, [bright, dark])
    for name, found in both.items():
        np.testing.assert_allclose(found, np.mean([r[name] for r in each], 0), rtol=1e-4)
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


def test_corrections_keep_the_means_of_the_channels():
    network = load_for_inference("tiny")
    image = check_images(96, 128)[0]
    given = torch.from_numpy(image)[None, None].float()

    def means(network: KeypointNetwork) -> torch.Tensor:
        with torch.inference_mode():
            coarse, fine = network(given)[1]
        return torch.cat([coarse.mean((0, 2, 3)), fine.mean((0, 2, 3))])

    def error() -> float:
        return (means(quantized(network)) - means(network)).abs().mean().item()

    network.ranges, network.corrections = measure_ranges(network, [image]), {}
    before = error()
    network.corrections = measure_corrections(network, [image])
    assert error() < 0.75 * before


def test_ranges_are_narrowed_where_that_lowers_the_error():
    network = load_for_inference("tiny")
    images = list(check_images(64, 96))
    given = torch.from_numpy(np.stack(images))[:, None].float()

    def error() -> float:
        with torch.inference_mode():
            return (quantized(network)(given)[0] - network(given)[0]).square().mean().item()

    measured = measure_ranges(network, images)
    wide = {name: (3 * low, 3 * high) for name, (low, high) in measured.items()}
    network.ranges = wide
    before = error()
    network.ranges = narrowed_ranges(network, images)
    assert error() < 0.7 * before
    for name, (low, high) in network.ranges.items():
        shares = (1.0, *module.NARROWER)
        assert (low, high) in [tuple(share * value for value in wide[name]) for share in shares]
    # Without keypoints there is no error to lower, and nothing fails.
    assert narrowed_ranges(network, [np.zeros((32, 32), np.uint8)]).keys() == wide.keys()


def test_a_network_that_int8_spoils_is_not_written(images, tmp_path, capsys, monkeypatch):
    def wrong(network, images):
        return {name: (low, high / 50) for name, (low, high) in network.ranges.items()}

    monkeypatch.setattr(module, "measure_ranges", wrong)
    monkeypatch.setattr(module, "narrowed_ranges", lambda network, images: network.ranges)
    out = tmp_path / "int8.safetensors"
    assert main(["quantize", "tiny", "--images", str(images), "--out", str(out)]) == 1
    assert "does not agree with fp32" in capsys.readouterr().err
    assert not out.exists()
