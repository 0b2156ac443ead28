"""Commands of evaluation: evaluate."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from kp_frontend.cli import add_command, count
from kp_training.evaluation import bag_commands


def _middlebury(arguments: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.table import Table

    from kp_training.evaluation.middlebury import evaluate_middlebury

    metrics = evaluate_middlebury(
        arguments.folder, arguments.methods.split(","), arguments.max_keypoints
    )
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
    names = list(metrics["methods"])
    table = Table("metric", *names, title=f"mean over {len(metrics['scenes'])} scenes")
    for metric in metrics["methods"][names[0]]:
        means = (metrics["methods"][name][metric]["mean"] for name in names)
        cells = ("none" if m is None else f"{m:.3f}" if m < 10 else f"{m:.0f}" for m in means)
        table.add_row(metric, *cells)
    console = Console()
    console.print(table)
    for reason in metrics["protocol"]["skipped"]:
        console.print(f"skipped: {reason}")
    console.print(f"written: {arguments.out / 'metrics.json'}", soft_wrap=True)


def add_commands(commands: argparse._SubParsersAction) -> None:
    """Add them to `kp`."""
    evaluate = commands.add_parser("evaluate", help="measure how good the features are")
    kinds = evaluate.add_subparsers(required=True, metavar="KIND")
    middlebury = add_command(
        kinds,
        "middlebury",
        "stereo pairs with ground truth disparity",
        "evaluate middlebury scenes/ --out out --methods tiny,sift,orb",
        _middlebury,
    )
    middlebury.add_argument("folder", type=Path, help="folder with scenes.json")
    middlebury.add_argument("--out", type=Path, required=True, help="folder for metrics.json")
    middlebury.add_argument(
        "--methods",
        default="tiny,sift,orb",
        help="comma-separated: sift, orb, a network's name or weights file",
    )
    middlebury.add_argument("--max-keypoints", type=count, default=2048)
    bag_commands.add_evaluations(kinds)
