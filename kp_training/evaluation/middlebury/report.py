"""The report of `kp evaluate middlebury`."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from kp_frontend.config import FrontendConfig
from kp_training.evaluation import figures
from kp_training.evaluation.method import OTHER_CORRELATION, OTHER_SIMILARITY
from kp_training.evaluation.methods import NetworkMethod
from kp_training.evaluation.metrics import KEYPOINTS, MATCHES, SCORES, STEREO, TRUST
from kp_training.evaluation.middlebury.evaluation import Evaluation
from kp_training.evaluation.page import Page, shown
from kp_training.evaluation.report_parts import (
    LABELS,
    add_end,
    add_means,
    labelled,
    many,
    mean_and_std,
    size_words,
)
from kp_training.evaluation.results import summary
from kp_training.evaluation.scenes import Scene
from kp_training.evaluation.trust import together

# Figures of the reference study: mean and standard deviation, as shares instead of percentages.
STUDY_METRICS = (
    "matching_accuracy",
    "total_matches",
    "repeatability",
    "descriptor_map",
    "inference_ms",
)
STUDY = (
    {
        "method": "study: network",
        "matching_accuracy": (0.4691, 0.0619),
        "total_matches": (978, 184),
        "repeatability": (0.423, 0.059),
        "descriptor_map": (0.061, 0.035),
        "inference_ms": (67.99, 0.23),
        "measured on": "Middlebury 2021, 1920x1080, T4 GPU",
    },
    {
        "method": "study: SIFT, FLANN",
        "matching_accuracy": (0.7708, 0.0619),
        "total_matches": (1863, 698),
        "measured on": "Middlebury 2021, 1920x1080",
    },
)
PER_SCENE = (
    "disparity_accuracy",
    "correct_matches",
    "total_matches",
    "matching_accuracy",
    "repeatability",
    "descriptor_map",
    "disparity_error_px",
)


def middlebury_report(evaluation: Evaluation) -> Page:
    """Build the page of `kp evaluate middlebury`."""
    metrics, protocol = evaluation.metrics, evaluation.metrics["protocol"]
    count, skipped = len(metrics["scenes"]), len(protocol["skipped"])
    page = Page(
        "Stereo features on Middlebury",
        f"{many(count, 'scene')}{f', {skipped} skipped' if skipped else ''}; "
        f"at most {protocol['max_keypoints']} keypoints per image; {size_words(protocol)}.",
    )
    page.items(_in_short(metrics))
    _study(page, evaluation)
    _means(page, metrics)
    _disturbed(page, metrics)
    page.heading("By number of keypoints")
    add_means(
        page,
        metrics,
        SCORES,
        "Score AUC: how well the rank of the weaker keypoint of a match, in the order of scores, "
        "tells correct matches from wrong ones (0.5: not at all). Strongest 256: matches among the "
        "256 strongest keypoints of each image. Mean ± standard deviation over scenes; best in "
        "bold.",
    )
    page.figure(
        figures.curves_figure(_curves(evaluation)),
        "Unconstrained matches among the strongest keypoints of each detection.",
    )
    page.heading("Disparity errors")
    page.figure(
        figures.errors_figure(*_errors(evaluation)),
        f"x_l - x_r - d_gt of matches with ground truth, {_precise(evaluation)}. Left: "
        "unconstrained matches in corresponding rows. Right: matches as the front end publishes "
        "them.",
    )
    _trust(page, evaluation)
    _pictures(page, evaluation)
    page.heading("Per scene")
    page.text("Click a column header to sort.")
    rows = []
    for scene, (width, height, release) in evaluation.scenes.items():
        for name, found in metrics["methods"].items():
            row = {"scene": scene, "method": name, "set": release, "size": f"{width}x{height}"}
            row |= {LABELS[m]: found[m]["per_scene"][scene] for m in PER_SCENE}
            stereo = (*STEREO, *TRUST)
            row |= {f"{LABELS[m]} (stereo)": found[m]["per_scene"][scene] for m in stereo}
            rows.append(row)
    page.table(rows)
    add_end(page, metrics)
    return page


def _in_short(metrics: dict) -> list[str]:
    """One summary line per method."""
    lines = []
    for name, found in metrics["methods"].items():
        mean = {metric: shown(values["mean"]) for metric, values in found.items()}
        lines.append(
            f"{name}: {mean['correct_matches']} correct matches per scene at a disparity accuracy "
            f"of {mean['disparity_accuracy']}; within the front end's limits "
            f"{mean['stereo_correct_matches']} at {mean['stereo_accuracy']}, median error "
            f"{mean['stereo_error_px']} px."
        )
    return lines


def _study(page: Page, evaluation: Evaluation) -> None:
    page.heading("Comparison with the reference study")
    protocol = evaluation.metrics["protocol"]
    here = f"{many(len(evaluation.scenes), 'scene')} here, {size_words(protocol)}"
    rows = [labelled(row) for row in STUDY]
    for name, found in evaluation.metrics["methods"].items():
        row = {"method": name} | {m: mean_and_std(found[m]) for m in STUDY_METRICS}
        rows.append(labelled(row | {"measured on": here}))
    page.table(
        rows,
        "Mean ± standard deviation over scenes. The first two rows are the figures of the study, "
        "on its own scenes and machine. Rows are comparable only if scenes and sizes are the same; "
        "the study's size is --size 1920x1080.",
    )


def _means(page: Page, metrics: dict) -> None:
    page.heading("All metrics")
    page.heading("Unconstrained matches", 3)
    add_means(
        page,
        metrics,
        MATCHES,
        "Mutual nearest neighbours of descriptors without an epipolar constraint, or the method's "
        "own matcher. Mean ± standard deviation over scenes; best in bold.",
    )
    page.heading("Keypoints and descriptors", 3)
    add_means(
        page,
        metrics,
        (*KEYPOINTS, "inference_ms"),
        "Repeatability of the keypoints with a true position inside the other image, within 3 px "
        "and 1 px; unoccluded: only of those that are visible in the other image.",
    )
    limits = FrontendConfig()
    page.heading("Matches as the front end publishes them", 3)
    add_means(
        page,
        metrics,
        STEREO,
        "Keypoints and descriptors of every method under the front end's limits: row difference of "
        f"at most {limits.row_tolerance:g} px, disparity of at least -1 px, mutual nearest "
        "neighbours, disparity refined on the images. Networks: cosine similarity of at least "
        f"{limits.min_similarity:g} and confidence of at least {limits.min_confidence:g}. Other "
        f"methods have no confidence: cosine similarity of at least {OTHER_SIMILARITY:g}, and "
        "correlation of the images in each quarter of the window of at least "
        f"{OTHER_CORRELATION:g}. Best in bold.",
    )


def _disturbed(page: Page, metrics: dict) -> None:
    """Add one table for each disturbance, and first the same metrics without one."""
    if "disturbed" not in metrics:
        return
    page.heading("Disturbed images")
    page.text("Unconstrained matches on the same scenes with disturbed images.")
    undisturbed = {"none": {"what": "not disturbed", "methods": metrics["methods"]}}
    for name, found in (undisturbed | metrics["disturbed"]).items():
        caption = f"{name}: {found['what']}. Mean ± standard deviation over scenes; best in bold."
        add_means(page, found, (*MATCHES, *KEYPOINTS), caption)


def _trust(page: Page, evaluation: Evaluation) -> None:
    page.heading("Standard deviations and confidence")
    metrics = evaluation.metrics
    rows = [
        labelled({"method": name} | {m: mean_and_std(found[m]) for m in TRUST})
        for name, found in metrics["methods"].items()
    ]
    page.table(
        rows,
        "Of published matches. Median of the disparity error over its standard deviation and share "
        "within two standard deviations: right matches of scenes with sub-pixel ground truth; in "
        "brackets what a normal distribution has. AUC and expected calibration error (ten bins) "
        "of the confidence: networks only. Mean ± standard deviation over scenes.",
    )
    page.figure(
        figures.trust_figure(
            {name: together(list(r.trust.values())) for name, r in evaluation.results.items()}
        ),
        f"Left: share of right matches by confidence. Right: errors over their standard deviations "
        f"beside a normal distribution. Published matches, {_precise(evaluation)}.",
    )


def _pictures(page: Page, evaluation: Evaluation) -> None:
    scene = evaluation.shown
    page.heading(f"Pictures of {scene.name}")
    shown = [(name, r.method, *r.shown) for name, r in evaluation.results.items() if r.shown]
    networks = [(m, found) for _, m, found, _ in shown if isinstance(m, NetworkMethod)]
    for network, found in networks[:1]:
        heat, _ = network.dense(scene.left)
        page.heading(f"Heatmap of {network.name}", 3)
        page.figure(
            figures.heatmap_figure(scene.left, heat),
            "Predicted keypoint heatmap, with a non-linear scale that shows more than the peaks.",
        )
        page.heading("Predicted keypoints and SIFT labels", 3)
        page.figure(*figures.labels_figure(scene.left, found.first.xy))
        page.heading("True and false positives", 3)
        page.figure(*figures.positives_figure(scene, found.first.xy, found.second.xy))
        page.heading("Similarity of one descriptor to the image", 3)
        _, dense = network.dense(scene.right)
        page.figure(
            *figures.similarity_figure(scene, found.first.xy, found.first.descriptors, dense)
        )
    page.heading("Stereo matches", 3)
    page.text(
        f"Correct matches are green, wrong ones red, those without ground truth grey. Each picture "
        f"shows at most about {figures.LINES} matches."
    )
    for name, _, found, _ in shown:
        left, right = found.places()
        words = f"{name}: matches without an epipolar constraint."
        page.figure(_matches(scene, left, right, f"{name}, unconstrained"), words)
    for name, _, _, published in shown:
        left, disparity = published[:2]
        right = left - np.column_stack([disparity, np.zeros(len(left))])
        words = f"{name}: matches as the front end publishes them, at the refined disparity."
        page.figure(_matches(scene, left, right, f"{name}, within limits"), words)


def _matches(scene: Scene, left: np.ndarray, right: np.ndarray, title: str) -> Figure:
    correct = figures.judged(scene, left, right)
    return figures.matches_figure(scene.left, scene.right, left, right, correct, title)


def _curves(evaluation: Evaluation) -> dict[str, dict[int, dict[str, float | None]]]:
    """Mean metrics of matches for each method and number of keypoints."""
    return {
        name: {
            count: {m: values["mean"] for m, values in summary(MATCHES, rows).items()}
            for count, rows in of_method.curves.items()
        }
        for name, of_method in evaluation.results.items()
    }


def _errors(evaluation: Evaluation) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Disparity errors of each method over all precise scenes, see `MethodResults`."""
    names, results = evaluation.precise, evaluation.results
    return (
        {k: np.concatenate([r.errors[s] for s in names]) for k, r in results.items()},
        {k: np.concatenate([r.stereo_errors[s] for s in names]) for k, r in results.items()},
    )


def _precise(evaluation: Evaluation) -> str:
    """Description of the scenes of the error histograms."""
    precise, every = len(evaluation.precise), len(evaluation.scenes)
    if precise < every:
        return f"{many(precise, 'scene')} with sub-pixel ground truth"
    return f"all {shown(every)} scenes"
