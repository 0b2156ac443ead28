"""Renders the two views of a training sample on the training device: pixels, points, lighting."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from kp_training.config import TrainConfig
from kp_training.photometric import disturb, photometric

FRONT_GRIDS = (5, 8, 16)  # cells along a side of the random map that shapes front layers
FRONT_ABOVE = 0.6  # threshold on that map (0..1): the layer is where it is higher
FRONT_SHARPNESS = 80.0  # slope of its outline, about a pixel wide
FRONT_FLAT = 0.2  # share of the layers with a single grey level
FRONT_NEARER = (2.0, 40.0)  # disparity of the layer above the nearest relief behind it, pixels
OUTLINE = 3  # pixels on both sides of a front layer's outline without labels


def native_bf16(device: str) -> bool:
    """Whether the training device supports bf16 natively, so that it is faster than fp32."""
    if device.startswith("cuda"):
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device == "cpu" and bool(torch.cpu.get_capabilities().get("avx512_bf16"))


def displacement(relief: Tensor, blocky: Tensor, height: int, width: int) -> Tensor:
    """Displacement along the row at each pixel of a view, (B, H, W), from coarse maps (B, h, w).

    A smooth map is a slanted surface, a blocky one has depth edges with half-occlusions.

    Args:
        blocky: (B,) bool, which maps have steps.
    """
    smooth = F.interpolate(relief[:, None], (height, width), mode="bicubic", align_corners=True)
    steps = F.interpolate(relief[:, None], (height, width), mode="nearest")
    return torch.where(blocky[:, None, None, None], steps, smooth)[:, 0]


def sample(maps: Tensor, points: Tensor, outside: str = "zeros") -> Tensor:
    """Sample maps (B, C, H, W) bilinearly at pixels (B, N, 2); returns (B, C, N).

    Values outside the map are 0, or those of the nearest pixel if `outside` is `border`.
    """
    size = maps.new_tensor([maps.shape[3], maps.shape[2]])
    grid = (points + 0.5) / size * 2 - 1
    return F.grid_sample(maps, grid[:, None], "bilinear", outside, align_corners=False)[:, :, 0]


def transform(homography: Tensor, points: Tensor) -> Tensor:
    """Apply homographies (B, 3, 3) to points (B, N, 2)."""
    moved = F.pad(points, (0, 1), value=1.0) @ homography.transpose(1, 2)
    return moved[..., :2] / moved[..., 2:].clamp(min=1e-6)


def warp_image(canvas: Tensor, to_view: Tensor, shift: Tensor) -> Tensor:
    """Render a view (B, 1, H, W) of canvases (B, 1, C, C) in 0..255.

    A pixel p of the view shows the canvas at to_view^-1 (p + (shift(p), 0)).
    """
    batch, height, width = shift.shape
    y, x = torch.meshgrid(
        torch.arange(height, device=shift.device, dtype=shift.dtype),
        torch.arange(width, device=shift.device, dtype=shift.dtype),
        indexing="ij",
    )
    pixels = torch.stack([x + shift, y.expand_as(shift)], -1).reshape(batch, -1, 2)
    source = transform(torch.linalg.inv(to_view), pixels)
    return sample(canvas, source).reshape(batch, 1, height, width)


def warp_points(points: Tensor, to_view: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Positions of canvas points (B, N, 2) in a view, and whether they are visible, (B, N) bool.

    Solves p + (shift(p), 0) = to_view(point) for p by fixed-point iteration. Where it does not
    converge, the point is hidden behind a depth edge.
    """
    goal = transform(to_view, points.nan_to_num(-1e4))
    place = goal.clone()
    for _ in range(8):
        offset = sample(shift[:, None], place)[:, 0]
        place = torch.stack([goal[..., 0] - offset, goal[..., 1]], -1)
    residual = (place[..., 0] + sample(shift[:, None], place)[:, 0] - goal[..., 0]).abs()
    size = torch.tensor([shift.shape[2], shift.shape[1]], device=place.device)
    inside = ((place >= 0) & (place <= size - 1)).all(-1)
    return place, inside & (residual < 0.25)


