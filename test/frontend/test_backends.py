"""Engines: the cache, agreement with the reference, and what TensorRT is given."""

from __future__ import annotations

import copy
import ctypes
import dataclasses
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._decomp import get_decompositions
from torch._export.utils import _collect_all_valid_cia_ops_for_aten_namespace, _get_decomp_for_cia

from kp_frontend.backends import (
    BACKENDS,
    BackendOptions,
    backend_module,
    make_backend,
    openvino_backend,
)
from kp_frontend.backends.agreement import (
    RIGHT_ROW,
    Agreement,
    agreement,
    check_images,
    check_inputs,
    reference,
    require,
)
from kp_frontend.backends.engine_cache import EngineCache
from kp_frontend.backends.tensorrt_backend import export
from kp_frontend.calibration import identity_maps
from kp_frontend.config import FrontendConfig
from kp_frontend.frontend import StereoFrontend
from kp_frontend.pipeline import PipelineResults, StereoPipeline
from kp_frontend.uncertainty import Uncertainty

HEIGHT, WIDTH = 96, 128
CONFIG = FrontendConfig(backend="torch", max_keypoints=64, max_motion=0.0)  # quick to build
KEY = {"backend": "test", "weights": "abc"}


@pytest.fixture(scope="module")
def pipeline() -> tuple[StereoPipeline, tuple[torch.Tensor, ...]]:
    """A small pipeline and inputs for it."""
    frontend = StereoFrontend(CONFIG)
    pipe = StereoPipeline(
        frontend.network, frontend.config, HEIGHT, WIDTH, uncertainty=frontend.uncertainty
    ).eval()
    inputs = (check_images(HEIGHT, WIDTH), *frontend.blank_inputs(WIDTH))
    return pipe, tuple(torch.from_numpy(array) for array in inputs)


@pytest.fixture(scope="module")
def raw_pipeline(pipeline) -> tuple[StereoPipeline, tuple[torch.Tensor, ...]]:
    """The same for raw images, and with tracks."""
    pipe, (images, *_) = pipeline
    frontend = StereoFrontend(dataclasses.replace(CONFIG, max_motion=64.0))
    raw = StereoPipeline(
        pipe.network, frontend.config, HEIGHT, WIDTH, True, pipe.uncertainty
    ).eval()
    others = (*frontend.blank_inputs(WIDTH), identity_maps(WIDTH, HEIGHT))
    return raw, (images, *(torch.from_numpy(array) for array in others))


def test_the_pipeline_for_raw_images_gives_the_same_where_they_are_rectified(
    pipeline, raw_pipeline, tmp_path
):
    (pipe, inputs), (raw, raw_inputs) = pipeline, raw_pipeline
    expected, found = reference(pipe, inputs), reference(raw, raw_inputs)
    want = PipelineResults.of(expected, False, pipe.tracked)
    got = PipelineResults.of(found, True, raw.tracked)
    assert (got.right_row >= 0).sum() > 10
    np.testing.assert_array_equal(got.right_row, want.right_row)
    for name in ("xy", "scores", "descriptors", "point_sigma", "similarity", "disparity"):
        np.testing.assert_allclose(getattr(got, name), getattr(want, name), atol=1e-3)
    matched = got.right_row >= 0
    for name in ("sigma", "confidence"):
        values = (getattr(results, name)[matched] for results in (got, want))
        np.testing.assert_allclose(*values, atol=5e-3)
    np.testing.assert_allclose(got.places, want.xy, atol=1e-4)
    options = BackendOptions(precision="fp32", cache=EngineCache(tmp_path))
    engine = make_backend("openvino", raw, raw_inputs, options)
    converted = engine(*(tensor.numpy() for tensor in raw_inputs))
    assert agreement(found, converted).good
    converted = PipelineResults.of(converted, True, raw.tracked)
    np.testing.assert_allclose(converted.places, converted.xy, atol=1e-3)


def test_an_engine_is_built_once_and_kept(tmp_path):
    cache, built = EngineCache(tmp_path / "new"), []

    def build() -> bytes:
        built.append(1)
        return b"engine\n\nbytes"

    for _ in range(2):
        assert cache.engine(KEY, build, bytes) == b"engine\n\nbytes"
    assert len(built) == 1
    assert cache.read(KEY | {"weights": "abd"}) is None
    assert [p.suffix for p in (tmp_path / "new").iterdir()] == [".engine"]  # nothing half-written


