"""`kp quantize`: measure the ranges of a network's activations, so that it can run in int8."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
from rich.progress import track
from torch import Tensor, nn
from torch.nn import functional as F

from kp_frontend.backends.agreement import Agreement, agreement, check_images
from kp_frontend.config import FrontendConfig
from kp_frontend.network import (
    STRIDE,
    KeypointNetwork,
    Range,
    activations,
    convolutions,
    folded,
    load_network,
    read_metadata,
    save_network,
)
from kp_frontend.pipeline import StereoPipeline
from kp_frontend.quantization import (
    Rounded,
    quantized,
    replace_module,
    with_quantized_network,
)
from kp_training.image_files import evenly
from kp_training.labels import find_images, read_grey

LONGEST = 640  # pixels: larger images are reduced to this
NARROWER = (0.8, 0.65)  # shares of the measured ranges that are tried
SEARCHED = 24  # images on which they are
LEAST = -6.0  # logits above which keypoints lie


Outputs = tuple[Tensor, tuple[Tensor, Tensor]]  # of a network


class Result(NamedTuple):
    """Ranges that were measured, on how many images, the paths of unreadable ones, and how well
    the int8 network agrees with fp32."""

    ranges: dict[str, Range]
    images: int
    unreadable: list[Path]
    agreement: Agreement


def quantize(model: str | Path, folder: Path, out: Path, most: int = 100) -> Result:
    """Measure the ranges of a network's activations and write them with its weights.

    Args:
        model: a released network by name, or a .safetensors file.
        folder: images such as the network was trained on, searched in all depths.
        out: .safetensors file to write: the same weights, with the ranges. It may be `model`.
        most: number of images, spread evenly over the folder.

    Raises:
        ValueError: weights that cannot be used, or no readable image.
        RuntimeError: the int8 network does not agree with fp32; nothing is written.
    """
    network, metadata = load_network(model), read_metadata(model)
    chosen = evenly(find_images(folder), most)
    fast = folded(network)
    images, unreadable = [], []
    for path in chosen:
        image = read_grey(path)
        if image is None:
            unreadable.append(path)
        else:
            images.append(image)
    if not images:
        raise ValueError(f"no image below {folder} can be read")
    fast.ranges = measure_ranges(fast, images)
    fast.corrections = measure_corrections(fast, images)
    network.ranges = fast.ranges = narrowed_ranges(fast, evenly(images, SEARCHED))
    network.corrections = fast.corrections = measure_corrections(fast, images)
    result = Result(network.ranges, len(images), unreadable, compare(fast))
    if not result.agreement.good:
        raise RuntimeError(f"the int8 network does not agree with fp32: {result.agreement}")
    part = out.with_name(out.name + ".part")
    save_network(network, part, metadata)
    os.replace(part, out)
    return result


def measure_ranges(network: KeypointNetwork, images: list[np.ndarray]) -> dict[str, Range]:
    """Range of each activation: the mean over images (H, W) uint8 of its extremes in an image."""
    extremes: dict[str, list[list[float]]] = {}

    def record(name: str, result: Tensor) -> None:
        extremes.setdefault(name, []).append([float(value) for value in result.aminmax()])

    def hook(name: str) -> torch.utils.hooks.RemovableHandle:
        module: nn.Module = activations(network)[name]
        return module.register_forward_hook(lambda _, __, result: record(name, result))

    hooks = [hook(name) for name in activations(network)]
    with torch.inference_mode():
        for image in track(images, description="measuring ranges", transient=True):
            network(_prepared(image))
    for handle in hooks:
        handle.remove()
    ranges = {}
    for name, found in extremes.items():
        low, high = np.mean(found, 0)
        ranges[name] = (min(float(low), 0.0), float(high))
    return ranges


def narrowed_ranges(network: KeypointNetwork, images: list[np.ndarray]) -> dict[str, Range]:
    """The ranges of a network, each narrowed in turn if that lowers the error of its quantized copy
    on images (H, W) uint8.

    A narrower range has finer steps, but cuts off large values. So no rule for a single layer finds
    the best one; the error of the results does (coordinate descent: Nahshan et al., "Loss Aware
    Post-training Quantization", 2021).
    """
    inputs = [_prepared(image) for image in images]
    with torch.inference_mode():
        expected = [network(image) for image in inputs]

    rounded = quantized(network)

    def errors() -> Tensor:
        with torch.inference_mode():
            pairs = zip(inputs, expected, strict=True)
            return torch.stack([_errors(right, rounded(image)) for image, right in pairs]).mean(0)

    first = errors()
    start = first.clamp(min=1e-12)  # an image without keypoints has no error of the logits
    least = float((first / start).sum())
    ranges = dict(network.ranges)
    for name, (low, high) in track(
        network.ranges.items(), description="narrowing ranges", transient=True
    ):
        layer = rounded.get_submodule(name)
        assert isinstance(layer, Rounded)
        for share in NARROWER:
            tried = (share * low, share * high)
            replace_module(rounded, name, Rounded(layer.module, tried))
            total = float((errors() / start).sum())
            if total >= least:
                break
            ranges[name], least = tried, total
        replace_module(rounded, name, Rounded(layer.module, ranges[name]))
    return ranges


def _errors(expected: Outputs, found: Outputs) -> Tensor:
    """Errors (2,) of a quantized network: squared, of the logits where keypoints are, and
    1 - cosine of the coarse features."""
    (logits, (coarse, _)), (other, (other_coarse, _)) = expected, found
    squared = (other - logits).square()
    cosine = torch.cosine_similarity(coarse, other_coarse, dim=1)
    return torch.stack([squared[logits > LEAST].sum() / logits.numel(), (1 - cosine).mean()])


def measure_corrections(network: KeypointNetwork, images: list[np.ndarray]) -> dict[str, Tensor]:
    """What has to be added to the bias of each convolution, so that its mean output over images is
    the same with rounded weights (Nagel et al., "Data-Free Quantization Through Weight
    Equalization and Bias Correction", 2019)."""
    rounded = quantized(network)
    layers, rounded_layers = (convolutions(n) for n in (network, rounded))
    means: list[list[Tensor]] = [[] for _ in layers]

    def hook(found: list[Tensor], layer: nn.Module) -> torch.utils.hooks.RemovableHandle:
        return layer.register_forward_pre_hook(
            lambda _, inputs: found.append(inputs[0].mean((0, 2, 3)))
        )

    hooks = [hook(*pair) for pair in zip(means, rounded_layers.values(), strict=True)]
    with torch.inference_mode():
        for image in track(images, description="measuring means", transient=True):
            rounded(_prepared(image))
    for handle in hooks:
        handle.remove()
    corrections = {}
    for (name, layer), like, found in zip(
        layers.items(), rounded_layers.values(), means, strict=True
    ):
        error = (like.weight - layer.weight).detach()
        # Each output of a transposed convolution is of one element of the kernel, on average.
        transposed = isinstance(layer, nn.ConvTranspose2d)
        by_channel = error.mean((2, 3)).T if transposed else error.sum((2, 3))
        corrections[name] = -by_channel @ torch.stack(found).mean(0)
    return corrections


def _prepared(image: np.ndarray) -> Tensor:
    """An image as the network takes it, (1, 1, H, W), reduced if it is large."""
    height, width = image.shape
    scale = min(1.0, LONGEST / max(height, width))
    if scale < 1.0:
        image = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
        height, width = image.shape
    grey = torch.from_numpy(image)[None, None].float()
    return F.pad(grey, (0, -width % STRIDE, 0, -height % STRIDE), mode="replicate")


@torch.inference_mode()
def compare(network: KeypointNetwork) -> Agreement:
    """How well the quantized network agrees with fp32 on the images that engines are checked on."""
    height, width = 480, 640
    pipeline = StereoPipeline(network, FrontendConfig(), height, width).eval()
    grey = torch.from_numpy(check_images(height, width))[:, None].float()
    expected, found = (
        [tensor.numpy() for tensor in variant.features(grey)]
        for variant in (pipeline, with_quantized_network(pipeline))
    )
    return agreement(expected, found)