@dataclass(frozen=True)
class Layer:
    """An image as seen in one view.

    - `canvas` (B, 1, C, C): in 0..255, with grey level `fill` (B, 1, 1, 1) beyond the image
    - `to_view` (B, 3, 3): homography from canvas to view
    - `shift` (B, H, W): displacement along the row
    - `clear` (B, 1, H, W): 1 where the layer is visible and no outline is near; None: everywhere
    """

    canvas: Tensor
    fill: Tensor
    to_view: Tensor
    shift: Tensor
    clear: Tensor | None = None

    def render(self) -> Tensor:
        """Render the view, (B, 1, H, W)."""
        return self.fill + warp_image(self.canvas - self.fill, self.to_view, self.shift)

    def place(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Positions of canvas points (B, N, 2) in the view, and whether they are visible, (B, N).

        Points that are NaN are not visible.
        """
        place, visible = warp_points(points, self.to_view, self.shift)
        if self.clear is not None:
            visible &= sample(self.clear, place)[:, 0] > 0.5
        return place, visible & ~points.isnan().any(-1)


def stereo_like(batch: dict[str, Tensor]) -> Tensor:
    """Which samples imitate a rectified stereo pair, (B,) bool; False for real pairs."""
    return (batch["relief"][:, 1] != 0).flatten(1).any(1)


def front_layers(
    batch: dict[str, Tensor], config: TrainConfig
) -> tuple[list[Layer], Tensor, Tensor]:
    """Another image of the batch in front of each sample, in both views.

    The layer is upright and nearer than the relief behind it. Without it, an image occludes itself
    only at the steps of its relief, and corners between an outline and an edge behind it look like
    any other keypoint. Some layers are flat, like walls and poles.

    Returns:
        The layer in both views; its mask on the canvas, (B, 1, C, C) in 0..1, which is 0 for
        samples without a layer (real pairs and homographies); its keypoints, (B, K, 4), NaN where
        unused.
    """
    canvas, fill = _canvases(batch, 0)
    relief, device, (count, _, size, _) = batch["relief"], canvas.device, canvas.shape
    canvas, fill = canvas.roll(1, 0), fill.roll(1, 0)
    flat = torch.rand(count, device=device) < FRONT_FLAT
    canvas = torch.where(flat[:, None, None, None], fill, canvas)
    keypoints = batch["keypoints"][:, 0].roll(1, 0).masked_fill(flat[:, None, None], torch.nan)
    grid = FRONT_GRIDS[int(torch.randint(len(FRONT_GRIDS), ()))]
    draw = torch.rand(count, grid, grid, device=device)
    cover = displacement(draw, batch["blocky"], size, size)[:, None]
    cover = ((cover - FRONT_ABOVE) * FRONT_SHARPNESS + 0.5).clamp(0, 1)
    used = stereo_like(batch) & (torch.rand(count, device=device) < config.views.front_share)
    low, high = FRONT_NEARER
    shift = relief.flatten(2).amax(2)
    shift[:, 1] += low + (high - low) * torch.rand(count, device=device)
    to_view = batch["to_view"][:, 0].roll(1, 0)
    views = (-1, config.views.height, config.views.width)
    layers = [Layer(canvas, fill, to_view, shift[:, v, None, None].expand(views)) for v in (0, 1)]
    return layers, cover * used[:, None, None, None], keypoints


def put_in_front(back: Layer, front: Layer, cover: Tensor) -> tuple[Tensor, list[Layer]]:
    """Compose a view of two layers, (B, 1, H, W); returns also both layers with their `clear` map.

    Args:
        cover: (B, 1, C, C), mask of the front layer on its canvas.
    """
    alpha = warp_image(cover, front.to_view, front.shift)
    image = torch.lerp(back.render(), front.render(), alpha)
    behind, ahead = (
        1 - F.max_pool2d(part, 2 * OUTLINE + 1, 1, OUTLINE) for part in (alpha, 1 - alpha)
    )
    return image, [replace(back, clear=behind), replace(front, clear=ahead)]


def make_views(batch: dict[str, Tensor], config: TrainConfig) -> dict[str, Tensor]:
    """Render both views of a batch, with everything the losses need.

    Returns:
        A dict:

        - `images` (2, B, 1, H, W)
        - `labels` (2, B, K, 2): positions of the labelled keypoints in each view
        - `sure` (2, B, K): weight of each label, 0 where it is not visible
        - `points` (2, B, M, 2): pixels of corresponding points in each view
        - `seen` (2, B, M) bool: which of them each view shows
        - `shift` (2, B, H, W): displacement along the row in each view, without front layers
        - `known` (2, B, H, W): 1 where the shift is known
    """
    keypoints = batch["keypoints"]
    size, count = batch["canvas"].shape[-1], keypoints.shape[2]
    # Descriptors are also trained away from keypoints: a quarter of the points are random.
    anywhere = torch.rand(len(keypoints), count // 4, 2, device=keypoints.device) * size
    candidates = [torch.cat([keypoints[:, 0, :, :2], anywhere], 1)]
    others = []  # keypoints of the front layer
    front = None
    if config.views.front_share:
        *front, of_front = front_layers(batch, config)
        others.append(of_front)
        candidates.append(of_front[..., :2])
    images, labels, sure, places, seen, shifts, knowns = [], [], [], [], [], [], []
    for view in range(2):
        image, layers = _render(batch, view, config, front)
        shift = layers[0].shift
        image = photometric(image, batch["noise"][:, view], config.views.photometric)
        if config.views.disturbed:
            image = disturb(image, batch["disturbances"][:, view])
        images.append(image)
        given = [keypoints[:, view], *others]
        place, visible = _place_all(layers, [rows[..., :2] for rows in given])
        repeat, response = torch.cat(given, 1)[..., 2:].unbind(-1)
        visible &= (repeat >= config.lowest_repeat) & (response >= config.lowest_response)
        labels.append(place)
        sure.append(visible.float())
        known = torch.ones_like(shift)
        if view == 1 and "real" in batch:  # real pair: use its measured disparity
            shift, known = _real_shift(batch, shift)
            layers[0] = replace(layers[0], shift=shift)
        place, visible = _place_all(layers, candidates)
        visible &= sample(known[:, None], place)[:, 0] > 0.99
        places.append(place)
        seen.append(visible)
        shifts.append(shift)
        knowns.append(known)
    # Points in both views come first, then those in one view, which serve as negatives.
    rank = torch.rand(seen[0].shape, device=keypoints.device) + seen[0].float() + seen[1]
    order = rank.topk(config.correspondences, 1)
    chosen = order.indices[..., None].expand(-1, -1, 2)
    return {
        "images": torch.stack(images),
        "labels": torch.stack(labels),
        "sure": torch.stack(sure),
        "points": torch.stack([place.gather(1, chosen) for place in places]),
        "seen": torch.stack([one.gather(1, order.indices) for one in seen]),
        "shift": torch.stack(shifts),
        "known": torch.stack(knowns),
    }


def _render(
    batch: dict[str, Tensor], view: int, config: TrainConfig, front: list | None
) -> tuple[Tensor, list[Layer]]:
    """Image (B, 1, H, W) of a view, and its layers from back to front.

    Args:
        front: front layers of both views and their cover, from `front_layers`; None without them.
    """
    size = config.views.height, config.views.width
    shift = displacement(batch["relief"][:, view], batch["blocky"], *size)
    back = Layer(*_canvases(batch, view), batch["to_view"][:, view], shift)
    if front is None:
        return back.render(), [back]
    fronts, cover = front
    return put_in_front(back, fronts[view], cover)


def _canvases(batch: dict[str, Tensor], view: int) -> tuple[Tensor, Tensor]:
    """The canvases of a view, (B, 1, C, C), and their fill level, (B, 1, 1, 1)."""
    return batch["canvas"][:, view, None].float(), batch["fill"][:, None, None, None]


def _place_all(layers: list[Layer], points: list[Tensor]) -> tuple[Tensor, Tensor]:
    """`Layer.place` of the points (B, N, 2) of each layer, concatenated over layers."""
    found = [layer.place(own) for layer, own in zip(layers, points, strict=True)]
    return torch.cat([place for place, _ in found], 1), torch.cat([seen for _, seen in found], 1)


def _real_shift(batch: dict[str, Tensor], shift: Tensor) -> tuple[Tensor, Tensor]:
    """Displacement in the right view, (B, H, W), and where it is known, (B, H, W), 0 or 1.

    Real pairs use their measured disparity.
    """
    to_view, (_, height, width) = batch["to_view"][:, 1], shift.shape
    scale, move = to_view[:, 0, 0], to_view[:, :2, 2]
    y, x = torch.meshgrid(
        *(torch.arange(n, device=shift.device, dtype=shift.dtype) for n in (height, width)),
        indexing="ij",
    )
    size = batch["disparity"].shape[-1]
    pixels = torch.stack([x, y], -1)[None] - move[:, None, None]
    grid = (pixels / scale[:, None, None, None] + 0.5) / size * 2 - 1
    true = F.grid_sample(batch["disparity"][:, None], grid, "nearest", align_corners=False)[:, 0]
    real = batch["real"][:, None, None]
    known = torch.where(real, (true > 0).to(shift.dtype), 1.0)
    return torch.where(real, true * scale[:, None, None], shift), known


def across_views(
    points: Tensor, view: int, batch: dict[str, Tensor], views: dict[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """Positions of points (B, N, 2) of one view in the other view, and whether they are visible.

    Args:
        view: 0 or 1, the view of the points.
        views: result of `make_views` for the batch.
    """
    shift, known = views["shift"], views["known"]
    offset = sample(shift[view][:, None], points)[:, 0]
    moved = torch.stack([points[..., 0] + offset, points[..., 1]], -1)
    source = transform(torch.linalg.inv(batch["to_view"][:, view]), moved)
    place, visible = warp_points(source, batch["to_view"][:, 1 - view], shift[1 - view])
    visible &= sample(known[view][:, None], points)[:, 0] > 0.99
    return place, visible & (sample(known[1 - view][:, None], place)[:, 0] > 0.99)