@pytest.mark.parametrize(
    "damage",
    [
        lambda good: good[:-1],
        lambda good: good[:10],
        lambda good: b"",
        lambda good: good[:-1] + b"x",
        lambda good: good.replace(b'"abc"', b'"abd"'),
        lambda good: b"something else",
    ],
    ids=["cut", "cut in the head", "empty", "flipped", "of other weights", "foreign"],
)
def test_a_bad_file_is_logged_and_the_engine_rebuilt(tmp_path, caplog, damage):
    cache = EngineCache(tmp_path)
    cache.write(KEY, b"engine")
    file = cache.path(KEY)
    good = file.read_bytes()
    file.write_bytes(damage(good))
    with caplog.at_level(logging.WARNING):
        assert cache.engine(KEY, lambda: b"engine", bytes) == b"engine"
    assert "rebuilding the engine" in caplog.text
    assert file.read_bytes() == good


def test_an_engine_that_fails_its_check_is_rebuilt(tmp_path, caplog):
    cache = EngineCache(tmp_path)
    cache.write(KEY, b"stale")

    def load(stored: bytes) -> bytes:
        if stored == b"stale":
            raise RuntimeError("does not\nagree\n")
        return stored

    assert cache.engine(KEY, lambda: b"new", load) == b"new"
    (record,) = caplog.records
    assert record.getMessage().endswith("rebuilding the engine: does not agree")  # one line
    assert cache.read(KEY) == b"new"
    with pytest.raises(RuntimeError, match="does not"):
        cache.engine(KEY | {"weights": "x"}, lambda: b"stale", load)
    assert cache.read(KEY | {"weights": "x"}) is None


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path, caplog):
    (tmp_path / "file").write_text("not a folder")
    assert EngineCache(tmp_path / "file").engine(KEY, lambda: b"engine", bytes) == b"engine"
    assert "could not be stored" in caplog.text


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "torch"])
def test_backend_agrees_with_the_reference(pipeline, tmp_path, backend, caplog):
    reason = backend_module(backend).unavailable()
    if reason:
        pytest.skip(f"{backend}: {reason}")
    pipe, inputs = pipeline
    expected = reference(pipe, inputs)
    options = BackendOptions(cache=EngineCache(tmp_path))
    for _ in range(2):  # built, then from the cache
        engine = make_backend(backend, pipe, inputs, options)
        found = engine(*(tensor.numpy() for tensor in inputs))
        assert [a.shape for a in found] == [a.shape for a in expected]
        assert agreement(expected, found).good
    assert not caplog.records


def test_agreement_notices_what_it_should(pipeline):
    pipe, inputs = pipeline
    expected = reference(pipe, inputs)
    assert agreement(expected, expected).share == 1.0
    assert agreement(expected, expected).cosine == pytest.approx(1.0, abs=1e-5)
    for part, change in ((0, 3.0), (2, 0.5)):  # keypoints moved, descriptors turned
        wrong = [array.copy() for array in expected]
        wrong[part] += np.float32(change)
        if part == 2:
            wrong[2] /= np.linalg.norm(wrong[2], axis=-1, keepdims=True)
        assert not agreement(expected, wrong).good
    assert Agreement(15 / 16, 1, 0.0, 1.0).good  # of a small image one may be missed, not two
    assert not Agreement(14 / 16, 2, 0.0, 1.0).good
    assert not Agreement(0.0, 1, 9.0, 0.0).good
    nothing = [array.copy() for array in expected]
    nothing[1][:] = 0
    assert not agreement(expected, nothing).good


def test_openvino_refuses_an_engine_that_does_not_agree(pipeline, tmp_path):
    """An engine of other weights under this pipeline's name is found out by the check."""
    pipe, inputs = pipeline
    options = BackendOptions(precision="fp32", cache=EngineCache(tmp_path))
    make_backend("openvino", pipe, inputs, options)
    network = copy.deepcopy(pipe.network)
    with torch.no_grad():  # descriptors of other weights
        network.descriptor[-1].weight.copy_(network.descriptor[-1].weight.roll(1, 0))
    other = StereoPipeline(network, CONFIG, HEIGHT, WIDTH).eval()
    other.fingerprint = pipe.fingerprint  # a lie
    (stored,) = tmp_path.iterdir()
    before = stored.read_bytes()
    make_backend("openvino", other, inputs, options)
    assert stored.read_bytes() != before


