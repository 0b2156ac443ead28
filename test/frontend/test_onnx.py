"""The exported graph in ONNX Runtime, and TensorRT engines that are built from it."""

from __future__ import annotations

import copy
import ctypes
import dataclasses
import functools
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from kp_frontend.backends import BackendOptions, backend_module, onnx_graph, tensorrt_backend
from kp_frontend.backends.agreement import check_inputs, reference
from kp_frontend.backends.cuda_graph import unpacked
from kp_frontend.backends.tensorrt_library import Library, installed, library
from kp_frontend.cli import main
from kp_frontend.config import FrontendConfig
from kp_frontend.frontend import StereoFrontend
from kp_frontend.pipeline import PipelineResults

onnx = pytest.importorskip("onnx", reason="onnx is not installed (requirements-export.txt)")
pytest.importorskip("onnxscript", reason="onnxscript is not installed (requirements-export.txt)")
runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

HEIGHT, WIDTH = 96, 128
CONFIG = FrontendConfig(backend="torch", max_keypoints=64)
RTX = "tensorrt_rtx_bindings"


@pytest.fixture(scope="module")
def pipeline():
    """A small pipeline for raw images with tracks, which has all operators, and its example."""
    return StereoFrontend(CONFIG).pipeline(HEIGHT, WIDTH, raw=True)


@pytest.fixture(scope="module")
def graph(pipeline) -> bytes:
    """It as an ONNX file. This takes ten seconds, so tests share it."""
    return onnx_graph.export(*pipeline, "fp32")


@pytest.fixture(scope="module")
def networks(pipeline) -> dict[str, bytes]:
    """Its network alone in the precisions of a GPU."""
    return {name: onnx_graph.export_network(*pipeline, name) for name in ("fp16", "int8")}


@pytest.fixture(scope="module")
def rtx() -> Library:
    """TensorRT for RTX, which builds engines without a GPU."""
    if RTX not in installed():
        pytest.skip("tensorrt-rtx-cu13-bindings is not installed (requirements-export.txt)")
    return library(RTX)


def run(content: bytes, inputs: tuple[torch.Tensor, ...]) -> dict[str, np.ndarray]:
    """Results of ONNX Runtime by name, as the graph is written: it has int8 kernels of its own."""
    options = runtime.SessionOptions()
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    session = runtime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    given = {i.name: t.numpy() for i, t in zip(session.get_inputs(), inputs, strict=True)}
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, given), strict=True))


