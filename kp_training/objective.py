"""The training objective: a recipe's losses of one batch."""

from __future__ import annotations

import torch
from torch import Tensor

from kp_frontend.detection import (
    block_peaks,
    block_side,
    heatmap,
    refine,
    sample_descriptors,
    suppress,
    top_keypoints,
)
from kp_training.config import TrainConfig
from kp_training.losses import (
    descriptor_loss,
    detector_loss,
    gaussian_heatmap,
    keypoint_target,
    matchability_loss,
    matched_rightly,
    triplet_loss,
)
from kp_training.views import across_views, make_views

SCORED = 450  # keypoints of a 320x240 view whose scores learn from their matches
MATCH_WITHIN = 2.0  # pixels, of a right match
NMS_RADIUS = 3  # pixels


def losses(
    network: torch.nn.Module, batch: dict[str, Tensor], config: TrainConfig, bf16: bool = False
) -> tuple[Tensor, dict[str, Tensor]]:
    """Total loss of a batch and its parts (`detector`, `descriptor`, `matched`, ...).

    With `bf16` the network alone runs in bfloat16: geometry and losses need float32.
    """
    views = make_views(batch, config)
    images = views["images"].flatten(0, 1).contiguous(memory_format=torch.channels_last)
    with torch.autocast(images.device.type, torch.bfloat16, bf16):
        logits, descriptors = (out.float() for out in network(images))

    labels, sure = views["labels"].flatten(0, 1), views["sure"].flatten(0, 1)
    if config.detector == "heatmap":
        target = gaussian_heatmap(labels, sure, *images.shape[2:], config.heatmap_sigma)
    else:
        target = keypoint_target(labels, sure, *images.shape[2:])
    detector = detector_loss(logits, target, config.positive_weight)

    points = views["points"] + torch.randn_like(views["points"]) * config.jitter
    left, right = sample_descriptors(descriptors, points.flatten(0, 1)).chunk(2)
    pairs = (left, right, views["points"][1], views["valid"])
    if config.descriptor == "triplet":
        descriptor, matched = triplet_loss(*pairs, config.margin)
    else:
        descriptor, matched = descriptor_loss(*pairs, config.temperature, config.row_weight)

    total = config.detector_weight * detector + config.descriptor_weight * descriptor
    parts = {"detector": detector, "descriptor": descriptor, "matched": matched}
    if config.matchability:
        match = _matchability(heatmap(logits), descriptors, batch, views)
        total = total + config.matchability * match["matchability"]
        parts |= match
    return total, parts


def _matchability(
    heat: Tensor, descriptors: Tensor, batch: dict[str, Tensor], views: dict[str, Tensor]
) -> dict[str, Tensor]:
    """The loss of the scores of the keypoints that the network finds, and what came right."""
    with torch.no_grad():
        side = block_side(NMS_RADIUS)
        peaks = suppress(block_peaks(heat.detach(), side), NMS_RADIUS)
        scores, pixels = top_keypoints(peaks, side, SCORED)
        found = refine(heat.detach(), pixels)
        features = sample_descriptors(descriptors.detach(), found).chunk(2)
        xy = found.chunk(2)
        place, seen = across_views(xy[0], 0, batch, views)
        _, seen_back = across_views(xy[1], 1, batch, views)
        right = torch.cat(matched_rightly(features, xy, place, MATCH_WITHIN))
        counts = torch.cat([seen, seen_back]) & (scores > 0)
    return {
        "matchability": matchability_loss(heat, pixels, right, counts),
        "came_right": (right & counts).sum() / counts.sum().clamp(min=1),
    }
