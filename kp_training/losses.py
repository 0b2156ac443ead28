"""The loss functions: keypoint detection, descriptors, and sub-pixel positions."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from kp_frontend.detection import centroid

ROW_BAND = 8.0  # half height of the row band, pixels
SMALL = 0.1  # pixels; the position loss is quadratic below this difference


def keypoint_target(points: Tensor, weight: Tensor, height: int, width: int) -> Tensor:
    """Target probability of each pixel, (B, H, W).

    Each keypoint is distributed bilinearly over the four pixels around it. Detection uses the
    centroid of the predicted heatmap around a peak as the sub-pixel position; with this target the
    centroid is unbiased.

    Args:
        points: (B, N, 2) pixels.
        weight: (B, N) in 0..1, confidence that each is a keypoint; 0 ignores it.
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
    return heat.reshape(batch, height, width).clamp(max=1.0)


def detector_loss(logits: Tensor, target: Tensor, positive_weight: float = 1.0) -> Tensor:
    """Binary cross entropy of each pixel against targets (B, H, W) in 0..1.

    Args:
        positive_weight: weight of a keypoint relative to its absence. The optimal logits of a
            weighted loss are too high by the logarithm of the weight. The logarithm is therefore
            added here, and the network's own logits remain those of a probability.
    """
    weight = torch.as_tensor(positive_weight, device=logits.device)
    logits = logits[:, 0] + weight.log()
    return F.binary_cross_entropy_with_logits(logits, target, pos_weight=weight)


def gaussian_heatmap(
    points: Tensor, weight: Tensor, height: int, width: int, sigma: float
) -> Tensor:
    """Sum of Gaussians of height 1 around the keypoints, at most 1, (B, H, W).

    Args:
        points: (B, N, 2) pixels; each Gaussian is centred on the nearest pixel.
        weight: (B, N), 0 ignores a point.
        sigma: pixels.
    """
    x, y = points.round().unbind(-1)
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height) & (weight > 0)
    place = torch.where(inside, y * width + x, 0.0).long()
    heat = points.new_zeros(points.shape[0], height * width)
    heat = heat.scatter_reduce(1, place, inside.to(heat.dtype), "amax")
    radius = int(3 * sigma + 0.5)
    steps = torch.arange(-radius, radius + 1, device=points.device, dtype=points.dtype)
    bell = torch.exp(-(steps**2) / (2 * sigma**2))[None, None, None]
    heat = heat.reshape(-1, 1, height, width)
    heat = F.conv2d(F.conv2d(heat, bell, padding=(0, radius)), bell.mT, padding=(radius, 0))
    return heat[:, 0].clamp(max=1.0)


def triplet_loss(
    left: Tensor, right: Tensor, points: Tensor, valid: Tensor, margin: float, near: float = 5.0
) -> tuple[Tensor, Tensor]:
    """Triplet margin loss: a keypoint, the same one in the other view, and a random other one.

    Args:
        left, right, points, near: see `descriptor_loss`.
        valid: (B, N) bool, which points both views show.
        margin: minimum difference of the two Euclidean distances.

    Returns:
        See `descriptor_loss`.
    """
    count = left.shape[1]
    far = (torch.cdist(points, points) >= near) & valid[:, None, :]
    drawn = (torch.rand_like(far, dtype=left.dtype) * far).argmax(2)
    negative = right.gather(1, drawn[..., None].expand_as(right))
    usable = valid & far.any(2)
    loss = F.triplet_margin_loss(left, right, negative, margin=margin, reduction="none")
    similarity = (left @ right.transpose(1, 2)).masked_fill(~valid[:, None, :], -2.0)
    truth = torch.arange(count, device=left.device)
    right_one = similarity.argmax(2) == truth
    right_one &= similarity.masked_fill(~valid[:, :, None], -2.0).argmax(1) == truth
    total = valid.sum().clamp(min=1)
    return (loss * usable).sum() / usable.sum().clamp(min=1), (right_one & valid).sum() / total


