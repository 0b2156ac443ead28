"""The report of `kp evaluate bag`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import cv2
import numpy as np
from matplotlib.figure import Figure

from kp_frontend.features import StereoFeatures
from kp_training.evaluation.metrics import DISPARITY_TOLERANCE, at_pixels
from kp_training.evaluation.page import Page
from kp_training.evaluation.reasons import grouped
from kp_training.evaluation.results import command_line
from kp_training.evaluation.tracks import survival_figure

# Metric: what it means, and which end of it is good (None: neither).
MEANINGS: dict[str, tuple[str, str | None]] = {
    "stereo_accuracy": ("published matches with ground truth within 3 px of it", "max"),
    "stereo_correct_matches": ("number of those", "max"),
    "stereo_error_px": ("their median error", "min"),
    "sigma_ratio": ("their median error over its standard deviation; .674 if it is normal", None),
    "sigma_within_2": ("share of them within two standard deviations; .954 if normal", None),
    "confidence_auc": ("how well confidence tells right matches from wrong ones (AUC)", "max"),
    "confidence_error": ("expected calibration error of the confidence", "min"),
    "disparity_accuracy": ("unconstrained matches that are right by ground truth", "max"),
    "correct_matches": ("number of those", "max"),
    "disparity_error_px": ("their median error", "min"),
    "repeatability": ("left keypoints with a right one within 3 px of their true place", "max"),
    "repeatability_1px": ("the same within 1 px", "max"),
    "descriptor_map": ("mean average precision of nearest neighbours", "max"),
    "keypoints": ("in the left image", None),
    "stereo_matches": ("published", "max"),
    "matched_share": ("left keypoints with a published match", "max"),
    "total_matches": ("mutual nearest neighbours without epipolar help", "max"),
    "matching_accuracy": ("share of those on the same row within 2 px", "max"),
    "epipolar_error_px": ("median |y_l - y_r| of those", "min"),
    "epipolar_error_p90_px": ("90 % of them are within", "min"),
    "row_offset_px": ("median y_r - y_l: the rig's rows are off by it", None),
    "disparity_roughness_px": ("median distance of a disparity from its neighbours' median", "min"),
    "disparity_outliers": ("disparities off their neighbours by 3 px and 5 %", "min"),
    "keypoint_coverage": ("cells of a 16x12 grid with a keypoint", "max"),
    "match_coverage": ("cells with a published match", "max"),
    "track_survival": ("left keypoints that go on in the next pair", "max"),
    "match_survival": ("published matches that are matched again in the next pair", "max"),
    "temporal_repeatability": ("keypoints found again within 3 px of the flow", "max"),
    "temporal_repeatability_1px": ("the same within 1 px", "max"),
    "track_flow_accuracy": ("tracks that end within 3 px of the flow", "max"),
    "tracked": ("left keypoints with a track from the pair before", "max"),
    "track_length": ("median over all observations of the length that their track reaches", "max"),
    "track_share_10": ("share of observations in tracks of at least 10", "max"),
    "track_accuracy": ("tracked points within 3 px of where depth and true motion put them", "max"),
    "track_accuracy_1px": ("the same within 1 px", "max"),
    "track_error_px": ("their median distance from there", "min"),
    "latency_ms": ("call (offline), or last image sent to features received (live)", "min"),
}
LINES = ("stereo_accuracy", "matching_accuracy", "matched_share", "match_coverage",
         "track_survival", "temporal_repeatability")  # fmt: skip


def mean_rows(methods: Mapping[str, dict]) -> list[dict]:
    """A row for each metric that was measured, a column for each method."""
    rows = []
    for name, (meaning, _) in MEANINGS.items():
        found = {m: values[name] for m, values in methods.items() if name in values}
        if any(v["count"] for v in found.values()):
            cells = {m: (v["mean"], v["std"]) if v["count"] else None for m, v in found.items()}
            # Where a method has fewer pairs its mean is of other pairs: said, not hidden.
            pairs = " / ".join(dict.fromkeys(str(v["count"]) for v in found.values()))
            rows.append({"metric": name, **cells, "pairs": pairs, "meaning": meaning})
    return rows


def accounting(result: dict) -> list[str]:
    """Summary of the processed and dropped images, as text."""
    pairs, lines = result["pairs"], [f"note: {note}" for note in result["bag"]["notes"]]
    if "images" in pairs:
        lines.append(
            f"{pairs['images']['left']} left and {pairs['images']['right']} right images: "
            f"{pairs['paired']} pairs"
        )
        for side, stamps in pairs["unpaired"].items():
            if stamps:
                lines.append(f"{len(stamps)} {side} images without a partner: {_some(stamps)}")
    if pose := result["bag"]["topics"].get("pose"):
        axes = result["protocol"].get("pose_axes", "optical")
        lines.append(f"true poses: {pose}, {axes} axes (options --poses, --pose-axes)")
    for method, count in pairs["processed"].items():
        lines.append(f"{method}: {count} pairs measured")
    for method, missing in pairs["without_features"].items():
        if missing:
            lines.append(f"{method}: {len(missing)} pairs without features: {_some(missing)}")
    lines += [f"could not be used: {reason}" for reason in grouped(pairs["skipped"])]
    for method, found in result["health"].items():
        lines += [
            f"{method}: warning from {entry['first']} on ({entry['share']:.0%} of the time): "
            f"{entry['words']}"
            for entry in found
        ]
    return lines


def live_lines(live: dict) -> list[str]:
    """Summary of a run with the node, as text."""
    found, dropped = live["agreement"], live["dropped"]
    lines = [f"played at {live['rate']:g} times the recorded rate; {live['processed']} processed"]
    lines.append(
        f"{len(dropped)} pairs dropped: {', '.join(dropped)}" if dropped else "no pair was dropped"
    )
    lines.append(
        f"offline and live agree to the last digit: {found['values']} values of {found['pairs']} "
        "pairs"
        if not found["differing"]
        else f"offline and live differ in {len(found['differing'])} of {found['values']} values"
    )
    if live["of_other_pairs"]:
        lines.append(
            f"the node paired {len(live['of_other_pairs'])} images otherwise: "
            f"{_some(live['of_other_pairs'])}"
        )
    lines += [f"{stamp}: {name} {a} offline, {b} live" for stamp, name, a, b in found["differing"]]
    lines.append("the node counted: " + ", ".join(f"{k} {v}" for k, v in live["node"].items()))
    return lines


def _some(names: list[str]) -> str:
    return ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")


def draw_matches(image: np.ndarray, features: StereoFeatures, truth: np.ndarray | None) -> bytes:
    """A left image's matches as PNG: green right and red wrong, or by disparity without truth."""
    canvas = cv2.cvtColor(image, cv2.COLOR_GRAY2BGR)
    places = features.left.keypoints[features.left_index]
    colours = np.full((len(places), 3), 160, np.uint8)  # grey: no ground truth there
    if truth is not None and len(places):
        error = np.abs(features.disparity - at_pixels(truth, places))
        colours[error <= DISPARITY_TOLERANCE] = (90, 200, 60)
        colours[error > DISPARITY_TOLERANCE] = (60, 60, 240)
    elif len(places):
        top = max(float(np.percentile(features.disparity, 98)), 1e-6)
        level = (255 * features.disparity / top).clip(0, 255).astype(np.uint8)
        colours = cv2.applyColorMap(level, cv2.COLORMAP_TURBO).reshape(-1, 3)
    for place, colour in zip(np.rint(places).astype(int), colours, strict=True):
        cv2.circle(canvas, place.tolist(), 3, colour.tolist(), -1, cv2.LINE_AA)
    return cv2.imencode(".png", canvas)[1].tobytes()


