"""The results of a run: `run.json`, the model card, and the loss curves."""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from kp_training.config import TrainConfig
from kp_training.labels import Labels
from kp_training.parallel import Process
from kp_training.runlog import read_log


def write_report(
    out: Path,
    config: TrainConfig,
    labels: Labels,
    split: tuple[np.ndarray, np.ndarray],
    progress: dict[str, Any],
    process: Process,
) -> None:
    """Write `run.json`, `card.md` and `curves.png` of a finished run, and print its rates."""
    rows = read_log(out / "log.jsonl")
    validations = [r for r in rows if "validation_loss" in r]
    best = min(validations, key=lambda r: r["validation_loss"])
    seconds = max(progress["seconds"], 1e-9)
    run = {
        "config": asdict(config),
        "start": progress["start"],
        "commit": commit(),
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {process.device}, {process.world} process(es)",
        "data": {
            "images": len(labels),
            "training": len(split[0]),
            "validation": len(split[1]),
            "keypoints": len(labels.xy),
            "labels": labels.settings,
            "sha256": progress["data"],
        },
        "steps": progress["step"],
        "seconds": round(seconds, 1),
        "images_per_s": round(progress["images"] / seconds, 2),
        "data_wait": round(progress["waited"] / seconds, 4),
        "best": {name.removeprefix("validation_"): value for name, value in best.items()},
        "last": {n.removeprefix("validation_"): v for n, v in validations[-1].items()},
    }
    (out / "run.json").write_text(json.dumps(run, indent=1) + "\n")
    (out / "card.md").write_text(card(run, out.name))
    curves(rows, out / "curves.png")
    print(
        f"{run['steps']} steps in {seconds:.0f} s, {run['images_per_s']:.0f} images/s, "
        f"{run['data_wait']:.1%} of the time waiting for data"
    )


def card(run: dict[str, Any], name: str) -> str:
    """The model card of a run, Markdown."""
    config, data = run["config"], run["data"]
    # Convert through JSON: tuples become lists, which YAML supports.
    recipe = yaml.safe_dump(json.loads(json.dumps(config)), sort_keys=False)
    again = "" if run["start"] is None else " --from WEIGHTS"
    begun = "random weights" if run["start"] is None else f"the weights {run['start']}"
    return f"""# {name}

Keypoints and descriptors for grey images, network size `{config["size"]}`.
This card was written by `kp train`.

## Training data

{data["images"]} images: {data["training"]} for training, {data["validation"]} held out
(`split.json`); {data["keypoints"]} keypoints as labels ({data["labels"] or "settings unknown"}).
SHA-256 of images and labels: {data["sha256"]}.
Before you distribute the weights, state here under which terms the images may be used.

## Recipe

Start: {begun}. Code: commit {run["commit"] or "unknown"}, torch {run["torch"]}.
Training took {run["steps"]} steps in {run["seconds"]:.0f} s on {run["machine"]}:
{run["images_per_s"]:.1f} images/s, {run["data_wait"]:.1%} of the time waiting for data.
The weights are those of step {run["best"]["step"]}, which has the lowest validation loss.

To train again, save this recipe as RECIPE.yaml:

```yaml
{recipe}```

    kp train --config RECIPE.yaml --images IMAGES --labels LABELS --out RUN{again}

## Metrics on held-out images

{_metrics(run)}

`repeatability` and `matching` are for 300 keypoints in views related by known homographies (3 px).
"""


def write_recipe_report(out: Path, folders: list[Path]) -> None:
    """Write `run.json`, `card.md` and `curves.png` of a recipe from those of its stages."""
    runs = {folder.name: json.loads((folder / "run.json").read_text()) for folder in folders}
    (out / "run.json").write_text(json.dumps({"stages": runs}, indent=1) + "\n")
    (out / "card.md").write_text(recipe_card(runs, out.name))
    rows, before = [], 0
    for folder, run in zip(folders, runs.values(), strict=True):
        rows += [row | {"step": before + row["step"]} for row in read_log(folder / "log.jsonl")]
        before += run["steps"]
    curves(rows, out / "curves.png")
    seconds = sum(run["seconds"] for run in runs.values())
    print(f"{before} steps of {len(runs)} stages in {seconds:.0f} s")