def descriptor_loss(
    left: Tensor,
    right: Tensor,
    points: Tensor,
    seen: Tensor,
    temperature: float,
    row_weight: float = 1.0,
    near: float = 5.0,
) -> tuple[Tensor, Tensor]:
    """Dual-softmax InfoNCE over the keypoints of each pair (van den Oord et al., 2018).

    Args:
        left, right: (B, N, D) unit descriptors of corresponding points.
        points: (B, N, 2) their position in the right view, pixels.
        seen: (2, B, N) bool, which points are visible in each view. Points visible in both views
            are correspondences. Points visible in only one view are negatives, like occluded
            keypoints when two whole images are matched.
        temperature: of the softmax.
        row_weight: weight of negatives in the row band that stereo matching searches, 8 px above
            and below; other negatives have weight 1.
        near: pixels; points nearer than this to the true one are not used as negatives.

    Returns:
        The loss, and the share of correspondences that are mutual nearest neighbours.
    """
    similarity = left @ right.transpose(1, 2)
    count = similarity.shape[1]
    same = torch.eye(count, dtype=torch.bool, device=left.device)
    close = (torch.cdist(points, points) < near) & ~same
    hidden = ~seen[0][:, :, None] | ~seen[1][:, None, :] | close
    valid = seen[0] & seen[1]
    scores = (similarity / temperature).masked_fill(hidden & ~same, -1e4)
    if row_weight != 1.0:
        band = (points[:, :, None, 1] - points[:, None, :, 1]).abs() < ROW_BAND
        scores = scores + math.log(row_weight) * (band & ~same)
    truth = torch.arange(count, device=left.device).expand(left.shape[0], -1)
    # Use rows of one matrix: on a GPU, softmax is slow over any but the last dimension.
    there, back = (
        F.cross_entropy(way.flatten(0, 1), truth.flatten(), reduction="none")
        for way in (scores, scores.mT)
    )
    loss = ((there + back) / 2).reshape(truth.shape)
    mutual = (scores.argmax(2) == truth) & (scores.argmax(1) == truth)
    total = valid.sum().clamp(min=1)
    return (loss * valid).sum() / total, (mutual & valid).sum() / total


def position_loss(logits: Tensor, labels: Tensor, sure: Tensor, counts: Tensor) -> Tensor:
    """Difference of the sub-pixel positions of a keypoint in the two views, pixels.

    Based on ALIKE's reprojection loss (Zhao et al., 2022), here at labelled keypoints. Labels of a
    network are wrong by some tenths of a pixel, but by the same amount in both views of an image.
    The loss therefore compares only the views with each other.

    Args:
        logits: (2, B, H, W), two views that differ by a shift near each keypoint.
        labels: (2, B, K, 2) position of each keypoint in each view, pixels.
        sure: (2, B, K), 0 where the keypoint is not visible.
        counts: (B,) bool, to which pairs of views the loss applies.
    """
    heat = logits.sigmoid()
    height, width = heat.shape[-2:]
    sure = (sure > 0).all(0) & counts[:, None]
    labels = torch.where(sure[..., None], labels, 0.0).flatten(0, 1)
    size = torch.tensor([width - 1, height - 1], device=labels.device)
    pixels = labels.round().long().clamp(min=0).minimum(size)
    offset, total = centroid(heat.flatten(0, 1), pixels)
    errors = (pixels + offset - labels).reshape(2, *sure.shape, 2)
    # Where the network currently detects no keypoint, there is no position to correct.
    weight = total.detach().reshape(2, *sure.shape).clamp(max=1.0).prod(0) * sure
    apart = F.smooth_l1_loss(errors[0], errors[1], reduction="none", beta=SMALL).sum(-1)
    return (apart * weight).sum() / weight.sum().clamp(min=1.0)
