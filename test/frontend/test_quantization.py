"""int8: rounding, ranges in the weights file, and the engines that use them."""

from __future__ import annotations

import json
import logging

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from kp_frontend.backends import BackendOptions, make_backend, openvino_backend, processor
from kp_frontend.backends.agreement import agreement, check_images, reference
from kp_frontend.backends.engine_cache import EngineCache
from kp_frontend.backends.openvino_backend import best_precisions
from kp_frontend.backends.torch_backend import TorchBackend
from kp_frontend.config import FrontendConfig
from kp_frontend.frontend import StereoFrontend
from kp_frontend.network import (
    Normalisation,
    activations,
    build_network,
    channels_last,
    folded,
    load_for_inference,
    load_network,
    released_weights,
    save_network,
)
from kp_frontend.pipeline import StereoPipeline
from kp_frontend.quantization import Rounded, RoundedImage, quantized, with_quantized_network
from kp_training.grow import grow

HEIGHT, WIDTH = 96, 128


@pytest.fixture(scope="module")
def pipeline() -> tuple[StereoPipeline, tuple[torch.Tensor, ...]]:
    """A small pipeline of weights with ranges, and inputs for it."""
    frontend = StereoFrontend(FrontendConfig(backend="torch", max_keypoints=64))
    pipe = StereoPipeline(frontend.network, frontend.config, HEIGHT, WIDTH).eval()
    inputs = (check_images(HEIGHT, WIDTH), *frontend.blank_inputs(WIDTH))
    return pipe, tuple(torch.from_numpy(array) for array in inputs)


@pytest.mark.parametrize("limits", [(0.0, 2.0), (-1.0, 2.0)])
def test_a_result_is_rounded_to_eight_bits(limits):
    values = torch.linspace(-3, 3, 10_001)
    found = Rounded(torch.nn.Identity(), limits)(values)
    assert 200 < len(found.unique()) <= 256
    assert 0.0 in found  # zero padding stays exact
    inside = (values > limits[0]) & (values < limits[1])
    assert (found - values)[inside].abs().max() <= 1.01 * (limits[1] - limits[0]) / 255
    assert found.max() == pytest.approx(limits[1], abs=0.02)


def test_ranges_are_kept_with_the_weights(tmp_path):
    network = load_network("tiny")
    assert network.ranges.keys() == activations(network).keys()
    save_network(network, tmp_path / "w.safetensors")
    loaded = load_network(tmp_path / "w.safetensors")
    for copied in (loaded, folded(network)):
        assert copied.ranges == network.ranges
        assert copied.corrections.keys() == network.corrections.keys()
        for name, correction in network.corrections.items():
            assert torch.equal(copied.corrections[name], correction)


def test_weights_that_are_trained_further_have_no_ranges(tmp_path):
    """Ranges belong to the weights on which they were measured."""
    network = build_network("tiny")
    grow(load_network("tiny"), network)
    assert not network.ranges and not network.corrections
    save_network(network, tmp_path / "w.safetensors")
    assert "ranges" not in safe_open(tmp_path / "w.safetensors", "pt").metadata()


@pytest.mark.parametrize(
    "wrong",
    [
        lambda ranges: {"elsewhere": [0, 1]},
        lambda ranges: ranges | {"eighth_sum": [1, 2]},
        lambda ranges: ranges | {"eighth_sum": [0, float("nan")]},
        lambda ranges: ranges | {"eighth_sum": [0, 0]},
    ],
    ids=["of another network", "without zero", "not a number", "empty"],
)
def test_unusable_ranges_are_refused(tmp_path, wrong):
    network = load_network("tiny")
    file = tmp_path / "w.safetensors"
    save_network(network, file)
    header = safe_open(file, "pt").metadata()
    header["ranges"] = json.dumps(wrong(network.ranges))
    save_file(load_file(file), file, metadata=header)
    with pytest.raises(ValueError, match="kp quantize"):
        load_network(file)


def test_corrections_of_another_network_are_refused(tmp_path):
    network = load_network("tiny")
    file = tmp_path / "w.safetensors"
    save_network(network, file)
    header, tensors = safe_open(file, "pt").metadata(), load_file(file)
    tensors["int8_correction.coarse"] = torch.zeros(3)
    save_file(tensors, file, metadata=header)
    with pytest.raises(ValueError, match="kp quantize"):
        load_network(file)


def test_the_image_is_rounded_without_an_error():
    image = torch.arange(256.0)
    exact = Normalisation()(image) - RoundedImage.OFFSET
    assert torch.equal(RoundedImage()(image), exact)