def recipe_card(runs: dict[str, dict[str, Any]], name: str) -> str:
    """The model card of a recipe with several stages, Markdown."""
    first, last = (list(runs.values())[i] for i in (0, -1))
    size, data = last["config"]["size"], last["data"]
    again = "" if first["start"] is None else " --from WEIGHTS"
    begun = "random weights" if first["start"] is None else f"the weights {first['start']}"
    commits = sorted({run["commit"] or "unknown" for run in runs.values()})
    stages = "\n".join(
        f"| {stage} | {_label_words(run['data'])} | {run['steps']} x {run['config']['batch']} | "
        f"{run['seconds'] / 60:.0f} | {run['best']['loss']:.4g} | "
        f"{run['best']['repeatability']:.3f} | {run['best']['matching']:.3f} |"
        for stage, run in runs.items()
    )
    recipe = yaml.safe_dump(
        {"stages": [json.loads(json.dumps(run["config"])) for run in runs.values()]},
        sort_keys=False,
    )
    return f"""# {name}

Keypoints and descriptors for grey images, network size `{size}`.
This card was written by `kp train`.

## Training data

{data["images"]} images: {data["training"]} for training, {data["validation"]} held out
(`split.json` of each stage). SHA-256 of images and labels of the last stage: {data["sha256"]}.
Before you distribute the weights, state here under which terms the images may be used.

## Recipe

Start: {begun}. Code: commit {", ".join(commits)}, torch {last["torch"]}.
Machine: {last["machine"]}.

| stage | labels | steps x pairs | minutes | lowest loss | repeatability | matching |
|---|---|---|---|---|---|---|
{stages}

`repeatability` and `matching` are for 300 keypoints in views of held-out images related by known
homographies (3 px). The weights are those of step {last["best"]["step"]} of the last stage, which
has the lowest validation loss.

To train again, save this recipe as RECIPE.yaml:

```yaml
{recipe}```

    kp train --config RECIPE.yaml --images IMAGES --out RUN{again}

## Metrics on held-out images

{_metrics(last)}

## Next steps

    kp uncertainty RUN/best.safetensors --scenes SCENES
    kp quantize RUN/best.safetensors --images IMAGES --out RUN/best.safetensors
    kp evaluate middlebury SCENES --methods RUN/best.safetensors,sift,orb --out OUT
"""


def _label_words(data: dict[str, Any]) -> str:
    """How labels were made, from the settings in their file."""
    try:
        settings = json.loads(data["labels"])
    except ValueError:
        return "unknown"
    source = settings.get("detector") or "own keypoints"
    return (
        f"{source}, {settings['views']} views, {data['keypoints'] / data['images']:.0f} per image"
    )


def _metrics(run: dict[str, Any]) -> str:
    """The table of the metrics of a run's best weights, Markdown."""
    rows = [f"| {k} | {v:.4g} |" for k, v in run["best"].items() if k != "step" and v is not None]
    return "\n".join(["| metric | value |", "|---|---|", *rows])


def fingerprint(labels: Labels) -> str:
    """SHA-256 of the names and digests of the images, and of their labels."""
    digest = hashlib.sha256("\n".join(labels.paths).encode())
    for array in (labels.digest, labels.start, labels.xy, labels.repeat, labels.response):
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def fingerprint_file(model: str | Path) -> str:
    """Name and SHA-256 of weights, given by released name or file."""
    from kp_frontend.network import weights_path

    path = weights_path(model)
    return f"{path.stem} (sha256 {hashlib.sha256(path.read_bytes()).hexdigest()})"


def commit() -> str | None:
    """The commit of the code, with a `+` if files were changed since; None outside git."""
    here = Path(__file__).parent

    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(here), *words], capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def curves(rows: list[dict[str, Any]], path: Path) -> None:
    """Plot training and validation losses over steps."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print(f"{path.name} was not written: the package `matplotlib` is not installed")
        return
    figure = Figure(figsize=(10, 3.2), layout="constrained")
    axes = figure.subplots(1, 3)
    for axis, name in zip(axes, ("loss", "detector", "descriptor"), strict=True):
        for key, label in ((name, "training"), (f"validation_{name}", "validation")):
            points = [(row["step"], row[key]) for row in rows if key in row]
            if points:
                axis.plot(*zip(*points, strict=True), label=label)
        axis.set(title=name, xlabel="step")
    axes[0].legend()
    figure.savefig(path, dpi=110)
