"""The keypoint network: its sizes by name, and loading and saving of its weights.

The network follows SuperPoint (DeTone et al., "SuperPoint: Self-Supervised Interest Point Detection
and Description", 2018): one encoder, a detector head, and a descriptor head at 1/8 resolution. It
has these differences:

- The encoder uses strided convolutions instead of pooling. A 1/16 level enlarges the receptive
  field.
- The detector works at 1/2 resolution, through the levels of the encoder (feature pyramid: Lin et
  al., 2017). SuperPoint's detector has one channel for each of the 64 pixels of a 1/8 cell, so its
  keypoints depend on how the image lies on the grid of cells.
- A descriptor also uses the detector's features at 1/4 resolution (hypercolumns: Hariharan et al.,
  2015), which distinguish points within one cell. They are sampled at the keypoints first, which
  costs very little.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from kp_frontend.sampling import pixel_rows, sample_features

STRIDE = 16  # image sides must be multiples of this: the stride of the coarsest level
WEIGHTS_DIR = Path(__file__).parent / "weights"

Range = tuple[float, float]  # smallest and largest value of an activation
INT8 = "int8_correction."  # prefix of the corrections' names in a file
Net = TypeVar("Net", bound=nn.Module)


@dataclass(frozen=True)
class NetworkConfig:
    """Width and depth of the levels at 1/2, 1/4, 1/8 and 1/16 resolution, and of the heads."""

    channels: tuple[int, int, int, int]
    depths: tuple[int, int, int, int]
    detector_channels: tuple[int, int]  # at 1/2 and 1/4 resolution
    descriptor_channels: int
    descriptor_dim: int


SIZES: dict[str, NetworkConfig] = {
    # 2.8 GFLOP for a 640x480 image, 0.4 M parameters: for CPUs.
    "tiny": NetworkConfig((16, 24, 64, 96), (1, 2, 3, 3), (16, 24), 64, 64),
    # 16.9 GFLOP, 1.8 M parameters: for GPUs and fast CPUs.
    "base": NetworkConfig((32, 64, 144, 192), (2, 3, 3, 3), (32, 64), 128, 128),
}


def upsampled(x: Tensor) -> Tensor:
    """Upsample to twice the height and width, bilinear."""
    return F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)


def channels_last(module: Net) -> Net:
    """Put a module's weights in channels-last order, the fastest for convolutions; returns it."""
    # torch's annotations of `to` lack memory_format.
    return module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


class Sum(nn.Module):
    """The sum of two tensors, with `relu` without its negative part.

    A module, so that its result has a name and can be quantized.
    """

    def __init__(self, relu: bool = False) -> None:
        super().__init__()
        self.relu = relu

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        total = first + second
        return F.relu(total) if self.relu else total


class Normalisation(nn.Module):
    """Grey levels 0..255 to about -2..2."""

    def forward(self, image: Tensor) -> Tensor:
        return (image - 127.5) / 64.0


