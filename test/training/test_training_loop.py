"""The training loop: learning, resuming, several processes, and detection of divergence."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

import kp_training.train as loop
from kp_frontend.config import FrontendConfig
from kp_frontend.frontend import StereoFrontend
from kp_frontend.network import SIZES, build_network, load_network
from kp_training.config import load_recipe
from kp_training.labels import label_folder
from kp_training.runlog import read_log
from kp_training.train import train

ROOT = Path(__file__).parents[2]
SMALL = {"height": 96, "width": 128}


def small(name: str, stage: int = 0, **changes):
    """A stage of a recipe by name, with small views and few steps."""
    config = load_recipe(name)[stage]
    views = replace(config.views, **SMALL)
    short = {"epochs": 0, "steps": 12, "batch": 4, "micro_batch": 2, "validate_every": 6,
             "warmup": 2, "ema": 0.5, "correspondences": 100}  # fmt: skip
    return replace(config, **(short | changes), views=views)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Use one thread, as the other processes do: the rounding of sums depends on it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", ["paper", "tiny"])
def test_a_short_run_of_each_recipe_learns_and_writes_usable_weights(
    name, training_images, training_labels, tmp_path, pair
):
    out = tmp_path / "run"
    best = train(small(name, steps=25), training_images, out, "cpu", 0, training_labels)
    rows = read_log(out / "log.jsonl")
    validations = [row for row in rows if "validation_loss" in row]
    first, last = validations[0], validations[-1]
    assert last["validation_loss"] < 0.95 * first["validation_loss"]
    assert {"validation_repeatability", "validation_matching"} <= first.keys()

    run = json.loads((out / "run.json").read_text())
    lowest = min(row["validation_loss"] for row in validations)
    assert run["steps"] == 25 and run["best"]["loss"] == lowest
    assert run["data"]["training"] + run["data"]["validation"] == 4
    assert run["images_per_s"] > 0 and 0 <= run["data_wait"] < 1
    card = (out / "card.md").read_text()
    assert run["data"]["sha256"] in card and f"detector: {run['config']['detector']}" in card
    assert (out / "curves.png").stat().st_size > 1000
    assert list(out.glob("events.out.tfevents.*"))

    frontend = StereoFrontend(FrontendConfig(model=str(best), backend="torch", threads=1))
    found = frontend(*pair)
    assert found.left.keypoints.shape[1] == 2 and np.isfinite(found.left.descriptors).all()


def command(config, images: Path, labels: Path, out: Path, tmp_path: Path) -> list[str]:
    """Command line of `kp train` for a separate process."""
    recipe = tmp_path / "recipe.yaml"
    settings = json.loads(json.dumps(asdict(config)))
    recipe.write_text(yaml.safe_dump(settings))
    return ["-m", "kp_frontend.cli", "train", "--config", str(recipe), "--images", str(images),
            "--labels", str(labels), "--out", str(out), "--workers", "1"]  # fmt: skip


def start(words: list[str]) -> subprocess.Popen:
    """Start Python at the root of the checkout."""
    return subprocess.Popen(
        [sys.executable, *words],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def test_a_killed_run_resumes_exactly(training_images, training_labels, tmp_path):
    config = small("paper", steps=18, batch=2, micro_batch=1, validate_every=3)
    train(config, training_images, tmp_path / "whole", "cpu", 1, training_labels)

    out = tmp_path / "killed"
    child = start(command(config, training_images, training_labels, out, tmp_path))
    end = time.monotonic() + 120
    while len(read_log(out / "log.jsonl")) < 2:  # two validations, so at least one checkpoint
        assert child.poll() is None and time.monotonic() < end, child.stdout.read()
        time.sleep(0.02)
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert not (out / "run.json").is_file()  # it was really interrupted
    train(config, training_images, out, "cpu", 1, training_labels)
    whole, resumed = (load_file(tmp_path / n / "last.safetensors") for n in ("whole", "killed"))
    assert whole.keys() == resumed.keys()
    for name, tensor in whole.items():
        torch.testing.assert_close(tensor, resumed[name], rtol=1e-5, atol=1e-6, msg=name)
    logs = [read_log(tmp_path / n / "log.jsonl") for n in ("whole", "killed")]
    assert [row["step"] for row in logs[0]] == [row["step"] for row in logs[1]]
    with pytest.raises(ValueError, match="another recipe"):
        train(replace(config, steps=13), training_images, out, "cpu", 0, training_labels)
    label_folder(training_images, tmp_path / "others.npz", views=1, detector="orb")
    with pytest.raises(ValueError, match="other images or labels"):
        train(config, training_images, out, "cpu", 0, tmp_path / "others.npz")


# In bf16, another order of sums changes single steps of Adam, so the test uses float32.
IN_FLOAT32 = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import kp_training.train
from kp_frontend.cli import main
kp_training.train.native_bf16 = lambda device: False
sys.exit(main())
"""


def test_two_processes_train_like_one(training_images, training_labels, tmp_path, monkeypatch):
    config = small("tiny", steps=3, batch=4, micro_batch=1, validate_every=3)
    monkeypatch.setattr(loop, "native_bf16", lambda device: False)
    train(config, training_images, tmp_path / "one", "cpu", 0, training_labels)
    program = tmp_path / "in_float32.py"
    program.write_text(IN_FLOAT32)
    words = command(config, training_images, training_labels, tmp_path / "two", tmp_path)[2:]
    together = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    together += [str(program), *words]
    child = start(together)
    said, _ = child.communicate(timeout=240)
    assert child.returncode == 0, said
    one, two = (load_file(tmp_path / n / "last.safetensors") for n in ("one", "two"))
    torch.manual_seed(config.seed)
    begun = build_network(config.size).state_dict()
    moved = []
    for name, tensor in begun.items():
        # The statistics of batch normalisation are those of the first process only.
        if "running" not in name and "batches" not in name:
            key = f"network.{name}"
            torch.testing.assert_close(one[key], two[key], rtol=1e-3, atol=2e-4, msg=name)
            moved.append((one[key] - tensor).abs().max().item())
    assert len(moved) > 30 and min(moved) > 2e-3  # ten times the tolerance


