"""Recipes: the settings of a training run, read from YAML."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml

from kp_frontend.network import STRIDE
from kp_training.text_files import read_text

CONFIG_DIR = Path(__file__).parent / "config"
NAME = re.compile(r"[a-z0-9_]+")
CHOICES = {
    "optimizer": ("adamw", "adam"),
    "schedule": ("cosine", "plateau"),
    "detector": ("points", "heatmap"),
    "descriptor": ("infonce", "triplet"),
    "photometric": ("jitter", "camera"),
}
# Allowed range of numbers; the range of other numbers starts at 0.
BOUNDS = {
    "epochs": (0, 10**6), "steps": (1, 10**9), "batch": (1, 10**6), "validate_every": (1, 10**9),
    "learning_rate": (1e-12, 10.0), "ema": (0.0, 0.99999), "positive_weight": (1e-3, 1e6),
    "heatmap_sigma": (0.1, 100.0), "position_weight": (0.0, 1e3),
    "temperature": (1e-3, 10.0), "row_weight": (1e-3, 1e3),
    "correspondences": (2, 10**5), "lowest_repeat": (0.0, 1.0), "explosion": (1.0, 1e9),
    "views": (1, 1000), "most": (1, 10**5), "every": (1, 10**6),
    "height": (80, 10**4), "width": (80, 10**4), "canvas": (80, 10**4),
    "most_keypoints": (1, 10**5), "zoom": (0.01, 100.0), "real_share": (0.0, 1.0),
    "start_share": (0.0, 0.99),
    "stereo_share": (0.0, 1.0), "front_share": (0.0, 1.0),
    "disturbed": (0.0, 1.0), "exposure": (0.01, 10.0), "motion_blur": (2.0, 14.0),
    "sensor_noise": (0.0, 127.0), "jpeg_quality": (1.0, 80.0),
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
    photometric: str = "camera"  # jitter (brightness, contrast) or camera; see photometric.py
    # Disturbances: each kind occurs in a share `disturbed` of the samples, in one view or in both.
    disturbed: float = 0.0
    exposure: tuple[float, float] = (0.12, 1.6)  # range of the gain, log-uniform
    motion_blur: float = 12.0  # largest length, pixels
    sensor_noise: float = 25.0  # largest standard deviation at medium grey, grey levels
    jpeg_quality: float = 15.0  # lowest quality


@dataclass(frozen=True)
class LabelConfig:
    """Which keypoints the detector is trained on; see docs/training.md."""

    source: str = "sift"  # sift, orb, fast or several joined by +; own: the network itself
    views: int = 5  # random views in which a keypoint has to be found again
    most: int = 2000  # keypoints per image
    every: int = 1  # 2: label and use every second image, and so on


@dataclass(frozen=True)
class TrainConfig:
    """One stage of a recipe; see the comments in `config/tiny.yaml` and `config/paper.yaml`."""

    name: str = ""  # of the stage
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
    start_share: float = 0.0  # share of the weights that the stage starts from in those saved
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
    labels: LabelConfig = field(default_factory=LabelConfig)
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


def load_recipe(name: str) -> tuple[TrainConfig, ...]:
    """Read the stages of a recipe, by its name (`tiny`) or from a YAML file.

    Settings outside `stages` are those of every stage. A recipe without `stages` is one stage.

    Raises:
        ValueError: the recipe does not exist, or a setting is unknown or out of range.
    """
    path = CONFIG_DIR / f"{name}.yaml"
    path = path if path.is_file() else Path(name)
    if not path.is_file():
        raise ValueError(f"unknown recipe {name!r}; give a YAML file or one of {_names()}")
    try:
        given = yaml.safe_load(read_text(path)) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    common = dict(given) if isinstance(given, dict) else given
    listed = common.pop("stages", None) if isinstance(common, dict) else None
    if listed is None:
        return (_stage(common, path),)
    if not isinstance(listed, list) or not listed:
        raise ValueError(f"{path}: stages must be a list of settings")
    stages = tuple(_stage(_merged(common, own), path) for own in listed)
    names = [stage.name for stage in stages]
    if len(stages) > 1 and (len(set(names)) < len(names) or not all(map(NAME.fullmatch, names))):
        raise ValueError(f"{path}: each stage needs a name of its own, of letters and digits")
    if len(stages) > 1 and any(stage.epochs for stage in stages):
        raise ValueError(f"{path}: stages have steps, epochs are for a recipe of one stage")
    return stages


def _merged(common: Any, own: Any) -> Any:
    """The settings of a stage: its own ones, and those of all stages."""
    if not isinstance(common, dict) or not isinstance(own, dict):
        return own
    both = common.keys() & own.keys()
    return common | own | {name: _merged(common[name], own[name]) for name in both}


def _stage(settings: object, path: Path) -> TrainConfig:
    """The checked settings of one stage."""
    checked = _settings(settings, TrainConfig, path)
    checked["views"] = ViewConfig(**_settings(checked.pop("views", {}), ViewConfig, path))
    checked["labels"] = LabelConfig(**_settings(checked.pop("labels", {}), LabelConfig, path))
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
            raise ValueError(f"{path}: unknown setting {name!r}{_hint(name)}")
        wanted = getattr(default, name)
        if is_dataclass(wanted):
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


def _hint(name: object) -> str:
    """Where a setting that was given in the wrong place belongs; empty if it does not exist."""
    for section, kind in (("labels", LabelConfig), ("views", ViewConfig)):
        if name in {f.name for f in fields(kind)}:
            return f"; it belongs in {section}"
    return ""


def _names() -> str:
    return ", ".join(sorted(p.stem for p in CONFIG_DIR.glob("*.yaml")))
