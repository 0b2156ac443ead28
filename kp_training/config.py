"""Recipes: the settings of a training run, read from YAML."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from kp_frontend.network import STRIDE
from kp_training.text_files import read_text

CONFIG_DIR = Path(__file__).parent / "config"
CHOICES = {
    "optimizer": ("adamw", "adam"),
    "schedule": ("cosine", "plateau"),
    "detector": ("points", "heatmap"),
    "descriptor": ("infonce", "triplet"),
    "photometric": ("jitter", "camera", "strong"),
}
# Allowed range of numbers; the range of other numbers starts at 0.
BOUNDS = {
    "epochs": (0, 10**6), "steps": (1, 10**9), "batch": (1, 10**6), "validate_every": (1, 10**9),
    "learning_rate": (1e-12, 10.0), "ema": (0.0, 0.99999), "positive_weight": (1e-3, 1e6),
    "heatmap_sigma": (0.1, 100.0), "position_weight": (0.0, 1e3),
    "temperature": (1e-3, 10.0), "row_weight": (1e-3, 1e3),
    "correspondences": (2, 10**5), "lowest_repeat": (0.0, 1.0), "explosion": (1.0, 1e9),
    "height": (80, 10**4), "width": (80, 10**4), "canvas": (80, 10**4),
    "most_keypoints": (1, 10**5), "zoom": (0.01, 100.0), "real_share": (0.0, 1.0),
    "stereo_share": (0.0, 1.0), "front_share": (0.0, 1.0),
    "rotation": (0.0, 180.0), "scale": (1.0, 10.0), "shift": (0.0, 1.0), "perspective": (0.0, 0.4),
}  # fmt: skip


@dataclass(frozen=True)
class ViewConfig:
    """How the two views of a source image are generated. Sizes in pixels, angles in degrees."""

    height: int = 240
    width: int = 320
    canvas: int = 512  # source images are cropped to this size
    most_keypoints: int = 2000
    zoom: tuple[float, float] = (0.6, 1.4)  # source pixels per view pixel
    real_share: float = 0.7  # share of the samples of a stereo pair that use both of its images
    stereo_share: float = 0.5  # share of the other samples that imitate a rectified stereo pair
    front_share: float = 0.0  # share of the stereo-like samples with another image in front
    rotation: float = 25.0
    scale: float = 1.3  # largest scale factor between the views, log-uniform in both directions
    shift: float = 0.12  # largest shift, relative to the view size
    perspective: float = 0.12  # largest shift of a corner, relative to the view size
    disparity: float = 64.0  # largest mean disparity of a stereo-like pair
    relief: float = 24.0  # largest deviation of a surface from the mean disparity
    photometric: str = "camera"  # jitter (brightness, contrast), camera or strong; see views.py


@dataclass(frozen=True)
class TrainConfig:
    """A recipe; see also the comments in `config/release.yaml` and `config/paper.yaml`."""

    size: str = "tiny"
    # Length
    steps: int = 3000
    epochs: int = 0  # passes over the training images; 0: use `steps`
    batch: int = 16  # pairs of views per step, over all processes
    micro_batch: int = 0  # pairs per forward pass, gradients are accumulated; 0: `batch`
    # Optimiser
    optimizer: str = "adamw"
    schedule: str = "cosine"
    learning_rate: float = 3e-3
    warmup: int = 100  # steps, of the cosine schedule
    weight_decay: float = 1e-4
    ema: float = 0.998  # decay of the averaged weights, the ones that are saved; 0: no averaging
    # Detector loss
    detector: str = "points"  # target: 4 pixels per keypoint (points) or Gaussians (heatmap)
    detector_weight: float = 64.0  # of the binary cross entropy, averaged over pixels
    positive_weight: float = 1.0  # weight of a keypoint relative to its absence
    heatmap_sigma: float = 1.5  # pixels, width of the Gaussians
    position_weight: float = 0.0  # of the difference of the sub-pixel positions, in pixels
    # Descriptor loss
    descriptor: str = "infonce"
    descriptor_weight: float = 1.0
    temperature: float = 0.07  # of infonce
    row_weight: float = 1.0  # weight of InfoNCE negatives in the row band of stereo matching
    margin: float = 1.0  # of triplet
    correspondences: int = 400
    jitter: float = 0.5  # pixels, standard deviation of the offset at which descriptors are sampled
    # Labels
    lowest_repeat: float = 0.5
    lowest_response: float = 0.0
    # Loop
    validate_every: int = 250  # steps; with `epochs`, once an epoch
    keep_every: int = 0  # validations between additional weight files; 0: best and last only
    patience: int = 0  # ends the run after this many validations without improvement; 0: never
    explosion: float = 20.0  # stops the run if the loss exceeds its average by this factor
    seed: int = 0
    views: ViewConfig = field(default_factory=ViewConfig)

    @property
    def micro(self) -> int:
        """Pairs per forward pass."""
        return self.micro_batch or self.batch


def load_config(name: str) -> TrainConfig:
    """Read a recipe by name (`release`) or from a YAML file.

    Raises:
        ValueError: the recipe does not exist, or a setting is unknown or out of range.
    """
    path = CONFIG_DIR / f"{name}.yaml"
    path = path if path.is_file() else Path(name)
    if not path.is_file():
        raise ValueError(f"unknown recipe {name!r}; give a YAML file or one of {_names()}")
    try:
        settings = yaml.safe_load(read_text(path)) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    checked = _settings(settings, TrainConfig, path)
    checked["views"] = ViewConfig(**_settings(checked.pop("views", {}), ViewConfig, path))
    config = TrainConfig(**checked)
    for side in ("height", "width"):
        if getattr(config.views, side) % STRIDE:
            raise ValueError(f"{path}: {side} must be a multiple of {STRIDE}")
    if config.correspondences > config.views.most_keypoints:
        raise ValueError(f"{path}: correspondences must be at most most_keypoints")
    if config.views.front_share and config.micro == 1:
        raise ValueError(f"{path}: front_share needs a micro-batch of at least two pairs")
    if config.batch % config.micro:
        raise ValueError(
            f"{path}: batch {config.batch} is not a multiple of micro_batch {config.micro_batch}"
        )
    return config


def _settings(given: object, kind: type, path: Path) -> dict[str, Any]:
    """The settings of a recipe, checked against the fields of a config class."""
    if not isinstance(given, dict):
        raise ValueError(f"{path}: expected settings (name: value), got {given!r}")
    default = kind()
    checked = {}
    for name, value in given.items():
        if name not in {f.name for f in fields(kind)}:
            raise ValueError(f"{path}: unknown setting {name!r}")
        wanted = getattr(default, name)
        if name == "views":
            checked[name] = value
            continue
        if isinstance(wanted, tuple) and isinstance(value, list) and len(value) == len(wanted):
            numbers = all(type(v) in (int, float) for v in value)
            value = tuple(float(v) for v in value) if numbers else value
        if isinstance(wanted, float) and type(value) is int:
            value = float(value)
        if type(value) is not type(wanted):
            raise ValueError(f"{path}: {name} is {value!r}, expected a value like {wanted!r}")
        low, high = BOUNDS.get(name, (0, 1e9))
        for number in value if isinstance(value, tuple) else (value,):
            if type(number) in (int, float) and not low <= number <= high:  # NaN fails too
                raise ValueError(f"{path}: {name} is {value}, must be between {low:g} and {high:g}")
        if name in CHOICES and value not in CHOICES[name]:
            raise ValueError(
                f"{path}: {name} is {value!r}, must be one of {', '.join(CHOICES[name])}"
            )
        checked[name] = value
    return checked


def _names() -> str:
    return ", ".join(sorted(p.stem for p in CONFIG_DIR.glob("*.yaml")))
