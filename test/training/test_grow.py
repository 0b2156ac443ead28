"""A larger network is initialised from a smaller one, and trains all its channels."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kp_frontend.network import SIZES, KeypointNetwork, build_network, load_network
from kp_training.grow import grow

TINY = SIZES["tiny"]
WIDER = replace(
    TINY,
    channels=(20, 32, 72, 100),
    detector_channels=(24, 32),
    descriptor_channels=80,
    descriptor_dim=96,
)


def grown(small, config):
    """A new network of `config`, initialised from `small`."""
    network = KeypointNetwork(config)
    grow(small, network)
    return network


@pytest.fixture(scope="module")
def image():
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, 256, (1, 1, 64, 96), dtype=torch.uint8, generator=generator)


def test_a_wider_network_computes_the_same_as_the_small_one(image):
    small = load_network("tiny")
    torch.manual_seed(0)
    wide = grown(small, WIDER).eval()
    with torch.inference_mode():
        logits, (coarse, fine) = small(image)
        wide_logits, (wide_coarse, wide_fine) = wide(image)
    torch.testing.assert_close(wide_logits, logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(wide_coarse[:, :64], coarse, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(wide_fine[:, :24], fine, rtol=1e-4, atol=1e-4)
    assert torch.equal(wide.fine.weight[:64, :24], small.fine.weight)
    assert not wide.fine.weight[:64, 24:].any()
    assert wide_coarse[:, 64:].abs().mean() > 0.01


def test_the_same_size_is_a_copy(image):
    small = load_network("tiny")
    copy = grown(small, small.config).eval()
    with torch.inference_mode():
        assert torch.equal(copy(image)[0], small(image)[0])
    for name, weight in small.state_dict().items():
        assert torch.equal(weight, copy.state_dict()[name]), name


def test_new_channels_learn(image):
    torch.manual_seed(0)
    wide = grown(load_network("tiny"), WIDER)
    logits, features = wide(image.expand(2, -1, -1, -1))
    descriptors = wide.describe(features, torch.rand(2, 20, 2) * 60)
    (logits.square().mean() + descriptors.std()).backward()
    for name, parameter in wide.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
    # The weights from new to old channels start at zero, but are trained.
    kernel = wide.stages[2].down[0].weight
    assert kernel[:64, 24:].abs().max() == 0 and kernel.grad[:64, 24:].abs().max() > 0


@pytest.mark.parametrize("change", [{"channels": (12, 24, 64, 96)}, {"depths": (1, 2, 3, 2)}])
def test_a_larger_start_network_is_rejected(change):
    with pytest.raises(ValueError, match="cannot start from a larger network"):
        grown(build_network("tiny"), replace(TINY, **change))


def test_a_deeper_network_keeps_the_existing_levels():
    small = load_network("tiny")
    deep = grown(small, replace(TINY, depths=(2, 2, 3, 4)))
    assert torch.equal(deep.stages[0].down[0].weight, small.stages[0].down[0].weight)
    assert len(deep.stages[0].body) == 1 and len(deep.stages[3].body) == 3
