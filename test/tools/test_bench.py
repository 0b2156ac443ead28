"""`kp doctor` and `kp bench`: what they write, not how fast it is."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from kp_frontend.cli import main
from kp_frontend.tools.bench import EAGER, Row, bench_pair, ratios
from kp_frontend.tools.peers import SuperPointShape
from kp_frontend.tools.roofline import count


def test_doctor_reports_machine_ros_and_every_backend(tmp_path, capsys):
    file = tmp_path / "doctor.json"
    assert main(["doctor", "--size", "320x256", "--json", str(file)]) == 0
    report = json.loads(file.read_text())
    assert int(report["machine"]["cores"]) >= 1
    assert report["machine"]["torch"].startswith("2.13.0")
    assert report["ros"]["message_filters"] and report["ros"]["RMW"]
    rows = {row["backend"]: row for row in report["backends"]}
    assert list(rows) == ["tensorrt", "cuda", "openvino", "torch"]
    assert rows["torch"]["ms"] > 0 and "100.0%" in rows["torch"]["state"]
    for row in rows.values():  # either measured or a reason
        assert row["state"] and (row["ms"] is None) == (row["precision"] is None)
    assert rows[report["auto"]]["ms"] > 0
    assert "auto selects" in capsys.readouterr().out


def test_bench_measures_methods_beside_each_other(tmp_path, capsys):
    file = tmp_path / "bench.json"
    command = "bench --sizes 320x240 --methods tiny,orb,sift --backends torch --rounds 3 --json"
    assert main([*command.split(), str(file)]) == 0
    report = json.loads(file.read_text())
    rows = {(row["method"], row["stage"]): row for row in report["rows"]}
    assert set(rows) == {
        ("tiny", "network"),
        ("tiny", "network+detection"),
        ("tiny", "total"),
        ("tiny", "without tracks"),
        ("tiny", "roofline"),
        ("orb", "total"),
        ("sift", "total"),
    }
    for row in rows.values():
        assert 0 < row["median_ms"] <= row["p95_ms"]
        assert row["size"] == "320x240"
        assert (row["peak_rss_mb"] is None) == (row["stage"] != "total")
    assert [ratio["stage"] for ratio in report["ratios"]] == ["total", "without tracks"]
    for ratio in report["ratios"]:
        mine = rows["tiny", ratio["stage"]]["median_ms"]
        assert ratio["orb"] == pytest.approx(rows["orb", "total"]["median_ms"] / mine)
        assert ratio["after_network"] == pytest.approx(
            1 - rows["tiny", "network"]["median_ms"] / mine
        )
        assert ratio["of_roofline"] > 0
    assert set(report["machine"]) >= {"processor", "cores", "torch"}


def test_ratios_compare_only_what_has_one_size():
    rows = [
        Row("tiny", "torch", "fp32", "a", "network", 6.0, 7.0, None),
        Row("tiny", "torch", "fp32", "a", "total", 10.0, 11.0, 100.0),
        Row("tiny", "torch", "fp32", "a", "without tracks", 8.0, 9.0, None),
        Row("tiny", "torch", "fp32", "a", "roofline", 3.0, 3.0, None),
        Row("orb", "opencv", "uint8", "a", "total", 30.0, 31.0, 50.0),
        Row("orb", "opencv", "uint8", "b", "total", 99.0, 99.0, 50.0),
    ]
    row, untracked = ratios(rows)
    assert row["orb"] == 3.0 and untracked["orb"] == 3.75
    assert row["after_network"] == pytest.approx(0.4)
    assert untracked["after_network"] == pytest.approx(0.25)
    assert row["of_roofline"] == pytest.approx(0.5)
    assert row["eager"] is None
    assert ratios(rows[1:2])[0]["after_network"] is None


def test_gpu_engines_are_compared_with_plain_torch_on_the_gpu():
    rows = [
        Row("tiny", "cuda", "fp16", "a", "total", 0.5, 0.6, 100.0),
        Row("tiny", EAGER, "fp32", "a", "total", 5.0, 5.0, 100.0),
        Row("tiny", "openvino", "bf16", "a", "total", 10.0, 10.0, 100.0),
    ]
    found = {row["backend"]: row["eager"] for row in ratios(rows)}
    assert found == {"cuda": 10.0, EAGER: None, "openvino": None}


def test_the_roofline_counts_operations_and_bytes():
    layer = torch.nn.Conv2d(4, 8, 3, padding=1, bias=False)
    operations, moved = count(
        torch.nn.Sequential(layer, torch.nn.ReLU()), torch.zeros(1, 4, 16, 16)
    )
    assert operations == 2 * 8 * 4 * 9 * 16 * 16
    assert moved == 4 * (8 * 4 * 9 + (4 + 8) * 16 * 16)  # weights, input, output; ReLU is fused


def test_the_superpoint_shape_costs_what_superpoint_does():
    network = SuperPointShape()
    counter = torch.utils.flop_counter.FlopCounterMode(display=False)
    with torch.inference_mode(), counter:
        assert network(torch.zeros(1, 1, 480, 640)).shape == (1, 65 + 256, 60, 80)
    assert counter.get_total_flops() == pytest.approx(52.1e9, rel=0.01)


def test_the_pair_has_the_size_asked_for():
    for width, height in ((320, 240), (1920, 1080)):
        pair = bench_pair(width, height)
        assert pair.shape == (2, height, width) and pair.dtype == np.uint8


@pytest.mark.parametrize(
    "command",
    [
        "bench --backends abacus",
        "bench --sizes 320x240 --methods nothing --backends torch",
        "doctor --model nothing",
    ],
)
def test_a_wrong_option_ends_in_one_line(command, capsys):
    assert main(command.split()) == 1
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