class ConvBlock(nn.Sequential):
    """Convolution without bias, batch normalisation, ReLU."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__(
            nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
        )


class Stage(nn.Module):
    """A strided convolution, then `depth - 1` convolutions with a residual connection."""

    def __init__(self, inputs: int, outputs: int, depth: int) -> None:
        super().__init__()
        self.down = ConvBlock(inputs, outputs, stride=2)
        self.body = nn.Sequential(*(ConvBlock(outputs, outputs) for _ in range(depth - 1)))
        if depth > 1:
            self.sum = Sum()

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(x)
        return self.sum(x, self.body(x)) if len(self.body) else x


class Detector(nn.Module):
    """Keypoint logits of each pixel, from the levels at 1/2, 1/4 and 1/8 resolution.

    The coarse levels provide context, the fine ones the position.
    """

    def __init__(self, channels: tuple[int, ...], widths: tuple[int, int]) -> None:
        super().__init__()
        half, quarter = widths
        self.lateral = nn.ModuleList(
            nn.Conv2d(inputs, outputs, 1)
            for inputs, outputs in zip(channels, (half, quarter, quarter), strict=True)
        )
        self.quarter_sum = Sum(relu=True)
        self.quarter_mix = ConvBlock(quarter, quarter)
        self.up = nn.ConvTranspose2d(quarter, half, 2, stride=2)
        self.half_sum = Sum(relu=True)
        self.half_mix = ConvBlock(half, half)
        self.logits = nn.Conv2d(half, 4, 1)
        assert self.logits.bias is not None
        nn.init.constant_(self.logits.bias, -4.0)  # about one keypoint per cell

    def forward(self, half: Tensor, quarter: Tensor, eighth: Tensor) -> tuple[Tensor, Tensor]:
        """Run the detector.

        Args:
            half, quarter, eighth: levels (B, C, H/2, W/2), (B, C, H/4, W/4), (B, C, H/8, W/8).

        Returns:
            Logits (B, 1, H, W), and features (B, C, H/4, W/4).
        """
        half, quarter, eighth = (
            layer(x) for layer, x in zip(self.lateral, (half, quarter, eighth), strict=True)
        )
        features = self.quarter_mix(self.quarter_sum(quarter, upsampled(eighth)))
        x = self.half_mix(self.half_sum(half, self.up(features)))
        return F.pixel_shuffle(self.logits(x), 2), features


class KeypointNetwork(nn.Module):
    """Maps grey images to keypoint logits, and to features that describe any pixel."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.config = config
        # For int8; empty if they are not known.
        self.ranges: dict[str, Range] = {}  # of `activations`
        self.corrections: dict[str, Tensor] = {}  # to be added to the biases of `convolutions`
        c, head = config.channels, config.descriptor_channels
        self.normalisation: nn.Module = Normalisation()
        self.stages = nn.ModuleList(
            Stage(inputs, outputs, depth)
            for inputs, outputs, depth in zip((1, *c[:3]), c, config.depths, strict=True)
        )
        self.coarse = nn.Conv2d(c[3], c[2], 1)
        self.eighth_sum = Sum()
        self.detector = Detector(c[:3], config.detector_channels)
        self.descriptor = nn.Sequential(
            ConvBlock(c[2], head), nn.Conv2d(head, config.descriptor_dim, 1)
        )
        self.fine = nn.Linear(config.detector_channels[1], config.descriptor_dim, bias=False)

    def forward(self, image: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Run the network on images. `describe` turns the features into descriptors.

        Args:
            image: (B, 1, H, W) uint8 (or float in 0..255), H and W multiples of 16.

        Returns:
            Keypoint logits (B, 1, H, W), and features for `describe`, (B, D, H/8, W/8) and
            (B, C, H/4, W/4).
        """
        x = self.normalisation(image.to(self.coarse.weight.dtype))
        half = self.stages[0](x)
        quarter = self.stages[1](half)
        eighth = self.stages[2](quarter)
        eighth = self.eighth_sum(eighth, upsampled(self.coarse(self.stages[3](eighth))))
        logits, fine = self.detector(half, quarter, eighth)
        return logits, (self.descriptor(eighth), fine)

    def describe(self, features: tuple[Tensor, Tensor], xy: Tensor) -> Tensor:
        """Unit descriptors (B, K, D) at pixels (B, K, 2), from the features of `forward`."""
        coarse, fine = features
        return self.describe_at((pixel_rows(coarse), pixel_rows(fine)), xy, 8 * coarse.shape[3])

    def describe_at(self, maps: tuple[Tensor, Tensor], xy: Tensor, width: int) -> Tensor:
        """Unit descriptors (N, K, D) at pixels (N, K, 2) of N images.

        Args:
            maps: the features of `forward`, each by `pixel_rows`.
            width: of the images that `forward` had.
        """
        coarse, fine = sample_features(maps, (8, 4), xy, width)
        fine = self.fine(fine.to(self.fine.weight.dtype)).float()
        return F.normalize(coarse + fine, dim=-1)


def activations(network: KeypointNetwork) -> dict[str, nn.Module]:
    """The modules by name whose results are rounded when the network is quantized."""
    modules = network.named_modules()
    return {name: module for name, module in modules if isinstance(module, ConvBlock | Sum)}


def convolutions(network: KeypointNetwork) -> dict[str, nn.Conv2d | nn.ConvTranspose2d]:
    """The convolutions by name. They have the same names after `folded`."""
    return {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d)
    }


def build_network(size: str) -> KeypointNetwork:
    """Create an untrained network of a named size.

    Raises:
        ValueError: the name is not one of `SIZES`.
    """
    if size not in SIZES:
        raise ValueError(f"unknown network size {size!r}; sizes: {', '.join(SIZES)}")
    return KeypointNetwork(SIZES[size])


def released_weights() -> list[str]:
    """Names of the networks with weights in this package."""
    files = WEIGHTS_DIR.glob("*.safetensors")
    return sorted(path.stem for path in files if "." not in path.stem)  # not what lies beside them


def weights_path(model: str | Path) -> Path:
    """Path of the weights of a released network, or `model` itself if it is a file.

    Raises:
        ValueError: `model` is neither a released network nor a file.
    """
    released = WEIGHTS_DIR / f"{model}.safetensors"
    if released.is_file():
        return released
    if Path(model).is_file():
        return Path(model)
    names = ", ".join(released_weights()) or "none"
    raise ValueError(f"no weights {str(model)!r}: give a .safetensors file or one of: {names}")


def save_network(
    network: KeypointNetwork, path: str | Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Write weights, architecture and, if they are known, int8 ranges to a safetensors file.

    Raises:
        ValueError: the network's batch normalisation is folded.
    """
    if not any(isinstance(module, nn.BatchNorm2d) for module in network.modules()):
        raise ValueError("a network whose batch normalisation is folded cannot be saved")
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in weights(network).items()}
    header = {"architecture": json.dumps(asdict(network.config)), **(metadata or {})}
    if network.ranges:
        header["ranges"] = json.dumps(network.ranges)
        state |= {INT8 + name: tensor for name, tensor in network.corrections.items()}
    Path(path).write_bytes(save(state, header))


