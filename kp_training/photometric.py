"""Lighting, motion blur, sensor noise and compression of training views, on the training device."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from kp_training.config import ViewConfig

NOISE = 6  # uniform numbers that define the lighting of a view
# Columns of the disturbances of a view, and their values without a disturbance.
GAIN, BLUR, ANGLE, SIGMA, SHOT, QUALITY = range(6)
UNDISTURBED = (1.0, 0.0, 0.0, 0.0, 0.0, 100.0)
BOTH, ONE = 0.5, 0.25  # shares of disturbances of both views, and of either one alone
BLUR_SIDE = 15  # of the kernel of the motion blur, pixels
# Annex K of the JPEG standard (ITU-T T.81): steps of the luminance coefficients at quality 50.
JPEG_STEPS = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)


def photometric(image: Tensor, noise: Tensor, kind: str = "camera") -> Tensor:
    """Apply random lighting and sensor effects, as between two cameras of a rig.

    Args:
        image: (B, 1, H, W) in 0..255.
        noise: (B, NOISE) uniform numbers that define every change, except the pixels of the sensor
            noise.
        kind: `jitter` changes only contrast and brightness. `camera` adds gamma, a brightness
            gradient, blur and noise.

    Returns:
        (B, 1, H, W) float, rounded like an 8-bit image.
    """
    u = (noise * 2 - 1)[:, :, None, None, None]
    x = (image / 255).clamp(0, 1)
    if kind != "jitter":
        x = x ** torch.exp(0.5 * u[:, 0])
    x = (x - 0.5) * torch.exp(0.3 * u[:, 1]) + 0.5 + 0.1 * u[:, 2]
    if kind == "jitter":
        return (x * 255).round().clamp(0, 255)
    across = torch.linspace(-1, 1, image.shape[3], device=image.device)
    x = x * (1 + 0.3 * u[:, 3] * across)
    kernel = torch.tensor([1.0, 2.0, 1.0], device=image.device)
    kernel = (kernel[:, None] * kernel / 16)[None, None]
    blurred = F.conv2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), kernel)
    x = torch.where(u[:, 4] > 0, x, torch.lerp(x, blurred, -u[:, 4]))
    x = x + torch.randn_like(x) * 0.02 * noise[:, 5, None, None, None] ** 2
    return (x * 255).round().clamp(0, 255)


def draw_disturbances(config: ViewConfig, rng: np.random.Generator) -> np.ndarray:
    """Disturbances of both views of a sample, (2, 6) float32, in the columns named above.

    Each of the four kinds occurs in a share `disturbed` of the samples: in both views alike or in
    one of them.
    """
    found = np.tile(np.array(UNDISTURBED, np.float32), (2, 1))
    log_gain = np.log(config.exposure)
    kinds = (
        ((GAIN,), lambda: np.exp(rng.uniform(*log_gain))),
        ((BLUR, ANGLE), lambda: (rng.uniform(2.0, config.motion_blur), rng.uniform(0, np.pi))),
        ((SIGMA, SHOT), lambda: (rng.uniform(0.0, config.sensor_noise), rng.random())),
        ((QUALITY,), lambda: rng.uniform(config.jpeg_quality, 80.0)),
    )
    for columns, draw in kinds:
        values, occurs, which = draw(), rng.random(), rng.random()
        views = [0, 1] if which < BOTH else [0] if which < BOTH + ONE else [1]
        if occurs < config.disturbed:
            found[np.ix_(views, columns)] = values
    return found


def disturb(image: Tensor, disturbances: Tensor) -> Tensor:
    """Disturb views as a moving camera in bad light does: blur, gain, noise, JPEG, in this order.

    Args:
        image: (B, 1, H, W) in 0..255, H and W multiples of 8.
        disturbances: (B, 6), see `draw_disturbances`. The noise is that of the image before the
            gain, so that dark images keep their ratio of signal to noise.

    Returns:
        (B, 1, H, W) float, rounded like an 8-bit image.
    """
    gain, blur, angle, sigma, shot, quality = disturbances.T[..., None, None, None]
    image = torch.where(blur > 0, motion_blurred(image, blur, angle), image)
    # Shot noise grows with the light, read noise does not; at medium grey both add up to sigma.
    spread = sigma * (1 - shot + shot * image / 127.5).clamp(min=0).sqrt()
    image = image + spread * torch.randn_like(image)
    image = (image * gain).round().clamp(0, 255)
    return torch.where(quality < 100, compressed(image, quality), image)


def motion_blurred(image: Tensor, length: Tensor, angle: Tensor) -> Tensor:
    """Blur images (B, 1, H, W) along a line, (B, 1, 1, 1) pixels and radians each."""
    half = BLUR_SIDE // 2
    steps = torch.arange(-half, half + 1, device=image.device, dtype=image.dtype)
    along = steps * torch.cos(angle) + steps[:, None] * torch.sin(angle)
    beside = steps[:, None] * torch.cos(angle) - steps * torch.sin(angle)
    # A line of this length, one pixel wide, with soft edges.
    kernel = (length / 2 + 0.5 - along.abs()).clamp(0, 1) * (1 - beside.abs()).clamp(min=0)
    kernel = kernel / kernel.sum((2, 3), keepdim=True)
    padded = F.pad(image, (half, half, half, half), mode="replicate")
    return F.conv2d(padded.transpose(0, 1), kernel, groups=len(image)).transpose(0, 1)


def compressed(image: Tensor, quality: Tensor) -> Tensor:
    """Quantise images (B, 1, H, W) in 0..255 like JPEG of a quality (B, 1, 1, 1) in 1..100.

    H and W are multiples of 8.
    """
    n = torch.arange(8, device=image.device, dtype=image.dtype)
    dct = torch.cos(math.pi / 8 * (n + 0.5) * n[:, None]) / 2
    dct[0] /= math.sqrt(2)
    basis = torch.einsum("iy,jx->ijyx", dct, dct).reshape(64, 1, 8, 8)
    scale = torch.where(quality < 50, 5000 / quality, 200 - 2 * quality)
    steps = torch.tensor(JPEG_STEPS, device=image.device, dtype=image.dtype).reshape(1, 64, 1, 1)
    steps = ((steps * scale + 50) / 100).floor().clamp(1, 255)
    blocks = F.conv2d(image - 128, basis, stride=8)
    restored = F.conv_transpose2d((blocks / steps).round() * steps, basis, stride=8)
    return (restored + 128).round().clamp(0, 255)