@pytest.fixture(scope="module")
def openvino_engine(pipeline, tmp_path_factory):
    """OpenVINO's engine of the small pipeline."""
    cache = EngineCache(tmp_path_factory.mktemp("engines"))
    return make_backend("openvino", *pipeline, BackendOptions(precision="fp32", cache=cache))


def test_openvino_takes_images_of_any_layout_and_goes_on_after_an_error(pipeline, openvino_engine):
    _, inputs = pipeline
    engine = openvino_engine
    images, *others = (tensor.numpy() for tensor in inputs)
    expected = engine(images, *others)
    kept = [array.copy() for array in expected]
    wide = np.repeat(images, 2, axis=2)
    turned = images.transpose(0, 2, 1).copy()
    mixed = images[0], wide[1, :, ::2]
    for pair in ((*images,), wide[:, :, ::2], turned.transpose(0, 2, 1), mixed):
        for one, other in zip(expected, engine(pair, *others), strict=True):
            np.testing.assert_array_equal(one, other)
    engine(images[::-1], *others)
    with pytest.raises(RuntimeError):  # the right image has the wrong size
        engine((images[0], images[1, :, :-1]), *others)
    for one, other, before in zip(expected, engine(images, *others), kept, strict=True):
        np.testing.assert_array_equal(one, before)  # results of a call are not overwritten
        np.testing.assert_array_equal(one, other)


def test_openvino_sends_no_usage_statistics(tmp_path):
    """Its telemetry would count the import in a file in the home folder, and send it."""
    code = (
        "from kp_frontend.backends import openvino_backend as backend\n"
        "import torch, openvino\n"
        "backend.convert(torch.nn.ReLU(), (torch.zeros(1, 2),))\n"
    )
    home = {**os.environ, "HOME": str(tmp_path)}
    home.pop("CI", None)
    subprocess.run([sys.executable, "-c", code], env=home, check=True, timeout=120)
    assert not (tmp_path / "intel").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="signal stacks are asked for as on Linux")
def test_openvino_leaves_signals_on_a_roomy_stack(openvino_engine):
    """The one that OpenVINO sets is too small for Python's handlers."""
    stack = openvino_backend._SignalStack()
    assert ctypes.CDLL(None).sigaltstack(None, ctypes.byref(stack)) == 0
    disabled = 2
    assert stack.flags & disabled or stack.size >= 2**16


@pytest.mark.parametrize(
    "settings",
    [{"score_threshold": 0.9}, {"border": 38}, {"max_keypoints": 16, "height": 32, "width": 32}],
)
def test_an_engine_is_checked_whatever_the_settings(tmp_path, monkeypatch, caplog, settings):
    """Settings under which the check's images give few keypoints or none refuse no good engine.

    fp32, which must agree always; of few keypoints int8 may miss more than the check allows.
    """
    monkeypatch.setenv("KP_ENGINE_CACHE", str(tmp_path))
    size = settings.pop("height", HEIGHT), settings.pop("width", WIDTH)
    config = FrontendConfig(
        backend="openvino",
        precision="fp32",
        **({"max_keypoints": 64, "max_motion": 0.0} | settings),
    )
    for _ in range(2):
        StereoFrontend(config).warm_up(*size)
    assert not caplog.records
    assert len(list(tmp_path.iterdir())) == 1


def test_an_impossible_choice_is_refused(pipeline):
    pipe, inputs = pipeline
    with pytest.raises(ValueError, match="unknown backend 'abacus'"):
        make_backend("abacus", pipe, inputs, BackendOptions())
    with pytest.raises(ValueError, match="unknown precision 'fp7'"):
        make_backend("torch", pipe, inputs, BackendOptions(precision="fp7"))
    with pytest.raises(ValueError, match="only fp32"):
        make_backend("torch", pipe, inputs, BackendOptions(precision="bf16"))


def test_torch_runs_on_the_device_asked_for(pipeline):
    pipe, inputs = pipeline
    with pytest.raises(ValueError, match="abacus"):
        make_backend("torch", pipe, inputs, BackendOptions(device="abacus"))
    engine = make_backend("torch", pipe, inputs, BackendOptions(device="cpu"))
    assert next(engine.pipeline.parameters()).device.type == "cpu"
    assert agreement(reference(pipe, inputs), engine(*(t.numpy() for t in inputs))).share == 1.0