def nearest(xy: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each position, the nearest other one and its distance: equal scores swap ranks."""
    apart = np.linalg.norm(xy[:, None] - others, axis=-1)
    return apart.argmin(1), apart.min(1)


def test_onnx_runtime_finds_what_the_reference_finds(pipeline, graph):
    pipe, example = pipeline
    inputs = check_inputs(example)
    arrays = reference(pipe, inputs)
    expected = PipelineResults.of(arrays, raw=True, tracked=True)
    results = run(graph, inputs)
    assert list(results) == onnx_graph.names(pipe)[1]
    for name, array in zip(results, arrays, strict=True):
        assert results[name].shape == array.shape and results[name].dtype == array.dtype, name
    rows = []
    for side in range(2):
        valid = expected.scores[side] > 0
        assert valid.sum() > 30 and (results["scores"][side] > 0).sum() == valid.sum()
        row, apart = nearest(expected.xy[side][valid], results["xy"][side])
        assert apart.max() < 0.01
        for name in ("descriptors", "places", "point_sigma"):
            want = getattr(expected, name)[side][valid]
            np.testing.assert_allclose(results[name][side][row], want, atol=1e-3, err_msg=name)
        rows.append(row)
    left = np.flatnonzero(expected.right_row >= 0)
    assert len(left) > 10
    matched = results["right_row"][rows[0][left]]
    np.testing.assert_array_equal(matched, rows[1][expected.right_row[left]])
    for name in ("disparity", "sigma", "confidence", "similarity"):
        want = getattr(expected, name)[left]
        np.testing.assert_allclose(results[name][rows[0][left]], want, atol=0.01, err_msg=name)


def test_the_file_names_its_inputs_and_carries_its_description(pipeline, graph):
    model = onnx.load_model_from_string(graph)
    onnx.checker.check_model(model)
    assert [i.name for i in model.graph.input] == [
        "images", "settings", "known_points", "known_descriptors", "known_windows", "maps",
    ]  # fmt: skip
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    assert metadata == onnx_graph.describe(pipeline[0], "fp32")
    assert metadata["size"] == "128x96" and metadata["input"] == "raw"
    wide = {o.name for o in model.graph.output if o.type.tensor_type.elem_type == 7}
    assert not wide  # 64-bit results, which TensorRT warns of


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_the_network_alone_in_lower_precision(pipeline, networks, precision):
    pipe, example = pipeline
    # Mirrored: otherwise one value lies between two steps of int8, and rounds to either.
    images = (check_inputs(example)[0].flip(2),)
    found = run(networks[precision], images)
    assert list(found) == ["logits", "coarse", "fine"]
    with torch.inference_mode():
        exact = onnx_graph.NetworkOnly(pipe)(*images)
        same = onnx_graph.NetworkOnly(onnx_graph.lowered(pipe, precision))(*images)
    for array, plain, rounded in zip(found.values(), exact, same, strict=True):
        spread = plain.std()
        assert np.abs(array - rounded.numpy()).mean() < 0.002 * spread  # as torch rounds
        assert 0 < np.abs(array - plain.numpy()).mean() < 0.1 * spread
    kinds = {node.op_type for node in onnx.load_model_from_string(networks[precision]).graph.node}
    assert ({"QuantizeLinear", "DequantizeLinear"} <= kinds) == (precision == "int8")


def test_tensorrt_builds_an_engine_without_a_warning(rtx, graph):
    """No GPU is needed for this, only for running it."""
    engine = rtx.build(graph, (8, 9))
    assert len(engine) > 1_000_000
    assert not rtx.messages


@pytest.mark.parametrize(("precision", "kind"), [("fp16", "HALF"), ("int8", "FLOAT")])
def test_no_convolution_falls_back_to_a_slower_type(rtx, networks, precision, kind):
    """TensorRT keeps the types of the graph; in int8 it joins a convolution with its neighbours,
    which dequantize what it reads."""
    _, network = rtx.parse(networks[precision])
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    kinds = rtx.api.LayerType
    convolutions = [la for la in layers if la.type in (kinds.CONVOLUTION, kinds.DECONVOLUTION)]
    assert len(convolutions) == 19
    assert {la.get_output(0).dtype.name for la in convolutions} == {kind}
    quantized = [la.get_output(0).dtype.name for la in layers if la.type == kinds.QUANTIZE]
    assert set(quantized) == ({"INT8"} if precision == "int8" else set())
    assert rtx.build(networks[precision], (12, 0)) and not rtx.messages


def test_tensorrt_names_what_it_cannot_do(rtx):
    with pytest.raises(RuntimeError, match=r"supports SM75, .*, not SM90"):
        rtx.build(b"", (9, 0))
    with pytest.raises(RuntimeError, match="cannot read the ONNX graph"):
        rtx.build(b"no graph", (8, 9))
    with pytest.raises(
        RuntimeError, match=r"TensorRT for RTX .* cannot read the engine: .*version"
    ):
        rtx.load(b"an engine of another version" * 100)
    missing = object.__new__(Library)
    missing.name, missing.version, missing._logger = "TensorRT", "10.3", None
    missing.messages = []

    def no_gpu(_):
        missing.messages.append("CUDA initialization failure with error: 35")
        raise TypeError("factory function returned nullptr")

    missing.api = SimpleNamespace(Builder=no_gpu)
    with pytest.raises(RuntimeError, match=r"TensorRT 10.3 cannot start: CUDA .* 35"):
        missing.parse(b"")
    old = object.__new__(Library)
    old.for_rtx, old.name, old.version = False, "TensorRT", "8.6.2"
    assert old.unsupported((8, 7)) == "TensorRT 8.6.2 is too old, version 10 is needed"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": "base"}, "is of another network"),
        ({"nms_radius": 4}, "is for nms_radius 2, not 4"),
        ({"max_keypoints": 32}, "is for max_keypoints 64, not 32"),
        ({"max_motion": 0.0}, "is for tracks on, not off"),
    ],
)
def test_a_file_of_another_pipeline_is_refused_in_one_line(pipeline, tmp_path, change, words):
    file = tmp_path / "small.onnx"
    onnx_graph.write(file, b"graph", onnx_graph.describe(pipeline[0], "fp16"))
    assert onnx_graph.read(file, pipeline[0]) == (b"graph", "fp16")
    other, _ = StereoFrontend(dataclasses.replace(CONFIG, **change)).pipeline(HEIGHT, WIDTH, True)
    with pytest.raises(ValueError, match=words) as error:
        onnx_graph.read(file, other)
    assert "\n" not in str(error.value)


def test_weights_are_told_apart_but_not_by_their_last_bits(pipeline):
    """Folding the batch normalisation gives other last bits on another processor."""
    pipe, _ = pipeline
    signature = onnx_graph.weights_signature(pipe)
    other = copy.deepcopy(pipe)
    with torch.no_grad():
        for parameter in other.network.parameters():
            parameter.mul_(1 + 1e-6 * torch.randn_like(parameter))
    np.testing.assert_allclose(onnx_graph.weights_signature(other), signature, 1e-3, 1e-3)
    with torch.no_grad():  # one layer of a fine-tuned network
        other.network.detector.logits.weight.mul_(1.05)
    changed = onnx_graph.weights_signature(other)
    assert not np.allclose(changed, signature, 1e-3, 1e-3)


def test_a_damaged_or_foreign_file_is_refused_in_one_line(pipeline, tmp_path):
    pipe, _ = pipeline
    file = tmp_path / "small.onnx"
    with pytest.raises(ValueError, match=r"No such file.*small.onnx"):
        onnx_graph.read(file, pipe)
    file.write_bytes(b"graph")
    with pytest.raises(ValueError, match=r"No such file.*small.json"):
        onnx_graph.read(file, pipe)
    onnx_graph.write(file, b"graph", onnx_graph.describe(pipe, "fp32"))
    file.write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"is damaged or not the file of small\.json"):
        onnx_graph.read(file, pipe)
    about = json.loads((tmp_path / "small.json").read_text())
    (tmp_path / "small.json").write_text(json.dumps({**about, "code": "0"}))
    with pytest.raises(ValueError, match="is by another version of kp_frontend"):
        onnx_graph.read(file, pipe)
    for text in ("{", "[]", "{}", "3", '{"precision": "fp32", "weights": "[1]"}'):
        (tmp_path / "small.json").write_text(text)
        with pytest.raises(ValueError, match="not a description"):
            onnx_graph.read(file, pipe)


def test_the_engine_comes_from_a_file_or_the_parser(pipeline, tmp_path, monkeypatch):
    pipe, example = pipeline
    fake = SimpleNamespace(for_rtx=True, build=lambda onnx, gpu: b"%d built from " % gpu[0] + onnx)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 6))
    monkeypatch.setattr(onnx_graph, "export", lambda *_: b"exported")
    source = tensorrt_backend.choose_source(pipe, example, BackendOptions(), fake)
    assert (source.precision, source.build()) == ("fp16", b"8 built from exported")
    file = tmp_path / "small.onnx"
    onnx_graph.write(file, b"graph", onnx_graph.describe(pipe, "int8"))
    options = BackendOptions(engine=str(file))
    source = tensorrt_backend.choose_source(pipe, example, options, fake)
    assert (source.precision, source.build(), source.engine) == (
        "int8",
        b"8 built from graph",
        None,
    )
    file = tmp_path / "small.engine"  # by trtexec, beside the same description
    file.write_bytes(b"engine")
    source = tensorrt_backend.choose_source(pipe, example, BackendOptions(engine=str(file)), fake)
    assert source.engine == b"engine"
    wrong = BackendOptions(engine=str(file), precision="fp16")
    with pytest.raises(RuntimeError, match="fp16 is not supported, only int8"):
        tensorrt_backend.choose_source(pipe, example, wrong, fake)
    monkeypatch.setattr(onnx_graph, "unavailable", lambda: "not installed: onnx")
    with pytest.raises(RuntimeError, match="not installed: onnx; or set `engine`"):
        tensorrt_backend.choose_source(pipe, example, BackendOptions(), fake)


class FakeEngine:
    """An engine with outputs in another order than the pipeline's, which doubles its inputs."""

    names = ("scores", "xy", "images", "settings")

    def __init__(self) -> None:
        self.num_io_tensors = len(self.names)
        self.addresses: dict[str, int] = {}

    def get_tensor_name(self, i: int) -> str:
        return self.names[i]

    def get_tensor_mode(self, name: str) -> str:
        return "in" if name in ("images", "settings") else "out"

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return {"images": (2, 4, 4), "settings": (3,), "xy": (2, 4, 4), "scores": (3,)}[name]

    def get_tensor_dtype(self, name: str) -> type:
        return np.float32

    def create_execution_context(self) -> FakeEngine:
        return self

    def set_tensor_address(self, name: str, address: int) -> None:
        self.addresses[name] = address

    def execute_async_v3(self, stream: int) -> bool:
        for source, result in (("images", "xy"), ("settings", "scores")):
            shape, kind = self.get_tensor_shape(source), ctypes.c_float
            count = int(np.prod(shape))
            given, out = (
                np.ctypeslib.as_array((kind * count).from_address(self.addresses[name]))
                for name in (source, result)
            )
            out[:] = 2 * given
        return True


def test_results_of_an_engine_are_found_by_name(monkeypatch):
    """A TensorRT engine need not have the pipeline's order."""
    engine = FakeEngine()
    mode = SimpleNamespace(INPUT="in")
    fake = SimpleNamespace(
        load=lambda _: engine, api=SimpleNamespace(TensorIOMode=mode, nptype=lambda kind: kind)
    )

    class Step:  # in the place of a captured graph
        def __init__(self, step, example, like) -> None:
            self.step, self.like = step, like

        def __call__(self, *inputs):
            return unpacked(self.step(*map(torch.from_numpy, inputs)).numpy(), self.like)

    monkeypatch.setattr(tensorrt_backend, "CudaGraphStep", Step)
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self: self)
    stream = SimpleNamespace(cuda_stream=0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    inputs = np.arange(32, dtype=np.float32).reshape(2, 4, 4), np.ones(3, np.float32)
    example = tuple(map(torch.from_numpy, inputs))
    make = functools.partial(tensorrt_backend.TensorRtBackend, fake, b"", example)
    backend = make(inputs, ["xy", "scores"], "fp16")
    for found, given in zip(backend(*inputs), inputs, strict=True):
        np.testing.assert_array_equal(found, 2 * given)
    with pytest.raises(RuntimeError, match="other outputs: scores, xy"):
        make(inputs, ["xy", "places"], "fp16")
    for like in (inputs[::-1], (inputs[0], inputs[1].astype(np.int32))):
        with pytest.raises(RuntimeError, match="other shapes or types: xy float32"):
            make(like, ["xy", "scores"], "fp16")


def test_tensorrt_is_left_out_with_a_reason(monkeypatch):
    module = backend_module("tensorrt")
    monkeypatch.setattr(module, "installed", list)
    assert module.unavailable() == "not installed: tensorrt or tensorrt_rtx"
    frontend = StereoFrontend(FrontendConfig(backend="tensorrt", max_keypoints=64))
    with pytest.raises(ValueError, match="tensorrt: not installed"):
        frontend.warm_up(96, 128)
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    monkeypatch.setattr(module, "installed", lambda: [RTX])
    assert "CUDA" in module.unavailable() or "NVIDIA" in module.unavailable()


@pytest.mark.gpu
def test_a_tensorrt_engine_agrees_on_a_gpu(pipeline, tmp_path):
    """Built from the ONNX graph by what is installed."""
    from kp_frontend.backends import make_backend
    from kp_frontend.backends.engine_cache import EngineCache

    reason = backend_module("tensorrt").unavailable()
    if reason:
        pytest.skip(reason)
    engine = make_backend("tensorrt", *pipeline, BackendOptions(cache=EngineCache(tmp_path)))
    assert engine.precision == "fp16"  # it raises if it does not agree


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("export --size 64x64 --max-keypoints 4096 -o x.onnx", "more than a 64x64 image can have"),
        ("export --model nothing -o x.onnx", "no weights 'nothing'"),
        ("export --nms-radius 1 -o x.onnx", "nms_radius is 1, must be between"),
        ("export --border 300 -o x.onnx", "too small for the network with border 300"),
        ("export --gpu 8.9 -o x.onnx", "--gpu is for --format tensorrt"),
        ("export -o x.json", "is the suffix of the description"),
        ("export -o .", "is a folder"),
        ("export -o /proc/x.onnx", "cannot write to /proc"),
    ],
)
def test_a_wrong_export_ends_in_one_line(command, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(command.split()) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert words in line and not list(tmp_path.iterdir())


def test_kp_export_writes_a_graph_and_its_description(tmp_path, capsys):
    file = tmp_path / "net.onnx"
    assert (
        main(
            [
                "export",
                "--size",
                "128x96",
                "--max-keypoints",
                "64",
                "--network-only",
                "-o",
                str(file),
            ]
        )
        == 0
    )
    assert "logits" in capsys.readouterr().out
    about = json.loads((tmp_path / "net.json").read_text())
    assert (about["part"], about["precision"]) == ("network", "fp32")
    pipe, _ = StereoFrontend(CONFIG).pipeline(HEIGHT, WIDTH)
    with pytest.raises(ValueError, match="is for part network, not pipeline"):
        onnx_graph.read(file, pipe)
