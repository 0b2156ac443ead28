"""The report of `kp evaluate homography`."""

from __future__ import annotations

from pathlib import PurePath

import numpy as np

from kp_training.evaluation import figures
from kp_training.evaluation.homography.evaluation import (
    CORNER_TOLERANCES,
    METRICS,
    RANSAC_PX,
    HomographyEvaluation,
    warp,
)
from kp_training.evaluation.metrics import REPEAT_TOLERANCE
from kp_training.evaluation.page import Page
from kp_training.evaluation.report_parts import LABELS, add_end, add_means, many, size_words
from kp_training.evaluation.results import summary


def homography_report(evaluation: HomographyEvaluation) -> Page:
    """Build the page of `kp evaluate homography`."""
    metrics, protocol = evaluation.metrics, evaluation.metrics["protocol"]
    count, skipped = len(metrics["scenes"]), len(protocol["skipped"])
    page = Page(
        "Features under homographies",
        f"{many(count, 'image pair')}{f', {skipped} skipped' if skipped else ''}; "
        f"at most {protocol['max_keypoints']} keypoints per image; {size_words(protocol)}.",
    )
    page.heading("Means")
    add_means(
        page,
        metrics,
        METRICS,
        "Mean ± standard deviation over pairs; best in bold. Matches are mutual nearest neighbours "
        "or come from the method's own matcher. The homography H is estimated from them by RANSAC "
        f"({RANSAC_PX:g} px) and correct if the mean error of the corners is small enough.",
    )
    _hpatches_parts(page, metrics)
    accuracy = {
        name: {f"{t} px": found[f"homography_accuracy_{t}px"]["mean"] for t in CORNER_TOLERANCES}
        for name, found in metrics["methods"].items()
    }
    page.figure(
        figures.bars_figure(accuracy, "share of pairs with a correct homography"),
        "Corner error of the estimated homography of at most 1, 3 and 5 px.",
    )
    page.heading(f"Matches of {evaluation.shown.name}")
    for name, result in evaluation.shown_results.items():
        left, right = result.places()
        off = np.linalg.norm(warp(left, evaluation.shown.matrix) - right, axis=1)
        correct = (off <= REPEAT_TOLERANCE).astype(float)
        pair = evaluation.shown
        page.figure(
            figures.matches_figure(pair.first, pair.second, left, right, correct, name),
            f"{name}: correct matches are green, wrong ones red.",
        )
    page.heading("Per pair")
    page.text("Click a column header to sort.")
    page.table(
        [
            {"pair": pair, "method": name}
            | {LABELS[m]: found[m]["per_scene"][pair] for m in METRICS}
            for pair in metrics["scenes"]
            for name, found in metrics["methods"].items()
        ]
    )
    add_end(page, metrics)
    return page


def _hpatches_parts(page: Page, metrics: dict) -> None:
    """Add the means of the two kinds of HPatches sequences, if there are any."""
    for prefix, words in (("i_", "Illumination"), ("v_", "Viewpoint")):
        pairs = [
            pair for pair in metrics["scenes"] if PurePath(pair).parent.name.startswith(prefix)
        ]
        if not pairs:
            continue
        methods = {
            name: summary(
                METRICS,
                {p: {m: v["per_scene"][p] for m, v in found.items()} for p in pairs},
            )
            for name, found in metrics["methods"].items()
        }
        page.heading(f"{words} (sequences {prefix}...)", 3)
        caption = f"{many(len(pairs), 'pair')}; best in bold."
        add_means(page, {"methods": methods}, METRICS, caption)