def test_without_ranges_int8_is_refused_by_name(tmp_path):
    network = load_network("tiny")
    network.ranges, network.corrections = {}, {}
    file = tmp_path / "w.safetensors"
    save_network(network, file)
    with pytest.raises(ValueError, match=f"kp quantize {file} --images DIR --out FILE"):
        StereoFrontend(FrontendConfig(model=str(file), precision="int8"))
    assert "int8" not in best_precisions(load_for_inference(file))


@pytest.mark.parametrize("model", released_weights())
def test_released_weights_lose_little(model):
    network = load_for_inference(model)
    rounded = quantized(network)
    image = torch.from_numpy(check_images(128, 160))[:1, None].float()
    with torch.inference_mode():
        (logits, _), (found, _) = network(image), rounded(image)
    strong = logits > -3.0
    assert strong.sum() > 50
    assert 0.0 < (found - logits)[strong].abs().median() < 0.15


def test_the_engine_runs_int8_kernels_and_agrees(pipeline, tmp_path, caplog):
    pipe, inputs = pipeline
    options = BackendOptions(precision="int8", cache=EngineCache(tmp_path))
    engine = make_backend("openvino", pipe, inputs, options)
    assert engine.precision == "int8"
    assert agreement(reference(pipe, inputs), engine(*(x.numpy() for x in inputs))).good
    assert not caplog.records
    if processor.int8_dot_products() is not None:
        assert np.mean([kind.endswith("I8") for kind in convolution_kernels(engine)]) > 0.9


def convolution_kernels(engine: openvino_backend.OpenVinoBackend) -> list[str]:
    """The kernels that a compiled model took for its convolutions."""
    operations = engine.image.requests[0].get_compiled_model().get_runtime_model().get_ordered_ops()
    details = [operation.get_rt_info() for operation in operations]
    return [
        info["primitiveType"].astype(str)
        for info in details
        if info["layerType"].astype(str) in ("Convolution", "Deconvolution")
    ]


def test_auto_takes_int8_where_the_processor_is_made_for_it(pipeline, monkeypatch):
    network = pipeline[0].network
    monkeypatch.setattr(openvino_backend, "int8_dot_products", lambda: "avx512_vnni")
    assert best_precisions(network)[0] == "int8"
    monkeypatch.setattr(openvino_backend, "int8_dot_products", lambda: None)
    assert "int8" not in best_precisions(network)


def test_auto_passes_over_int8_that_does_not_agree(pipeline, tmp_path, monkeypatch, caplog):
    pipe, inputs = pipeline

    def compile_parts(stored: bytes, precision: str, threads: int) -> TorchBackend:
        engine = TorchBackend(pipe, precision=precision)
        if precision == "int8":
            engine.pipeline.network.descriptor[-1].weight.data.neg_()
        return engine

    monkeypatch.setattr(openvino_backend, "convert_parts", lambda *_: b"")
    monkeypatch.setattr(openvino_backend, "compile_parts", compile_parts)
    monkeypatch.setattr(openvino_backend, "int8_dot_products", lambda: "avx512_vnni")
    with caplog.at_level(logging.WARNING):
        engine = make_backend("openvino", pipe, inputs, BackendOptions(cache=EngineCache(tmp_path)))
    assert engine.precision in ("bf16", "fp32")
    assert "openvino int8 does not agree with the reference" in caplog.text
    options = BackendOptions(precision="int8", cache=EngineCache(tmp_path))
    with pytest.raises(ValueError, match="does not agree"):
        make_backend("openvino", pipe, inputs, options)


def test_torch_runs_int8_as_a_reference(pipeline):
    pipe, inputs = pipeline
    engine = make_backend("torch", pipe, inputs, BackendOptions(precision="int8"))
    found = engine(*(tensor.numpy() for tensor in inputs))
    assert engine.precision == "int8"
    # In the same order of sums: in another one, a value between two steps may round to either.
    same = agreement(reference(channels_last(with_quantized_network(pipe)), inputs), found)
    other = agreement(reference(pipe, inputs), found)
    assert same.distance < other.distance / 3 and 1 - same.cosine < (1 - other.cosine) / 3


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ("flags : fpu avx2 avx512_vnni avx512_bf16", "avx512_vnni"),
        ("flags : fpu avx2 avx_vnni", "avx_vnni"),
        ("flags : fpu avx2 avx512f", None),
        ("Features : fp asimd asimddp i8mm", None),
    ],
)
def test_what_the_processor_has_is_read(monkeypatch, entry, expected):
    name, _, value = entry.partition(" : ")
    monkeypatch.setattr(processor, "processor", lambda: {name: value})
    assert processor.int8_dot_products() == expected
