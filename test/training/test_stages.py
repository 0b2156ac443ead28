"""Recipes of several stages: from random weights to the end, and resuming in any stage."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import load_file

import kp_training.stages as driver
import kp_training.train as loop
from kp_frontend.cli import main
from kp_frontend.network import SIZES, load_network
from kp_training.config import CONFIG_DIR, load_recipe
from kp_training.runlog import read_log
from kp_training.stages import train_recipe

SHORT = {"steps": 2, "batch": 2, "micro_batch": 2, "validate_every": 2, "warmup": 1,
         "correspondences": 50}  # fmt: skip
LABELS = {"views": 2, "most": 100}
VIEWS = {"height": 96, "width": 128, "most_keypoints": 100}


def shrunk(name: str, path: Path, keep: int = 9, **changes) -> Path:
    """Write a recipe of the package with the same stages, but few steps and small views."""
    recipe = yaml.safe_load((CONFIG_DIR / f"{name}.yaml").read_text())
    recipe["stages"] = recipe["stages"][:keep]
    for stage in recipe["stages"]:
        stage.update(SHORT | changes)
        stage["labels"] |= LABELS
        stage["views"] |= VIEWS
    path.write_text(yaml.safe_dump(recipe))
    return path


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_the_released_recipes_end_with_their_networks():
    for name in ("tiny", "base"):
        stages = load_recipe(name)
        assert [stage.labels.source for stage in stages] == ["sift", "own", "own"]
        assert [stage.size for stage in stages] == ["tiny", name, name]
        assert stages[-1].views.disturbed > 0 and stages[-1].position_weight > 0
    (finetune,) = load_recipe("finetune")
    assert finetune.labels.source == "own"


def test_one_command_trains_from_random_weights_to_the_end(training_images, tmp_path, capsys):
    recipe = shrunk("tiny", tmp_path / "recipe.yaml")
    words = ["train", "--config", str(recipe), "--images", str(training_images), "--workers", "0"]
    assert main([*words, "--out", str(tmp_path / "run")]) == 0
    run = tmp_path / "run"
    assert capsys.readouterr().out.splitlines()[-1] == str(run / "best.safetensors")
    assert load_network(run / "best.safetensors").config == SIZES["tiny"]
    folders = [run / name for name in ("1_sift", "2_own", "3_long")]
    stages = json.loads((run / "run.json").read_text())["stages"]
    assert list(stages) == [folder.name for folder in folders]
    for before, folder in zip([None, *folders], folders, strict=False):
        begun = stages[folder.name]["start"]
        settings = json.loads(stages[folder.name]["data"]["labels"])
        # Each stage starts from the one before, and learns its keypoints.
        assert (begun is None) == (before is None)
        assert ("model" in settings) == (before is not None)
        if before is not None:
            assert settings["model"] in begun
    card = (run / "card.md").read_text()
    for words in ("Start: random weights", "| 3_long | own keypoints, 2 views", "2 x 2"):
        assert words in card
    again = card.split("```yaml\n")[1].split("```")[0]
    (tmp_path / "again.yaml").write_text(again)
    assert load_recipe(str(tmp_path / "again.yaml")) == load_recipe(str(recipe))
    assert (run / "curves.png").stat().st_size > 1000


def test_a_run_that_is_stopped_in_time_resumes_exactly(
    training_images, training_labels, tmp_path, monkeypatch
):
    stages = load_recipe(
        str(shrunk("tiny", tmp_path / "recipe.yaml", keep=2, steps=3, validate_every=3))
    )

    def run(folder, **limit):
        return train_recipe(
            stages, training_images, tmp_path / folder, "cpu", 0, training_labels, **limit
        )

    whole = run("whole")
    # A clock that runs out after two steps of the second stage.
    times = iter([0.0, *[1.0] * 5, *[100.0] * 100])
    clock = SimpleNamespace(monotonic=lambda: next(times), perf_counter=time.perf_counter)
    monkeypatch.setattr(driver, "time", clock)
    monkeypatch.setattr(loop, "time", clock)
    out = tmp_path / "parts"
    assert run("parts", minutes=1) is None
    assert not (out / "best.safetensors").exists()
    monkeypatch.undo()
    assert run("parts") == out / "best.safetensors"
    assert [row["step"] for row in read_log(out / "2_own/log.jsonl")][-1] == 3
    first, second = load_file(whole), load_file(out / "best.safetensors")
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, second[name], rtol=1e-5, atol=1e-6, msg=name)


def test_the_result_can_keep_a_share_of_the_weights_it_started_from(
    training_images, training_labels, tmp_path
):
    (stage,) = load_recipe("finetune")
    stage = replace(stage, **SHORT, views=replace(stage.views, **VIEWS), learning_rate=1e-2)
    before = load_network("tiny").state_dict()
    found = []
    for share in (0.0, 0.75):
        shared = replace(stage, start_share=share)
        best = train_recipe(
            (shared,), training_images, tmp_path / f"{share}", "cpu", 0, training_labels, "tiny"
        )
        found.append(load_network(best).state_dict())
    moved = 0.0
    for name, begun in before.items():
        if begun.is_floating_point():
            expected = torch.lerp(found[0][name], begun, 0.75)
            torch.testing.assert_close(found[1][name], expected, rtol=1e-4, atol=1e-5, msg=name)
            moved = max(moved, (found[0][name] - begun).abs().max().item())
    assert moved > 1e-3


def test_a_stage_that_learns_own_keypoints_needs_weights(training_images, tmp_path, capsys):
    words = ["train", "--config", "finetune", "--images", str(training_images)]
    assert main([*words, "--out", str(tmp_path / "run")]) != 0
    assert "give --from" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("text", "told"), [
    ("stages: 3", "stages must be a list"),
    ("stages: [{steps: 3}, {steps: 4}]", "a name of its own"),
    ("stages: [{name: a}, {name: a}]", "a name of its own"),
    ("stages: [{name: ../a}, {name: b}]", "a name of its own"),
    ("stages: [{name: a, epochs: 2}, {name: b}]", "epochs"),
    ("stages: [a, b]", "expected settings"),
    ("labels: {every: 0}", "every is 0"),
    ("labels: {sauce: sift}", "unknown setting 'sauce'$"),
    ("jpeg_quality: 20", "unknown setting 'jpeg_quality'; it belongs in views"),
])  # fmt: skip
def test_invalid_stages_are_rejected(text, told, tmp_path):
    (tmp_path / "slip.yaml").write_text(text)
    with pytest.raises(ValueError, match=told):
        load_recipe(str(tmp_path / "slip.yaml"))


def test_settings_of_a_recipe_are_those_of_every_stage(tmp_path):
    (tmp_path / "recipe.yaml").write_text(
        "steps: 7\nviews: {rotation: 5}\nstages:\n"
        "- {name: a, views: {scale: 2}}\n- {name: b, steps: 9, labels: {source: own}}\n"
    )
    first, second = load_recipe(str(tmp_path / "recipe.yaml"))
    assert (first.steps, second.steps) == (7, 9)
    assert (first.views.rotation, first.views.scale) == (5.0, 2.0)
    assert (second.views.rotation, second.views.scale) == (5.0, 1.3)
    assert (first.labels.source, second.labels.source) == ("sift", "own")
