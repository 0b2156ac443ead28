"""The two views of a training sample, made on the training device: pixels, points and light."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def native_bf16(device: str) -> bool:
    """Whether the training device multiplies bf16 natively, so that it is a gain."""
    return device != "cpu" or bool(torch.cpu.get_capabilities().get("avx512_bf16"))


def displacement(relief: Tensor, blocky: Tensor, height: int, width: int) -> Tensor:
    """Displacement along the row at each pixel of a view, (B, H, W), from coarse maps (B, h, w).

    Smooth maps are slanted surfaces, blocky ones have depth edges with half-occlusions.
    """
    smooth = F.interpolate(relief[:, None], (height, width), mode="bicubic", align_corners=True)
    steps = F.interpolate(relief[:, None], (height, width), mode="nearest")
    return torch.where(blocky[:, None, None, None], steps, smooth)[:, 0]


def sample(maps: Tensor, points: Tensor) -> Tensor:
    """Bilinear values (B, C, N) of maps (B, C, H, W) at pixels (B, N, 2); 0 outside."""
    size = maps.new_tensor([maps.shape[3], maps.shape[2]])
    grid = (points + 0.5) / size * 2 - 1
    return F.grid_sample(maps, grid[:, None], mode="bilinear", align_corners=False)[:, :, 0]


def transform(homography: Tensor, points: Tensor) -> Tensor:
    """Points (B, N, 2) under homographies (B, 3, 3)."""
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
    """Where canvas points (B, N, 2) are seen in a view, and whether they are, (B, N) bool.

    Solves p + (shift(p), 0) = to_view(point) for p by fixed-point iteration; where it does not
    converge the point is hidden behind a depth edge.
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


def photometric(image: Tensor, noise: Tensor) -> Tensor:
    """Light and sensor: gamma, contrast, brightness, a gradient of light, blur and noise.

    Args:
        image: (B, 1, H, W) in 0..255.
        noise: (B, 8) uniform numbers that fix every change but the sensor noise's pixels.

    Returns:
        (B, 1, H, W) float, rounded to what an 8-bit camera would give.
    """
    u = (noise * 2 - 1)[:, :, None, None, None]
    ramp = torch.linspace(-1, 1, image.shape[3], device=image.device)
    x = (image / 255).clamp(0, 1) ** torch.exp(0.5 * u[:, 0])
    x = (x - 0.5) * torch.exp(0.3 * u[:, 1]) + 0.5 + 0.1 * u[:, 2]
    x = x * (1 + 0.3 * u[:, 3] * ramp)
    kernel = torch.tensor([1.0, 2.0, 1.0], device=image.device)
    kernel = (kernel[:, None] * kernel / 16)[None, None]
    blurred = F.conv2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), kernel)
    x = torch.where(u[:, 4] > 0, x, torch.lerp(x, blurred, -u[:, 4]))
    x = x + torch.randn_like(x) * 0.02 * noise[:, 5, None, None, None] ** 2
    return (x * 255).round().clamp(0, 255)
