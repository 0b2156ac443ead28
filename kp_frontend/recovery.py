"""Points of earlier frames found again, as a part of the pipeline. Fixed shapes, no host
synchronisation.

A detector misses a point now and then, and its positions jitter. Each known point is therefore
registered in the new image: from the detection that its descriptor matches, or, where there is
none, from the place that the motion of the matched points around it leads to. What is found so is
a keypoint like a detection.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from kp_frontend.matching import FAR, match_temporal, windows
from kp_frontend.registration import register

MEMORY = 0.25  # rows for points that were lost, as a share of max_keypoints
NODES = (8, 12)  # rows and columns of the grid on which the motion is interpolated
MOTION_SCALE = 4.0  # pixels; matches that differ more from their surroundings count for little
MOTION_ROUNDS = 2  # of reweighted means
NEAR = 2.0  # pixels; two points closer than this are the same

# What a point must have to be kept where the registration found it.
LEAST_CORRELATION = 0.4  # with its stored window
MOST_SIGMA = 0.25  # standard deviation of the position, pixels
LEAST_SIMILARITY = 0.4  # cosine of the descriptors
MOST_OFF = 3.0  # distance from where it was expected, pixels
SCALES = 1.3  # most that the scale may differ from the expected one, as a factor

RIGHT_CORRELATION = 0.55  # of the quarters of the windows, for a known point in the right image

RIGHT_SHARE = 0.25  # most points that are found in the right image alone, as a share of K

# What it takes to move a detection to where the registration puts it.
REFINE_CORRELATION, REFINE_LIMIT = 0.6, 1.5
# Correlation above which the stored window stays, so that errors do not add up from frame to frame.
KEEP_CORRELATION = 0.95


class Known(NamedTuple):
    """Points of earlier frames, R rows, the most trusted first.

    `rows` (R, 8): position in the left image when last seen, position expected now, offset from
    there to the expected position in the right image, expected scale of the stored window, and 0
    for an empty row, 1 for a point, 2 for a point with a position in the right image. `descriptors`
    (R, D); `stored` (R, PATCH_SIDE, PATCH_SIDE) from `stored_windows`.
    """

    rows: Tensor
    descriptors: Tensor
    stored: Tensor

    @property
    def expected(self) -> Tensor:
        """Expected positions in the left image (R, 2)."""
        return self.rows[:, 2:4]

    @property
    def valid(self) -> Tensor:
        """Which rows are points, (R,) bool."""
        return self.rows[:, 7] > 0


class Keypoints(NamedTuple):
    """Keypoints of an image, K rows: positions (K, 2) in pixels, scores (K,), 0 for an empty row,
    and unit descriptors (K, D)."""

    xy: Tensor
    scores: Tensor
    descriptors: Tensor


class Found(NamedTuple):
    """Known points in the new left image, R rows.

    `xy` (R, 2) pixels; `here` (R,) bool, whether the point was found; `detection` (R,) its
    detection or -1; `kept` (R,) bool, whether its stored window stays; `scale` (R,) of that;
    `descriptors` (R, D) at `xy`; `expected` (R, 2), where the point was looked for.
    """

    xy: Tensor
    here: Tensor
    detection: Tensor
    kept: Tensor
    scale: Tensor
    descriptors: Tensor
    expected: Tensor


def known_rows(count: int) -> int:
    """R, the rows of `Known`, for K keypoints."""
    return count + int(MEMORY * count)


def interpolated_motion(xy: Tensor, motion: Tensor, seen: Tensor, size: tuple[int, int]) -> Tensor:
    """Motion (R, 2) at all positions from that of some, smooth over the image.

    Robust means on a coarse grid, by iteratively reweighted least squares with Cauchy weights, and
    bilinear between its nodes. A node with no motion near takes the mean of all.

    Args:
        xy: (R, 2) pixels.
        motion: (R, 2) pixels.
        seen: (R,) bool, where the motion is known.
    """
    scales = [(n - 1) / max(length - 1, 1) for n, length in zip(NODES, size, strict=True)]
    hats = []
    for i, (count, scale) in enumerate(zip(NODES, scales, strict=True)):
        place = (xy[:, 1 - i] * scale).clamp(0, count - 1)
        node = torch.arange(count, device=xy.device, dtype=xy.dtype)
        hats.append((1 - (place - node[:, None]).abs()).clamp(min=0))
    weights = (hats[0][:, None] * hats[1]).flatten(0, 1)  # (nodes, R)
    ways = [torch.where(seen, way, 0.0) for way in motion.unbind(-1)]
    trust = seen.to(xy.dtype)
    # No matrix products: engines may run those in half precision.
    for _ in range(MOTION_ROUNDS):
        near = weights * trust
        amount, total = trust.sum().clamp(min=1e-6), near.sum(1) + 0.1
        smooth = []
        for way in ways:
            everywhere = (trust * way).sum() / amount
            nodes = ((near * way).sum(1) + 0.1 * everywhere) / total
            smooth.append((weights * nodes[:, None]).sum(0))
        off = (ways[0] - smooth[0]).square() + (ways[1] - smooth[1]).square()
        trust = torch.where(seen, 1 / (1 + off / MOTION_SCALE**2), 0.0)
    return torch.stack(smooth, -1)


def heat_score(heat: Tensor, xy: Tensor) -> Tensor:
    """Score (K,) of any positions (K, 2), as `detection.keypoints` has it: the heat (H, W) of the
    3x3 pixels around. It is above 0, for these rows are keypoints."""
    return windows(heat, xy, 1, rows=1).sum((1, 2)).clamp(1e-6, 1.0)


def apart(xy: Tensor, others: Tensor) -> Tensor:
    """The larger of the distances along x and y of positions (N, 2) and (M, 2), (N, M)."""
    (x, y), (other_x, other_y) = xy.unbind(-1), others.unbind(-1)
    return torch.maximum((x[:, None] - other_x).abs(), (y[:, None] - other_y).abs())


def inside_border(xy: Tensor, size: tuple[int, int], border: int) -> Tensor:
    """Which positions (N, 2) lie in an image of a height and width, away from its edges, (N,)."""
    (x, y), (height, width) = xy.unbind(-1), size
    across = (x >= border) & (x <= width - 1 - border)
    return across & (y >= border) & (y <= height - 1 - border)


def find_known(
    image: Tensor,
    describe: Callable[[Tensor], Tensor],
    detections: Keypoints,
    known: Known,
    limits: Tensor,
    border: int,
    compared: Callable[[Tensor], Tensor],
) -> Found:
    """Find known points in a new image.

    Args:
        image: (H, W) float.
        describe: unit descriptors (N, D) of positions (N, 2) in it.
        detections: keypoints of the image.
        limits: (2,) of `match_temporal`, from the expected position.
        border: pixels along the edges in which nothing is found.
        compared: what is compared of descriptors (N, D), by which points are matched.
    """
    xy, scores, descriptors = detections
    size = (image.shape[0], image.shape[1])
    match = match_temporal(
        *(known.expected, known.valid, compared(known.descriptors)),
        *(xy, scores > 0, compared(descriptors), limits),
    )
    matched = match >= 0
    at_detection = xy[match.clamp(min=0)]
    motion = interpolated_motion(known.expected, at_detection - known.expected, matched, size)
    start = torch.where(matched[:, None], at_detection, known.expected + motion)
    expected_scale = known.rows[:, 6]
    found = register(image, known.stored, start, expected_scale)
    off = (found.xy - start).square().sum(1).sqrt()
    change = found.scale / expected_scale
    sound = known.valid & (change < SCALES) & (change * SCALES > 1)
    refined = matched & sound & (off <= REFINE_LIMIT) & (found.correlation >= REFINE_CORRELATION)
    place = torch.where((matched & ~refined)[:, None], start, found.xy)
    here_descriptors = describe(place)
    inside = inside_border(place, size, border)
    alike = (here_descriptors * known.descriptors).sum(1) >= LEAST_SIMILARITY
    again = ~matched & sound & inside & alike & (off <= MOST_OFF)
    again = again & (found.correlation >= LEAST_CORRELATION) & (found.sigma <= MOST_SIGMA)
    # Of two known points at one place the matched one stays, else the more trusted one.
    rank = torch.arange(len(place), device=place.device, dtype=place.dtype)
    order = torch.where(matched, -1.0, torch.where(again, rank, FAR))
    strongest = torch.where(apart(place, place) < NEAR, order, FAR).amin(1)
    again = again & (strongest >= rank)
    kept = (refined | again) & (found.correlation >= KEEP_CORRELATION)
    return Found(place, matched | again, match, kept, found.scale, here_descriptors, start)


def merge(
    found: Found, heat: Tensor, detections: Keypoints, share: Tensor
) -> tuple[Keypoints, Tensor]:
    """The K keypoints of an image: known points, and detections that are none of them.

    Known points come first until they make up `share` of K, then detections, then the other known
    points.

    Args:
        heat: (H, W) of the image.

    Returns:
        Keypoints, scores in falling order, and the known row of each, -1 for a new detection.
    """
    xy, scores, descriptors = detections
    count = len(xy)
    matched, detection = found.detection >= 0, found.detection.clamp(min=0)
    anchor = torch.where(matched[:, None], xy[detection], found.xy)
    anchor = torch.where(found.here[:, None], anchor, FAR)
    fresh = scores * (apart(anchor, xy).amin(0) >= NEAR)
    own = torch.where(matched, scores[detection], heat_score(heat, found.xy)) * found.here
    first = found.here.to(xy.dtype).cumsum(0) <= share * count
    turn = torch.cat([torch.where(first, 2, 0), torch.ones_like(fresh, dtype=torch.long)])
    candidates = Keypoints(
        torch.cat([found.xy, xy]),
        torch.cat([own, fresh]),
        torch.cat([found.descriptors, descriptors]),
    )
    chosen = _strongest(candidates.scores, turn, count)
    merged = Keypoints(*(array[chosen] for array in candidates))
    known = (chosen < len(found.xy)) & (merged.scores > 0)
    return merged, torch.where(known, chosen, -1)


def kept_windows(found: Found, known: Known, row: Tensor, windows: Tensor) -> tuple[Tensor, Tensor]:
    """The windows by which keypoints are found again, (K, PATCH_SIDE, PATCH_SIDE), and their scale
    in this image, (K,): the stored ones where they stay, else those of this image.

    Args:
        row: (K,) the known row of each keypoint or -1.
        windows: of the keypoints in this image.
    """
    known_row = row.clamp(min=0)
    kept = (row >= 0) & found.kept[known_row]
    stored = torch.where(kept[:, None, None], known.stored[known_row], windows)
    return stored, torch.where(kept, found.scale[known_row], 1.0)


def expected_right(known: Known, row: Tensor, left_xy: Tensor) -> tuple[Tensor, Tensor]:
    """Which left keypoints have an expected position in the right image, (K,), and that, (K, 2).

    Args:
        row: (K,) the known row of each or -1.
        left_xy: (K, 2) pixels.
    """
    rows = known.rows[row.clamp(min=0)]
    return (row >= 0) & (rows[:, 7] > 1), left_xy + rows[:, 4:6]


def first_rows(chosen: Tensor, count: int) -> Tensor:
    """Numbers (count,) of the first rows of `chosen` (K,) bool; then come others."""
    number = torch.arange(len(chosen), device=chosen.device, dtype=torch.float32)
    return torch.where(chosen, len(chosen) - number, -number).topk(count).indices


def merge_right(
    found: Keypoints, left_row: Tensor, detections: Keypoints, right_row: Tensor
) -> tuple[Keypoints, Tensor]:
    """The K keypoints of the right image: detections, and matches that were found without one.

    What is found where a matched detection lies is dropped. Other detections near what is found
    are the same point and dropped. Matches come first, so that none is lost.

    Args:
        found: right keypoints (M rows) of left rows without a match, score 0 where there is none.
        left_row: (M,) their left rows.
        detections: keypoints of the right image.
        right_row: (K,) the detection of each left row or -1.

    Returns:
        Keypoints, scores in falling order, and the right row of each left row or -1.
    """
    count, more = len(right_row), len(left_row)
    matched = right_row >= 0
    # Rows without a match mark an extra element.
    mark = torch.where(matched, right_row, count)
    taken = torch.zeros(count + 1, device=mark.device, dtype=found.xy.dtype)
    taken = taken.scatter(0, mark, 1.0)[:count]
    distance = apart(torch.where((found.scores > 0)[:, None], found.xy, FAR), detections.xy)
    clash = torch.where(taken > 0, distance, FAR).amin(1) < NEAR
    own = torch.where(clash, 0.0, found.scores)
    nearest = torch.where((own > 0)[:, None], distance, FAR).amin(0)
    fresh = torch.where((nearest < NEAR) & (taken == 0), 0.0, detections.scores)
    candidates = Keypoints(
        torch.cat([found.xy, detections.xy]),
        torch.cat([own, fresh]),
        torch.cat([found.descriptors, detections.descriptors]),
    )
    turn = torch.cat([torch.ones_like(left_row), taken.long()])
    chosen = _strongest(candidates.scores, turn, count)
    rows = torch.arange(count, device=chosen.device)
    place = torch.zeros_like(turn).scatter(0, chosen, rows)  # of each candidate
    row = torch.where(matched, place[right_row + more], -1)
    row = row.scatter(0, left_row, torch.where(own > 0, place[:more], row[left_row]))
    return Keypoints(*(array[chosen] for array in candidates)), row


def _strongest(scores: Tensor, turn: Tensor, count: int) -> Tensor:
    """Rows (count,) of the valid candidates (N,) with the highest `turn`, the first before the
    others; in falling order of their scores."""
    total = len(scores)
    number = torch.arange(total, device=scores.device)
    # Whole numbers, so that none are equal and the order is the same on every engine.
    place = torch.where(scores > 0, (turn + 1) * total - number, -number).to(scores.dtype)
    chosen = place.topk(count).indices
    return chosen[scores[chosen].topk(count).indices]
