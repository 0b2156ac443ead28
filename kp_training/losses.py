"""What the network is trained on: where keypoints are, and which descriptors correspond."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from kp_frontend.network import CELL


def keypoint_target(points: Tensor, weight: Tensor, height: int, width: int) -> Tensor:
    """Target distribution of each cell, (B, 65, H/8, W/8).

    Each keypoint is splatted bilinearly onto the four pixels around it, so that the centroid of
    the predicted heatmap around a peak, which detection uses as the sub-pixel position, is an
    unbiased estimate; a keypoint on a cell's border is shared by the cells.

    Args:
        points: (B, N, 2) pixels.
        weight: (B, N) in 0..1, how sure each is a keypoint; 0 leaves it out.
    """
    batch = points.shape[0]
    heat = points.new_zeros(batch, height * width)
    base = points.floor()
    part = points - base
    for dy in (0, 1):
        for dx in (0, 1):
            x, y = base[..., 0] + dx, base[..., 1] + dy
            share_x = part[..., 0] if dx else 1 - part[..., 0]
            share_y = part[..., 1] if dy else 1 - part[..., 1]
            inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
            place = torch.where(inside, y * width + x, 0.0).long()
            heat.scatter_add_(1, place, weight * share_x * share_y * inside)
    cells = F.pixel_unshuffle(heat.reshape(batch, 1, height, width), CELL)
    mass = cells.sum(1, keepdim=True)
    none = (1 - mass).clamp(min=0)
    return torch.cat([cells, none], 1) / (mass + none)


def detector_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Cross entropy of the 65-way cell distributions (SuperPoint's detector loss, soft targets)."""
    return -(target * logits.log_softmax(1)).sum(1).mean()


def descriptor_loss(
    left: Tensor,
    right: Tensor,
    points: Tensor,
    valid: Tensor,
    temperature: float,
    near: float = 5.0,
) -> tuple[Tensor, Tensor]:
    """Dual-softmax InfoNCE over the keypoints of each pair (van den Oord et al., 2018).

    Args:
        left, right: (B, N, D) unit descriptors of corresponding points.
        points: (B, N, 2) their place in the right view; other points nearer than `near` pixels
            to the true one are no negatives.
        valid: (B, N) bool, which correspondences count.

    Returns:
        The loss, and the share of correspondences that are mutual nearest neighbours.
    """
    similarity = left @ right.transpose(1, 2)
    count = similarity.shape[1]
    same = torch.eye(count, dtype=torch.bool, device=left.device)
    close = (torch.cdist(points, points) < near) & ~same
    hidden = ~valid[:, :, None] | ~valid[:, None, :] | close
    scores = (similarity / temperature).masked_fill(hidden & ~same, -1e4)
    truth = torch.arange(count, device=left.device).expand(left.shape[0], -1)
    loss = F.cross_entropy(scores.transpose(1, 2), truth, reduction="none")
    loss = (loss + F.cross_entropy(scores, truth, reduction="none")) / 2
    mutual = (scores.argmax(2) == truth) & (scores.argmax(1) == truth)
    total = valid.sum().clamp(min=1)
    return (loss * valid).sum() / total, (mutual & valid).sum() / total