@pytest.mark.parametrize(("bad", "message"), [(float("nan"), "nan"), (1e6, "running average")])
def test_a_diverging_loss_stops_the_run_and_keeps_the_last_good_state(
    bad, message, training_images, training_labels, tmp_path, monkeypatch
):
    config = small("tiny", steps=8, batch=1, micro_batch=0, validate_every=2)
    real, calls = loop.losses, []

    def broken(network, batch, config, bf16=False):
        total, parts = real(network, batch, config, bf16)
        calls.append(total)
        return (total * bad if len(calls) == 4 else total), parts

    monkeypatch.setattr(loop, "losses", broken)
    with pytest.raises(FloatingPointError, match=f"{message}.*last good state"):
        train(config, training_images, tmp_path, "cpu", 0, training_labels)
    kept = load_file(tmp_path / "last.safetensors")
    assert all(tensor.isfinite().all() for tensor in kept.values())
    monkeypatch.setattr(loop, "losses", real)  # the run can be resumed
    train(config, training_images, tmp_path, "cpu", 0, training_labels)
    assert read_log(tmp_path / "log.jsonl")[-1]["step"] == 8


def test_weights_that_become_nan_stop_the_run(training_images, training_labels, tmp_path):
    config = small("tiny", steps=3, validate_every=1, learning_rate=1e9)
    with pytest.raises(FloatingPointError, match="loss is nan"):
        train(config, training_images, tmp_path, "cpu", 0, training_labels)


def test_a_run_does_not_resume_from_other_start_weights(training_images, training_labels, tmp_path):
    config = small("tiny", steps=2, validate_every=1)
    best = train(config, training_images, tmp_path / "a", "cpu", 0, training_labels)
    assert best.stat().st_mode & 0o044  # readable by others: the node may run as another user
    with pytest.raises(ValueError, match="from other weights"):
        train(config, training_images, tmp_path / "a", "cpu", 0, training_labels, start="tiny")


def test_a_larger_network_starts_from_the_released_small_one(
    training_images, training_labels, tmp_path
):
    data = (training_images, tmp_path, "cpu", 0, training_labels)
    best = train(small("base", 1, steps=2, validate_every=1), *data, start="tiny")
    assert load_network(best).config == SIZES["base"]
    rows = read_log(tmp_path / "log.jsonl")
    first = next(row for row in rows if "validation_matching" in row)
    assert first["validation_matching"] > 0.3  # close to 0 for a random network
    with pytest.raises(ValueError, match="cannot start from a larger network"):
        train(small("tiny"), training_images, tmp_path / "b", "cpu", 0, None, start=best)


def test_a_run_ends_early_without_improvement(
    training_images, training_labels, tmp_path, monkeypatch
):
    config = small("tiny", steps=50, batch=1, micro_batch=0, validate_every=1, patience=2,
                   keep_every=2)  # fmt: skip
    values = iter([3.0, 2.0, 2.5, 2.25])
    monkeypatch.setattr(loop.Validator, "__call__", lambda self, network: {"loss": next(values)})
    train(config, training_images, tmp_path, "cpu", 0, training_labels)
    run = json.loads((tmp_path / "run.json").read_text())
    assert run["steps"] == 4 and run["best"]["step"] == 2
    kept = sorted(path.name for path in tmp_path.glob("step_*.safetensors"))
    assert kept == ["step_000002.safetensors", "step_000004.safetensors"]
    best, second = load_file(tmp_path / "best.safetensors"), load_file(tmp_path / kept[0])
    assert all(torch.equal(best[name], second[name]) for name in best)


def test_stereo_scenes_can_be_used_for_validation(training_images, training_labels, tmp_path):
    """A pair with the right image shifted by eight pixels."""
    image = cv2.imread(str(training_images / "camera.png"), cv2.IMREAD_GRAYSCALE)
    scene = tmp_path / "scenes" / "moved"
    scene.mkdir(parents=True)
    cv2.imwrite(str(scene / "left.png"), image[:, :320])
    cv2.imwrite(str(scene / "right.png"), image[:, 8:328])
    cv2.imwrite(str(scene / "truth.png"), np.full((300, 320), 8, np.uint8))
    entry = {
        "dir": "moved",
        "left": "left.png",
        "right": "right.png",
        "gt": "truth.png",
        "scale": 1,
    }
    (tmp_path / "scenes/scenes.json").write_text(json.dumps([entry]))
    config = small("tiny", steps=1, batch=1, micro_batch=0)
    train(config, training_images, tmp_path / "run", "cpu", 0, training_labels,
          start="tiny", middlebury=tmp_path / "scenes")  # fmt: skip
    row = read_log(tmp_path / "run/log.jsonl")[-1]
    assert row["validation_middlebury_disparity_accuracy"] > 0.8
    assert row["validation_middlebury_correct_matches"] > 100


def test_missing_start_weights_are_rejected_before_any_work(training_images, tmp_path):
    with pytest.raises(ValueError, match="no weights 'nope'"):
        train(small("tiny"), training_images, tmp_path / "run", "cpu", start="nope")
    assert not (tmp_path / "run").exists()
