"""int8: a copy of a network whose convolutions multiply numbers of eight bits.

The copy still computes with floats, but each activation and each weight is first rounded to one of
the 256 values that eight bits hold (fake quantization: Jacob et al., "Quantization and Training of
Neural Networks for Efficient Integer-Arithmetic-Only Inference", 2018). OpenVINO replaces the
rounded convolutions with its int8 kernels. torch computes them as they are: a slow reference.

The ranges of the activations come with the weights, and so do corrections of the biases for what
the rounding of the weights changes in the mean. `kp quantize` measures both.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

from kp_frontend.network import KeypointNetwork, Range, activations, convolutions
from kp_frontend.pipeline import StereoPipeline

FIRST = "stages.0.down.0"  # the convolution that reads the image


class RoundedImage(nn.Module):
    """`Normalisation` of whole grey levels to 256 values without an error.

    0 has to be one of the values, so they are those of `Normalisation` minus `OFFSET`.
    """

    OFFSET = 0.5 / 64

    def forward(self, image: Tensor) -> Tensor:
        return torch.fake_quantize_per_tensor_affine((image - 128.0) / 64.0, 1 / 64, 0, -128, 127)


class Rounded(nn.Module):
    """A module whose result is rounded to 256 values of a range.

    A range from 0, as after a ReLU, is spread over 0..255, any other over -128..127, 0 in its
    middle. With `signed` every range is, for engines that know no unsigned numbers.
    """

    def __init__(self, module: nn.Module, limits: Range, signed: bool = False) -> None:
        super().__init__()
        self.module = module
        self.register_buffer("limits", torch.tensor(limits))  # for the pipeline's fingerprint
        low, high = limits
        signed = signed or low < 0
        self.least, self.most = (-128, 127) if signed else (0, 255)
        self.step = max(-low / 128, high / 127) if signed else high / 255

    def forward(self, *inputs: Tensor) -> Tensor:
        result = self.module(*inputs)
        return torch.fake_quantize_per_tensor_affine(result, self.step, 0, self.least, self.most)


class RoundedDescriptors(nn.Module):
    """Rounds unit descriptors, whose values are within -0.5..0.5, to eight bits."""

    def forward(self, descriptors: Tensor) -> Tensor:
        return torch.fake_quantize_per_tensor_affine(descriptors, 0.5 / 127, 0, -128, 127)


class RoundedWeight(nn.Module):
    """Rounds the weights of a convolution to whole steps, each output channel to its own.

    The step makes the largest weight 127; the limits are those that ONNX has for eight bits.
    """

    step: Tensor
    zero: Tensor

    def __init__(self, weight: Tensor, axis: int) -> None:
        super().__init__()
        self.axis = axis
        others = [i for i in range(weight.ndim) if i != axis]
        step = weight.detach().abs().amax(others).clamp(min=1e-12) / 127
        self.register_buffer("step", step)
        self.register_buffer("zero", torch.zeros_like(step, dtype=torch.int32))

    def forward(self, weight: Tensor) -> Tensor:
        return torch.fake_quantize_per_channel_affine(
            weight, self.step, self.zero, self.axis, -128, 127
        )


def require_ranges(network: KeypointNetwork, model: str = "MODEL") -> None:
    """Check that a network can be quantized.

    Raises:
        ValueError: the ranges of its activations are not known.
    """
    if not network.ranges:
        raise ValueError(
            "the weights have no ranges for int8: "
            f"run `kp quantize {model} --images DIR --out FILE` and use FILE"
        )


def quantized(network: KeypointNetwork, signed: bool = False) -> KeypointNetwork:
    """A quantized copy of a network whose batch normalisation is folded.

    Args:
        signed: whether all activations are rounded to signed numbers, see `Rounded`.

    Raises:
        ValueError: the ranges of its activations are not known.
    """
    require_ranges(network)
    network = copy.deepcopy(network)
    for name, layer in convolutions(network).items():
        axis = 1 if isinstance(layer, nn.ConvTranspose2d) else 0  # of the output channels
        register_parametrization(layer, "weight", RoundedWeight(layer.weight, axis))
        assert layer.bias is not None
        with torch.no_grad():
            if name in network.corrections:
                layer.bias.add_(network.corrections[name])
            if name == FIRST:
                layer.bias.add_(RoundedImage.OFFSET * layer.weight.sum((1, 2, 3)))
    network.normalisation = RoundedImage()
    for name, module in activations(network).items():
        replace_module(network, name, Rounded(module, network.ranges[name], signed))
    return network


def replace_module(network: nn.Module, name: str, module: nn.Module) -> None:
    """Put another module in the place of the one of a name."""
    parent, _, child = name.rpartition(".")
    setattr(network.get_submodule(parent), child, module)


def with_quantized_network(pipeline: StereoPipeline, signed: bool = False) -> StereoPipeline:
    """A copy of a pipeline whose network is quantized, see `quantized`.

    It also compares rounded descriptors, but not if `signed`: that is for engines in which this was
    never measured.
    """
    rounded = copy.deepcopy(pipeline)
    rounded.network = quantized(pipeline.network, signed)
    if not signed:
        rounded.compared = RoundedDescriptors()
    return rounded
