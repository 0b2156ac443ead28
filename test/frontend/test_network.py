"""The network: shapes, sizes, and weights that are what they say."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from kp_frontend.network import (
    SIZES,
    build_network,
    folded,
    load_for_inference,
    load_network,
    released_weights,
    save_network,
)


def outputs(network, image):
    """Logits, and descriptors of some pixels."""
    logits, features = network(image)
    pixels = torch.tensor([[[3.0, 4.5], [20.25, 31.0], [16.0, 0.0]]])
    return logits, network.describe(features, pixels)


@pytest.mark.parametrize("size", SIZES)
def test_output_shapes(size):
    network = build_network(size).eval()
    with torch.inference_mode():
        logits, features = network(torch.zeros(2, 1, 48, 64, dtype=torch.uint8))
        descriptors = network.describe(features, torch.rand(2, 5, 2) * 40)
    assert logits.shape == (2, 1, 48, 64)
    assert [tuple(f.shape[2:]) for f in features] == [(6, 8), (12, 16)]
    assert descriptors.shape == (2, 5, SIZES[size].descriptor_dim)
    torch.testing.assert_close(descriptors.norm(dim=-1), torch.ones(2, 5))


def test_cost_of_the_sizes():
    cost = {}
    for size in SIZES:
        with FlopCounterMode(display=False) as counter, torch.inference_mode():
            build_network(size).eval()(torch.zeros(1, 1, 480, 640, dtype=torch.uint8))
        cost[size] = counter.get_total_flops() / 1e9
    assert 2 <= cost["tiny"] <= 3
    assert 10 <= cost["base"] <= 20  # SuperPoint's is 52


def test_bytes_and_floats_give_the_same():
    network = build_network("tiny").eval()
    image = torch.randint(0, 256, (1, 1, 32, 32), dtype=torch.uint8)
    with torch.inference_mode():
        for a, b in zip(outputs(network, image), outputs(network, image.float()), strict=True):
            assert torch.equal(a, b)


def test_weights_survive_saving(tmp_path):
    network = build_network("tiny").eval()
    save_network(network, tmp_path / "w.safetensors")
    loaded = load_network(tmp_path / "w.safetensors")
    assert not loaded.training
    image = torch.randint(0, 256, (1, 1, 32, 32), dtype=torch.uint8)
    with torch.inference_mode():
        for a, b in zip(outputs(network, image), outputs(loaded, image), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("size", SIZES)
def test_folded_batch_normalisation_computes_the_same(size):
    network = load_network(size)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    fast = folded(network)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fast.modules())
    image = torch.randint(0, 256, (1, 1, 64, 64), dtype=torch.uint8)
    with torch.inference_mode():
        for expected, found in zip(outputs(network, image), outputs(fast, image), strict=True):
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    for name, tensor in network.state_dict().items():  # the given one can be trained further
        assert torch.equal(tensor, before[name])


def test_a_folded_network_cannot_be_saved(tmp_path):
    with pytest.raises(ValueError, match="batch normalisation is folded"):
        save_network(load_for_inference("tiny"), tmp_path / "w.safetensors")
    assert not list(tmp_path.iterdir())


def test_released_weights_load_and_have_a_model_card():
    assert "tiny" in released_weights()
    for name in released_weights():
        load_network(name)
        from kp_frontend.network import WEIGHTS_DIR

        assert "## Training data" in (WEIGHTS_DIR / f"{name}.md").read_text()


def test_unusable_weights_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no weights"):
        load_network("no-such-model")
    good = tmp_path / "good.safetensors"
    save_network(build_network("tiny"), good)
    (tmp_path / "cut.safetensors").write_bytes(good.read_bytes()[:1000])
    with pytest.raises(ValueError, match="not a readable safetensors"):
        load_network(tmp_path / "cut.safetensors")
    (tmp_path / "text.safetensors").write_text("hello")
    with pytest.raises(ValueError, match="not a readable safetensors"):
        load_network(tmp_path / "text.safetensors")
    save_file({"a": torch.zeros(3)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="does not contain a keypoint network"):
        load_network(tmp_path / "other.safetensors")
    header = {"architecture": json.dumps(asdict(SIZES["tiny"]))}
    save_file({"a": torch.zeros(3)}, tmp_path / "foreign.safetensors", metadata=header)
    with pytest.raises(ValueError, match="does not match the architecture"):
        load_network(tmp_path / "foreign.safetensors")
    with pytest.raises(ValueError, match="unknown network size"):
        build_network("huge")
