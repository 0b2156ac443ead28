"""Validation of a network in training, on held-out images and optionally on stereo scenes."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from kp_frontend.detection import detect
from kp_frontend.network import KeypointNetwork, save_network
from kp_training.config import TrainConfig, ViewConfig
from kp_training.data import PairDataset
from kp_training.evaluation.middlebury.evaluation import evaluate_middlebury
from kp_training.labels import Labels
from kp_training.objective import losses
from kp_training.views import across_views, make_views

MOST_PAIRS = 64
KEYPOINTS, NMS_RADIUS, BORDER = 300, 3, 4  # of a 320x240 view
STEREO_METRICS = (
    "total_matches",
    "correct_matches",
    "matching_accuracy",
    "disparity_accuracy",
    "repeatability",
    "repeatability_1px",
    "descriptor_map",
    "disparity_error_px",
)


@dataclass
class Validator:
    """Measures a network on held-out images, always with the same views."""

    config: TrainConfig
    labels: Labels
    held_out: np.ndarray
    device: str
    middlebury: Path | None = None

    def __post_init__(self) -> None:
        c = self.config
        pairs = min(MOST_PAIRS, 4 * c.batch)
        of_recipe = PairDataset(self.labels, self.held_out, pairs, c.seed + 1, c.views)
        # The views are the same for every recipe, so that runs can be compared.
        views = ViewConfig(height=c.views.height, width=c.views.width, stereo_share=0.0)
        self._same_views = replace(c, views=views)
        homographies = PairDataset(self.labels, self.held_out, pairs, c.seed + 2, views)
        self._of_recipe = DataLoader(of_recipe, c.micro)
        self._homographies = DataLoader(homographies, c.micro)

    @torch.no_grad()
    def __call__(self, network: KeypointNetwork) -> dict[str, float]:
        """Mean `loss` and its parts, and `repeatability` and `matching` under known homographies.

        With scenes, also the metrics of `kp evaluate middlebury`.
        """
        network.eval()
        torch.manual_seed(self.config.seed)
        recipe: list[dict[str, Tensor]] = []
        for batch in self._of_recipe:
            total, parts = losses(network, self._to_device(batch), self.config)
            recipe.append({"loss": total, **parts})
        result = {key: float(np.mean([row[key].item() for row in recipe])) for key in recipe[0]}
        if not np.isfinite(result["loss"]):  # the caller stops the run
            return result
        rows = [
            homography_metrics(network, self._to_device(batch), self._same_views)
            for batch in self._homographies
        ]
        result |= {key: float(np.mean([row[key] for row in rows])) for key in rows[0]}
        if self.middlebury:
            result |= stereo_metrics(network, self.middlebury)
        return result

    def _to_device(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {k: v.to(self.device) for k, v in batch.items()}


def homography_metrics(
    network: KeypointNetwork, batch: dict[str, Tensor], config: TrainConfig
) -> dict[str, float]:
    """Metrics of pairs of views related by homographies.

    `repeatability` (3 px), `repeatability_1px`, and `matching`: the share of mutual nearest
    neighbours within 3 px of the truth.
    """
    views = make_views(batch, config)
    height, width = views["images"].shape[-2:]
    logits, features = network(views["images"].flatten(0, 1))
    xy, scores = detect(logits, (height, width), KEYPOINTS, NMS_RADIUS, BORDER)
    descriptors = network.describe(features, xy)
    (left, right), (a, b), (is_left, is_right) = xy.chunk(2), descriptors.chunk(2), (
        (scores > 0).chunk(2)
    )  # fmt: skip
    place, seen = across_views(left, 0, batch, views)
    place = torch.where((seen & is_left)[..., None], place, torch.nan)
    apart = torch.cdist(place, torch.where(is_right[..., None], right, 1e6))
    counts = place.isfinite().all(-1)
    nearest = apart.nan_to_num(1e6).amin(2)[counts]
    similarity = (a @ b.mT).masked_fill(~is_right[:, None], -2).masked_fill(~is_left[..., None], -2)
    there = similarity.argmax(2)
    mutual = similarity.argmax(1).gather(1, there) == torch.arange(KEYPOINTS, device=xy.device)
    error = apart.gather(2, there[..., None])[..., 0]
    matches = mutual & counts
    return {
        "repeatability": (nearest <= 3).float().mean().item(),
        "repeatability_1px": (nearest <= 1).float().mean().item(),
        "matching": (error[matches] <= 3).float().mean().item(),
    }


def stereo_metrics(network: KeypointNetwork, folder: Path) -> dict[str, float]:
    """Means over the scenes of `kp evaluate middlebury`.

    Raises:
        ValueError: the scenes cannot be evaluated.
    """
    with tempfile.TemporaryDirectory() as temporary:
        file = Path(temporary) / "network.safetensors"
        save_network(network, file)
        metrics = evaluate_middlebury(folder, [str(file)]).metrics
    (found,) = metrics["methods"].values()
    return {f"middlebury_{name}": found[name]["mean"] for name in STEREO_METRICS}