def weights(network: KeypointNetwork) -> dict[str, Tensor]:
    """Parameters and running statistics by name, as stored in a file."""
    return {k: v for k, v in network.state_dict().items() if not k.endswith("num_batches_tracked")}


def load_for_inference(model: str | Path) -> KeypointNetwork:
    """Load a network as `load_network` does and fold its batch normalisation."""
    return folded(load_network(model))


def folded(network: KeypointNetwork) -> KeypointNetwork:
    """A copy for inference in which the convolutions include the batch normalisation after them.

    It computes the same in fewer steps. It cannot be trained further, nor saved.
    """
    network = copy.deepcopy(network).eval()
    for module in list(network.modules()):
        if isinstance(module, ConvBlock):
            convolution, normalisation, _ = module
            assert isinstance(convolution, nn.Conv2d)
            assert isinstance(normalisation, nn.BatchNorm2d)
            module[0] = fuse_conv_bn_eval(convolution, normalisation)
            del module[1]
    return network


def load_network(model: str | Path) -> KeypointNetwork:
    """Load a network, in eval mode, by released name or from a safetensors file.

    Raises:
        ValueError: the weights do not exist, or the file is truncated, not safetensors, or of
            another kind of network.
    """
    path = weights_path(model)
    state, header = _read(path)
    try:
        fields: dict[str, Any] = json.loads(header["architecture"])
        fields = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
        config = NetworkConfig(**fields)
        network = KeypointNetwork(config)
        ranges = json.loads(header.get("ranges", "{}"))
        network.ranges = {name: (float(low), float(high)) for name, (low, high) in ranges.items()}
        for name in [name for name in state if name.startswith(INT8)]:
            network.corrections[name.removeprefix(INT8)] = state.pop(name)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} does not contain a keypoint network of kp_frontend") from error
    expected = {name: tensor.shape for name, tensor in weights(network).items()}
    if expected != {name: tensor.shape for name, tensor in state.items()}:
        raise ValueError(f"{path} does not match the architecture in its header")
    if not all(
        tensor.isfinite().all() for tensor in (*state.values(), *network.corrections.values())
    ):
        raise ValueError(f"{path} has weights that are not finite: the file is damaged")
    if (network.ranges or network.corrections) and not _fit(network):
        raise ValueError(f"{path} has int8 ranges of another network: run `kp quantize` again")
    network.load_state_dict(state, strict=False)  # only the batch counters are missing
    return network.eval()


def read_metadata(model: str | Path) -> dict[str, str]:
    """The metadata of a network's weights file, for `save_network`.

    Raises:
        ValueError: see `load_network`.
    """
    return _read(weights_path(model))[1]


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file."""
    try:
        with safe_open(str(path), framework="pt") as file:
            header = file.metadata() or {}
            return {name: file.get_tensor(name) for name in file.keys()}, header  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from error


def _fit(network: KeypointNetwork) -> bool:
    """Whether the ranges are those of the network's activations, and such that can be used, and
    the corrections those of its convolutions."""
    usable = all(
        low <= 0 <= high < math.inf and low < high for low, high in network.ranges.values()
    )
    sizes = {name: (layer.out_channels,) for name, layer in convolutions(network).items()}
    corrected = {name: tuple(tensor.shape) for name, tensor in network.corrections.items()}
    return usable and network.ranges.keys() == activations(network).keys() and corrected == sizes
