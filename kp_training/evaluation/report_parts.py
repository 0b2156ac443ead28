"""Common parts of the reports of all evaluations."""

from __future__ import annotations

from kp_training.evaluation.metrics import LESS_IS_BETTER, Value
from kp_training.evaluation.page import Page
from kp_training.evaluation.results import provenance, without_value

LABELS = {
    "matching_accuracy": "matching accuracy",
    "total_matches": "matches",
    "disparity_accuracy": "disparity accuracy",
    "correct_matches": "correct matches",
    "disparity_error_px": "median error, px",
    "repeatability": "repeatability",
    "repeatability_1px": "repeatability 1 px",
    "repeatability_unoccluded": "repeatability, unoccluded",
    "repeatability_unoccluded_1px": "unoccluded, 1 px",
    "descriptor_map": "descriptor mAP",
    "score_auc": "score AUC",
    "disparity_accuracy_256": "disparity accuracy, strongest 256",
    "correct_matches_256": "correct, strongest 256",
    "inference_ms": "ms per image",
    "stereo_accuracy": "accuracy",
    "stereo_matches": "matches",
    "stereo_correct_matches": "correct matches",
    "stereo_error_px": "median error, px",
    "sigma_ratio": "median error / sigma (.674)",
    "sigma_within_2": "within 2 sigma (.954)",
    "confidence_auc": "confidence AUC",
    "confidence_error": "calibration error of confidence",
    "matching_score": "matching score",
    **{f"homography_accuracy_{t}px": f"H within {t} px" for t in (1, 3, 5)},
}


def add_end(page: Page, metrics: dict) -> None:
    """Add the skipped scenes and how the page was made."""
    page.heading("Skipped")
    skipped = metrics["protocol"]["skipped"]
    page.text(f"{len(skipped)} skipped, not part of any mean." if skipped else "None.")
    page.items(skipped)
    missing = without_value(metrics)
    if missing:
        page.text("These means exclude scenes without a value (no correct match):")
        page.items(missing)
    page.heading("How this was made")
    facts = provenance()
    page.code(facts.pop("command"))
    page.table([{"what": name, "value": words} for name, words in facts.items()])


def add_means(page: Page, metrics: dict, names: tuple[str, ...], caption: str) -> None:
    """Add a table with one row for each method."""
    best = {LABELS[m]: "min" if m in LESS_IS_BETTER else "max" for m in names}
    rows = [
        labelled({"method": name} | {m: mean_and_std(found[m]) for m in names})
        for name, found in metrics["methods"].items()
    ]
    page.table(rows, caption, best)


def mean_and_std(metric: dict) -> Value | tuple[float, float]:
    """The table cell of a metric."""
    return None if metric["mean"] is None else (metric["mean"], metric["std"])


def labelled(row: dict) -> dict:
    """A row with readable metric names."""
    return {LABELS.get(name, name): value for name, value in row.items()}


def many(count: int, what: str) -> str:
    """A number with a noun in singular or plural."""
    return f"{count} {what}{'' if count == 1 else 's'}"


def size_words(protocol: dict) -> str:
    """The image size of a protocol as text."""
    size = protocol["size"]
    return "native size" if isinstance(size, str) else f"{size[0]}x{size[1]}"
