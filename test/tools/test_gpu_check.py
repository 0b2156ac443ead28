"""The stand-ins of `bench/gpu_check.py`, against what they stand for."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy.spatial import cKDTree

from kp_frontend.network import weights_path

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture(scope="module")
def standins():
    if not BENCH.is_dir():  # an installed package is tested
        pytest.skip("no folder bench here")
    spec = importlib.util.spec_from_file_location("standins", BENCH / "standins.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_reader_of_weights_reads_what_safetensors_does(standins, tmp_path):
    path = weights_path("tiny")
    expected, found = load_file(path), standins.load_file(path)
    assert expected.keys() == found.keys() and len(expected) > 50
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
    (tmp_path / "bad").write_bytes(b"no weights at all")
    with pytest.raises(standins.SafetensorError):
        standins.SafeFile(str(tmp_path / "bad"))


def test_the_tree_finds_the_nearest_points(standins):
    rng = np.random.default_rng(0)
    points, others = rng.normal(size=(50, 2)), rng.normal(size=(20, 2))
    for found, expected in zip(
        standins.KDTree(points).query(others, range(1, 5)),
        cKDTree(points).query(others, range(1, 5)),
        strict=True,
    ):
        np.testing.assert_allclose(found, expected)
