"""The training objective: the weighted losses of a recipe for one batch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from kp_frontend.network import KeypointNetwork
from kp_training.config import TrainConfig
from kp_training.losses import (
    descriptor_loss,
    detector_loss,
    gaussian_heatmap,
    keypoint_target,
    position_loss,
    triplet_loss,
)
from kp_training.views import make_views, stereo_like


def losses(
    network: KeypointNetwork | DistributedDataParallel,
    batch: dict[str, Tensor],
    config: TrainConfig,
    bf16: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Total loss of a batch and its parts (`detector`, `descriptor`, `matched`, ...).

    With `bf16`, only the network runs in bfloat16: geometry and losses need float32.
    """
    views = make_views(batch, config)
    images = views["images"].flatten(0, 1).contiguous(memory_format=torch.channels_last)
    with torch.autocast(images.device.type, torch.bfloat16, bf16):
        logits, features = network(images)
    logits = logits.float()

    height, width = images.shape[2:]
    labels, sure = views["labels"].flatten(0, 1), views["sure"].flatten(0, 1)
    if config.detector == "heatmap":
        target = gaussian_heatmap(labels, sure, height, width, config.heatmap_sigma)
    else:
        target = keypoint_target(labels, sure, height, width)
    detector = detector_loss(logits, target, config.positive_weight)

    points = views["points"] + torch.randn_like(views["points"]) * config.jitter
    inner = network.module if isinstance(network, DistributedDataParallel) else network
    left, right = inner.describe(features, points.flatten(0, 1)).chunk(2)
    seen = views["seen"]
    pairs = (left, right, views["points"][1])
    if config.descriptor == "triplet":
        descriptor, matched = triplet_loss(*pairs, seen.all(0), config.margin)
    else:
        descriptor, matched = descriptor_loss(*pairs, seen, config.temperature, config.row_weight)

    total = config.detector_weight * detector + config.descriptor_weight * descriptor
    parts = {"detector": detector, "descriptor": descriptor, "matched": matched}
    if config.position_weight:
        both = (logits.unflatten(0, (2, -1))[:, :, 0], views["labels"], views["sure"])
        parts["position"] = position_loss(*both, stereo_like(batch))
        total = total + config.position_weight * parts["position"]
    return total, parts
