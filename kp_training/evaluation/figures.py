"""Figures of the reports: those of the reference study, curves and bars."""

from __future__ import annotations

from collections.abc import Mapping

import cv2
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.spatial import cKDTree
from scipy.stats import norm

from kp_training.classics import classic_keypoints
from kp_training.evaluation.metrics import (
    DISPARITY_TOLERANCE,
    REPEAT_TOLERANCE,
    Value,
    at_pixels,
    is_correct,
    match_errors,
)
from kp_training.evaluation.scenes import Scene, left_view
from kp_training.evaluation.trust import Trust, reliability

GOOD, BAD, OTHER, UNKNOWN = "#1a9850", "#d73027", "#2b7bba", "#9aa5b1"
LINES = 100  # number of matches drawn in one picture, so that each is visible
COLOURS = ("#0b62a4", "#e07b00", "#1a9850", "#b3408f", "#7a6a53", "#00958f", "#c0392b", "#5b5bd6")


def image_figure(image: np.ndarray, title: str = "", width: float = 7.5) -> tuple[Figure, Axes]:
    """A figure with a grey image."""
    height = width * image.shape[0] / image.shape[1]
    figure = Figure(figsize=(width, height + (0.3 if title else 0)), layout="constrained")
    axes = figure.subplots()
    axes.imshow(image, cmap="gray", vmin=0, vmax=255)
    axes.set_axis_off()
    if title:
        axes.set_title(title, fontsize=11)
    return figure, axes