def bag_report(result: dict, example: tuple | None) -> Page:
    """The page of `kp evaluate bag`.

    Args:
        result: contents of metrics.json.
        example: image, features and true disparity (or None) of a pair to show; or None.
    """
    bag = result["bag"]
    page = Page("Stereo features of a bag", f"{Path(bag['path']).name}: {bag['seconds']:.1f} s")
    page.code(command_line())
    page.items([f"{what}: {topic}" for what, topic in bag["topics"].items()])
    page.heading("In short")
    page.table(
        mean_rows(result["methods"]), "Mean over the pairs that have a value ± standard deviation."
    )
    page.heading("Where the images ended")
    page.items(accounting(result))
    if "live" in result:
        page.heading("Through the running node")
        page.items(live_lines(result["live"]))
    if example is not None:
        page.heading("One pair")
        words = (
            "by disparity, far blue to near red"
            if example[2] is None
            else "green right, red wrong by more than 3 px, grey without ground truth"
        )
        page.figure(draw_matches(*example), f"Published matches in a left image, {words}.")
    if any(result["track_survival"].values()):
        page.heading("Tracks")
        page.figure(
            survival_figure(result["track_survival"]),
            "Share of the tracks that reach so many observations.",
        )
    page.heading("Pair by pair")
    page.figure(_series(result), "Shares of each pair in the order of the bag.")
    page.figure(_histogram(result), "Row errors of unconstrained matches; the last bin: and more.")
    for method, metrics in result["methods"].items():
        page.heading(method, 3)
        names = [n for n in MEANINGS if n in metrics]
        page.table(
            [
                {"pair": pair, **{n: metrics[n]["per_scene"].get(pair) for n in names}}
                for pair in result["scenes"]
            ]
        )
    page.heading("Protocol")
    page.items([f"{name}: {value}" for name, value in result["protocol"].items()])
    return page


def _series(result: dict) -> Figure:
    figure = Figure(figsize=(10, 4.5))
    axes = figure.subplots()
    for method, metrics in result["methods"].items():
        style = "x" if method.endswith(" live") else ".-"  # crosses: pairs between may be missing
        for i, name in enumerate(LINES):
            if name in metrics and metrics[name]["count"]:
                values = [metrics[name]["per_scene"].get(pair) for pair in result["scenes"]]
                label = f"{name}, {method}" if len(result["methods"]) > 1 else name
                axes.plot(np.array(values, float), style, color=f"C{i}", label=label)
    axes.set(xlabel="pair", ylabel="share", ylim=(0, 1.02))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    return figure


def _histogram(result: dict) -> Figure:
    figure = Figure(figsize=(7, 3))
    axes = figure.subplots()
    for method, bins in result["histograms"].items():
        total = max(1, sum(bins["counts"]))
        axes.stairs(np.array(bins["counts"]) / total, bins["edges_px"], label=method)
    axes.set(xlabel="|y_l - y_r|, pixels", ylabel="share of matches", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure
