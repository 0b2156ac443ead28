"""The report of `kp evaluate odometry`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from kp_training.evaluation.page import Page
from kp_training.evaluation.reasons import grouped
from kp_training.evaluation.results import command_line
from kp_training.evaluation.tracks import survival_figure

COLUMNS = {
    "drift, %": "drift_percent",
    "rotation, deg/m": "rotation_deg_per_m",
    "ATE, m": "ate_m",
    "worst step, m": "worst_step_m",
    "frame to frame: drift, %": "frame_drift_percent",
    "its ATE, m": "frame_ate_m",
    "its worst step, m": "frame_worst_step_m",
    "failed frames": "failed_frames",
    "inliers": "inliers",
    "disparity offset, px": "disparity_offset_px",
    "stereo matches": "stereo_matches",
}


TRACK_COLUMNS = {
    "tracked": "tracked",
    "track length": "track_length",
    "in tracks of 10": "track_share_10",
    "within 3 px": "track_accuracy",
    "within 1 px": "track_accuracy_1px",
    "track error, px": "track_error_px",
}


def track_rows(result: dict) -> list[dict]:
    """A row for each method that makes tracks."""
    return [
        {"method": method, **{c: metrics[name]["mean"] for c, name in TRACK_COLUMNS.items()}}
        for method, metrics in result["methods"].items()
        if metrics["tracked"]["mean"] is not None
    ]


def odometry_rows(result: dict) -> list[dict]:
    """A row for each method."""
    return [
        {"method": method, **{column: metrics[name]["mean"] for column, name in COLUMNS.items()}}
        for method, metrics in result["methods"].items()
    ]


def odometry_report(result: dict) -> Page:
    """The page of `kp evaluate odometry`."""
    sequence, protocol = result["sequence"], result["protocol"]
    page = Page(
        "Stereo odometry",
        f"{Path(sequence['path']).name}: {sequence['frames']} frames, {sequence['metres']:.1f} m",
    )
    page.code(command_line())
    lengths = ", ".join(f"{length:g}" for length in protocol["lengths_m"])
    page.heading("In short")
    least = dict.fromkeys(list(COLUMNS)[:7], "min")
    page.table(
        odometry_rows(result),
        f"Drift is the mean over all sub-sequences of {lengths} m (KITTI's own are 100 to 800 m). "
        "ATE: RMS of positions after rigid alignment. Worst step: the largest error of the motion "
        "between two neighbouring frames. The same odometry for all methods: frame to frame, and "
        "with keyframes and landmarks refined together.",
        best=least,
    )
    page.figure(
        _trajectories(result),
        "Trajectories from above, first frame at the origin; and how far off they are on the way.",
    )
    page.heading("Drift by length")
    page.table(
        [
            {
                "method": method,
                **{f"{n} m": v for n, v in metrics["drift_percent"]["per_length"].items()},
            }
            for method, metrics in result["methods"].items()
        ],
        "Translation error in % of the length.",
    )
    if rows := track_rows(result):
        _add_tracks(page, rows, result["track_survival"])
    page.heading("What went wrong")
    lines = [
        f"{method}: the motion could not be told in frames {metrics['failed_frames']['frames']}"
        for method, metrics in result["methods"].items()
        if metrics["failed_frames"]["frames"]
    ]
    page.items(
        [*lines, *grouped(sequence["left_out"])] or ["nothing: every frame's motion was found"]
    )
    page.heading("Protocol")
    page.items([f"{name}: {value}" for name, value in protocol.items()])
    return page


def _add_tracks(page: Page, rows: list[dict], survival: dict[str, list]) -> None:
    """The table of the tracks and their survival curves."""
    page.heading("Tracks")
    page.table(
        rows,
        "Keypoints a frame with a track from the frame before; median over all observations of "
        "the length that their track reaches; share of observations in tracks of at least 10; "
        "tracked points near the place where the depth before and the true motion put them, "
        "and their median distance from it.",
        best=dict.fromkeys(list(TRACK_COLUMNS)[:5], "max") | {"track error, px": "min"},
    )
    page.figure(
        survival_figure({row["method"]: survival[row["method"]] for row in rows}),
        "Share of the tracks that reach so many observations.",
    )


def _trajectories(result: dict) -> Figure:
    figure = Figure(figsize=(11, 5))
    above, beside = figure.subplots(1, 2)
    truth = np.array(result["trajectories"]["truth"])
    way = np.concatenate([[0], np.cumsum(np.linalg.norm(np.diff(truth, axis=0), axis=1))])
    for name, listed in result["trajectories"].items():
        places = np.array(listed)
        if name == "truth":
            above.plot(places[:, 0], places[:, 2], "k", linewidth=2, label=name)
            continue
        above.plot(places[:, 0], places[:, 2], "--", label=name)
        beside.plot(way, np.linalg.norm(places - truth, axis=1), label=name)
    above.set(xlabel="x (right), metres", ylabel="z (forward), metres")
    above.set_aspect("equal", adjustable="datalim")
    beside.set(xlabel="way travelled, metres", ylabel="distance from the truth, metres")
    for axes in (above, beside):
        axes.grid(alpha=0.3)
        axes.legend()
    return figure