def heatmap_figure(image: np.ndarray, heat: np.ndarray) -> Figure:
    """The predicted keypoint heatmap next to the image.

    It is shown as its fourth root, because peaks are near 1 and most of the map is near 0.
    """
    height, width = image.shape
    figure = Figure(figsize=(11, 5.5 * height / width + 0.3), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.imshow(image, cmap="gray", vmin=0, vmax=255)
    left.set_title("image", fontsize=11)
    # Dilate the peaks, because scaling the picture down would lose them.
    peaks = cv2.dilate(heat, np.ones((3, 3)))
    drawn = right.imshow(peaks**0.25, cmap="magma", vmin=0, vmax=1)
    right.set_title("keypoint probability", fontsize=11)
    bar = figure.colorbar(drawn, ax=right, shrink=0.8, ticks=[p**0.25 for p in (0, 0.01, 0.1, 1)])
    bar.ax.set_yticklabels(["0", "0.01", "0.1", "1"])
    for axes in (left, right):
        axes.set_axis_off()
    return figure


def labels_figure(image: np.ndarray, predicted: np.ndarray) -> tuple[Figure, str]:
    """Predicted keypoints and as many SIFT labels; returns the figure and its caption."""
    labels = classic_keypoints(image, len(predicted))[:, :2]
    if not len(labels) or not len(predicted):
        return image_figure(image, "nothing to compare")[0], "There are no keypoints or no labels."
    to_label, _ = cKDTree(labels).query(predicted)
    to_predicted, _ = cKDTree(predicted).query(labels)
    hit, found = to_label <= REPEAT_TOLERANCE, to_predicted <= REPEAT_TOLERANCE
    figure, axes = image_figure(image)
    for xy, colour, marker, words in (
        (labels[~found], OTHER, "x", "label, not predicted"),
        (predicted[~hit], "#ff9f1c", "+", "predicted, no label"),
        (predicted[hit], "#3ddc70", "o", "predicted and label"),
    ):
        axes.scatter(
            xy[:, 0], xy[:, 1], s=14, marker=marker, linewidths=0.8, label=f"{words}: {len(xy)}",
            edgecolors=colour if marker == "o" else None,
            facecolors="none" if marker == "o" else colour,
        )  # fmt: skip
    legend(axes)
    return figure, (
        f"{hit.mean():.0%} of the {len(predicted)} predicted keypoints have one of the "
        f"{len(labels)} strongest SIFT labels within {REPEAT_TOLERANCE:g} px; {found.mean():.0%} "
        "of the labels have a prediction."
    )


def positives_figure(scene: Scene, left: np.ndarray, right: np.ndarray) -> tuple[Figure, str]:
    """Left keypoints that are or are not found in the right image, by ground truth."""
    view = left_view(scene)
    place = left + np.column_stack([at_pixels(view.shift, left), np.zeros(len(left))])
    seen = at_pixels(view.visible, left)
    figure, axes = image_figure(scene.left)
    if not len(right) or not seen.any():
        return figure, "No keypoint has ground truth."
    apart, _ = cKDTree(right).query(place[seen])
    again = apart <= REPEAT_TOLERANCE
    for xy, colour, words in (
        (left[~seen], UNKNOWN, "no ground truth or occluded"),
        (left[seen][~again], "#ff5a4f", "false positive"),
        (left[seen][again], "#3ddc70", "true positive"),
    ):
        axes.scatter(xy[:, 0], xy[:, 1], s=12, facecolors="none", edgecolors=colour, linewidths=0.9,
                     label=f"{words}: {len(xy)}")  # fmt: skip
    legend(axes)
    return figure, (
        f"True positive: the right image has a keypoint within {REPEAT_TOLERANCE:g} px of the true "
        f"position ({again.mean():.0%} of the keypoints visible in the right image). Grey: no "
        "ground truth, or occluded in the right image."
    )


def similarity_figure(
    scene: Scene, left: np.ndarray, left_descriptors: np.ndarray, dense: np.ndarray
) -> tuple[Figure, str]:
    """Cosine similarity of one left descriptor to the whole right image.

    The keypoint is the strongest one that is visible in the right image.

    Args:
        dense: (D, h, w) unit descriptors of the right image's 8x8 cells.
    """
    seen = np.flatnonzero(at_pixels(left_view(scene).visible, left))
    if not len(seen):
        return image_figure(scene.left)[0], "No keypoint is visible in both images."
    chosen = seen[0]
    xy = left[chosen]
    true_x = xy[0] - at_pixels(scene.disparity, xy[None])[0]
    height, width = scene.right.shape
    cells = np.tensordot(left_descriptors[chosen], dense, 1)
    map_height, map_width = 8 * cells.shape[0], 8 * cells.shape[1]
    similarity = cv2.resize(np.float32(cells), (map_width, map_height))[:height, :width]
    figure = Figure(figsize=(11, 5.5 * height / width + 0.3), layout="constrained")
    axes, other = figure.subplots(1, 2)
    axes.imshow(scene.left, cmap="gray", vmin=0, vmax=255)
    axes.plot(*xy, "o", ms=11, mfc="none", mec="#3ddc70", mew=2)
    axes.set_title("keypoint in the left image", fontsize=11)
    drawn = other.imshow(similarity, cmap="viridis", vmin=min(0, similarity.min()), vmax=1)
    other.plot(true_x, xy[1], "o", ms=13, mfc="none", mec="#ff5a4f", mew=2, label="true position")
    best = np.unravel_index(similarity.argmax(), similarity.shape)
    other.plot(best[1], best[0], "+", ms=12, color="#ff2fd0", mew=2, label="most similar")
    other.set_title("cosine similarity in the right image", fontsize=11)
    figure.colorbar(drawn, ax=other, shrink=0.8)
    legend(other)
    for a in (axes, other):
        a.set_axis_off()
    off = np.hypot(best[1] - true_x, best[0] - xy[1])
    return figure, (
        f"The most similar position is {off:.0f} px from the true one (the descriptor map has one "
        "value per 8x8 pixels and is interpolated between them)."
    )


def matches_figure(
    image: np.ndarray,
    other: np.ndarray,
    left: np.ndarray,
    right: np.ndarray,
    correct: np.ndarray,
    title: str,
) -> Figure:
    """Draw matches between the images, correct ones in green and wrong ones in red.

    Args:
        image, other: grey uint8.
        left, right: (M, 2) positions in them.
        correct: (M,) 1 correct, 0 wrong, NaN without ground truth.
    """
    gap = 12
    width = image.shape[1]
    height = max(len(image), len(other))
    both = np.full((height, width + gap + other.shape[1]), 255, np.uint8)
    both[: len(image), :width], both[: len(other), width + gap :] = image, other
    known = np.isfinite(correct)
    counts = f"{int((correct == 1).sum())} correct, {int((correct == 0).sum())} wrong"
    figure, axes = image_figure(both, f"{title}: {counts}, {int((~known).sum())} unknown", 12.0)
    step = max(1, len(left) // LINES)
    for kind, colour, above in (
        (~known, UNKNOWN, 1),
        (correct == 1, GOOD, 2),
        (correct == 0, BAD, 3),
    ):
        rows = np.flatnonzero(kind)[::step]
        x = np.stack([left[rows, 0], right[rows, 0] + width + gap])
        y = np.stack([left[rows, 1], right[rows, 1]])
        axes.plot(x, y, "-", color=colour, lw=0.8, alpha=0.85, zorder=above)
        axes.plot(x, y, "o", color=colour, ms=2, zorder=above)
    axes.set_xlim(0, both.shape[1])
    axes.set_ylim(height, 0)
    return figure


def judged(scene: Scene, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """The argument `correct` of `matches_figure` for the matches of a scene."""
    rows_apart, error = match_errors(scene.disparity, left, right)
    return np.where(np.isfinite(error), is_correct(rows_apart, error), np.nan)


def curves_figure(curves: Mapping[str, Mapping[int, Mapping[str, Value]]]) -> Figure:
    """Accuracy and number of correct matches over the number of keypoints."""
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    axes = figure.subplots(1, 2)
    for name, colour in zip(curves, _cycle(len(curves)), strict=True):
        counts = list(curves[name])
        for a, metric in zip(axes, ("disparity_accuracy", "correct_matches"), strict=True):
            values = [curves[name][n][metric] for n in counts]
            a.plot(counts, values, "o-", color=colour, label=name, lw=1.8, ms=4)
    for a, title in zip(axes, ("disparity accuracy", "correct matches"), strict=True):
        a.set_xscale("log", base=2)
        a.set_xticks(counts, [str(n) for n in counts])
        a.set_xlabel("maximum keypoints per image")
        a.set_title(title, fontsize=11)
        plain(a)
    axes[1].set_ylim(bottom=0)
    axes[0].legend(frameon=False, fontsize=9)
    return figure


def errors_figure(
    errors: Mapping[str, np.ndarray], stereo_errors: Mapping[str, np.ndarray]
) -> Figure:
    """Histograms of signed disparity errors, as shares of the matches with ground truth."""
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    bins = np.arange(-DISPARITY_TOLERANCE, DISPARITY_TOLERANCE + 0.01, 0.1)
    kinds = ((errors, "keypoints' own positions"), (stereo_errors, "refined, within limits"))
    for a, (found, title) in zip(axes, kinds, strict=True):
        for (name, values), colour in zip(found.items(), _cycle(len(found)), strict=True):
            heights, _ = np.histogram(values, bins)
            a.stairs(heights / max(len(values), 1), bins, color=colour, label=name, lw=1.5)
        a.set_title(title, fontsize=11)
        a.set_xlabel("disparity error, px")
        plain(a)
    axes[0].set_ylabel("share of matches")
    axes[1].legend(frameon=False, fontsize=9)
    return figure


def trust_figure(trust: Mapping[str, Trust]) -> Figure:
    """Reliability diagram of the confidence, and the errors over their standard deviations."""
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot((0, 1), (0, 1), color=UNKNOWN, lw=1)
    bins = np.linspace(-5, 5, 51)
    for (name, of_method), colour in zip(trust.items(), _cycle(len(trust)), strict=True):
        if len(of_method.error) and np.isfinite(of_method.confidence).all():
            _, confidence, share = reliability(of_method.confidence, of_method.right).T
            left.plot(confidence, share, "o-", color=colour, label=name, lw=1.5, ms=4)
        ratios = of_method.ratios
        if len(ratios):
            heights, _ = np.histogram(ratios, bins)
            density = heights / (len(ratios) * np.diff(bins))
            right.stairs(density, bins, color=colour, label=name, lw=1.5)
    right.plot(bins, norm.pdf(bins), color="black", lw=1, ls="--", label="unit normal")
    left.set_xlabel("confidence")
    left.set_ylabel("share of right matches")
    right.set_xlabel("disparity error / sigma")
    right.set_ylabel("density")
    for axes, title in ((left, "reliability of the confidence"), (right, "errors over sigma")):
        axes.set_title(title, fontsize=11)
        plain(axes)
    right.legend(frameon=False, fontsize=9)
    return figure


def bars_figure(values: Mapping[str, Mapping[str, float | None]], title: str) -> Figure:
    """Groups of bars, with one bar per method in each group."""
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    axes = figure.subplots()
    groups = list(next(iter(values.values())))
    width = 0.8 / len(values)
    for i, (name, colour) in enumerate(zip(values, _cycle(len(values)), strict=True)):
        x = np.arange(len(groups)) + (i - (len(values) - 1) / 2) * width
        axes.bar(x, [values[name][g] or 0 for g in groups], width, color=colour, label=name)
    axes.set_xticks(range(len(groups)), groups)
    axes.set_ylim(0, 1)
    axes.set_title(title, fontsize=11)
    axes.legend(frameon=False, fontsize=9, ncols=len(values), loc="upper left")
    plain(axes)
    return figure


def legend(axes: Axes) -> None:
    """A legend below the image, readable for any image."""
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.01), ncols=3, frameon=False, fontsize=9)


def plain(axes: Axes) -> None:
    """A light grid without a box."""
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _cycle(count: int) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(count)]