def test_an_engine_that_loses_matches_or_is_not_finite_is_refused(pipeline):
    pipe, inputs = pipeline
    expected = reference(pipe, check_inputs(inputs))
    require("engine", expected, expected)
    fewer, broken = ([array.copy() for array in expected] for _ in range(2))
    fewer[RIGHT_ROW][:] = -1
    with pytest.raises(RuntimeError, match="finds 0 matches"):
        require("engine", expected, fewer)
    broken[RIGHT_ROW + 4][0] = np.nan
    with pytest.raises(RuntimeError, match="not finite"):
        require("engine", expected, broken)


def test_an_engine_file_that_is_not_used_is_reported(pipeline, caplog):
    pipe, inputs = pipeline
    make_backend("torch", pipe, inputs, BackendOptions(engine="none.engine"))
    assert "engine none.engine is not used: it is for the backend tensorrt" in caplog.text


def test_auto_takes_the_next_backend_and_says_why_once(pipeline, tmp_path, caplog, monkeypatch):
    pipe, inputs = pipeline
    module = backend_module("openvino")

    def fail(*_: object) -> None:
        raise Exception("no luck\n\ntoday\n")  # as torch_tensorrt raises

    monkeypatch.setattr(module, "build", fail)
    for name in ("tensorrt", "cuda"):
        monkeypatch.setattr(backend_module(name), "unavailable", lambda: "no GPU")
    engine = make_backend("auto", pipe, inputs, BackendOptions(cache=EngineCache(tmp_path)))
    assert engine.name == "torch"
    assert caplog.text.count("no luck today") == 1


def test_tensorrt_converts_every_operator(raw_pipeline):
    """The exported graph after torch-tensorrt's own lowering has only operators it converts."""
    known = json.loads((Path(__file__).parent / "tensorrt_operators.json").read_text())

    def operators(names: list[str]) -> list:
        found = []
        for name in names:
            place = torch.ops
            for part in name.split("."):
                place = getattr(place, part, None)
            if place is not None:
                found.append(place)
        return found

    disabled = set(operators(known["disabled_decompositions"]))
    table = dict(get_decompositions(operators(known["enabled_decompositions"])))
    for op in _collect_all_valid_cia_ops_for_aten_namespace():
        if op not in disabled:
            table[op] = _get_decomp_for_cia(op)
    graph = export(*raw_pipeline, "fp16").run_decompositions(table).graph
    used = {
        str(node.target)
        for node in graph.nodes
        if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload)
    }
    able = set(known["converters"]) | set(known["own_decompositions"])
    removed = {"aten._assert_tensor_metadata.default"}  # by a lowering pass
    missing = {
        name
        for name in used - removed
        if name not in able and name.rpartition(".")[0] not in able  # a converter of all overloads
    }
    assert len(used) > 20
    assert not missing


def test_nothing_is_copied_from_the_host_inside_the_pipeline(raw_pipeline):
    """A constant made from a Python list would be: a CUDA graph cannot capture that."""
    graph = torch.export.export(*raw_pipeline, strict=False).graph
    copies = {"aten.lift_fresh_copy.default", "aten._local_scalar_dense.default"}
    assert not copies & {str(node.target) for node in graph.nodes}


def test_the_fingerprint_follows_weights_and_settings(pipeline):
    pipe, _ = pipeline
    known, config = pipe.uncertainty, CONFIG
    same = StereoPipeline(pipe.network, config, HEIGHT, WIDTH, False, known)
    assert same.fingerprint() == pipe.fingerprint()
    for changed in (
        StereoPipeline(pipe.network, config, HEIGHT, WIDTH + 16, False, known),
        StereoPipeline(
            pipe.network, dataclasses.replace(config, nms_radius=5), HEIGHT, WIDTH, False, known
        ),
        StereoPipeline(
            type(pipe.network)(pipe.network.config), config, HEIGHT, WIDTH, False, known
        ),
        StereoPipeline(pipe.network, config, HEIGHT, WIDTH, False, Uncertainty()),
    ):
        assert changed.fingerprint() != pipe.fingerprint()
