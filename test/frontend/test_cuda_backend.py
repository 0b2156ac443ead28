"""The cuda backend, with the CPU in the place of the GPU; what needs a GPU is marked `gpu`."""

from __future__ import annotations

import dataclasses
import logging
import os
import re
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kp_frontend.backends import BackendOptions, compilation, cuda_backend, cuda_graph, make_backend
from kp_frontend.backends.agreement import agreement, check_images, check_inputs, reference
from kp_frontend.backends.cuda_graph import Packed, gpu_unavailable, unpacked
from kp_frontend.backends.engine_cache import EngineCache
from kp_frontend.config import FrontendConfig
from kp_frontend.frontend import StereoFrontend
from kp_frontend.pipeline import StereoPipeline

HEIGHT, WIDTH = 96, 128
CONFIG = FrontendConfig(backend="torch", max_keypoints=64, max_motion=0.0)


@pytest.fixture(scope="module")
def pipeline() -> tuple[StereoPipeline, tuple[torch.Tensor, ...]]:
    """A small pipeline and inputs for it."""
    frontend = StereoFrontend(CONFIG)
    pipe = StereoPipeline(
        frontend.network, CONFIG, HEIGHT, WIDTH, uncertainty=frontend.uncertainty
    ).eval()
    inputs = (check_images(HEIGHT, WIDTH), *frontend.blank_inputs(WIDTH))
    return pipe, tuple(torch.from_numpy(array) for array in inputs)


class PlainStep:
    """What stands for a captured graph where there is no GPU."""

    def __init__(self, step, example, like) -> None:
        self.step, self.like = step, like

    def __call__(self, *inputs: np.ndarray) -> list[np.ndarray]:
        with torch.inference_mode():
            return unpacked(self.step(*map(torch.from_numpy, inputs)).numpy(), self.like)


@pytest.fixture
def no_gpu(monkeypatch):
    """The backend runs where there is no GPU, without a compiler."""
    monkeypatch.setattr(cuda_backend, "unavailable", lambda: None)
    monkeypatch.setattr(cuda_backend, "compiler_unavailable", lambda: "no compiler today")
    monkeypatch.setattr(cuda_backend, "CudaGraphStep", PlainStep)
    monkeypatch.setattr(cuda_backend, "gpu_key", lambda: {"gpu": "none"})
    monkeypatch.setattr(torch.nn.Module, "cuda", lambda self: self)
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self: self)
    return monkeypatch


class FakeCompiler:
    """Stands for torch.compile and its caches. What it compiles can be `wrong`."""

    def __init__(self, monkeypatch) -> None:
        self.compiled: list[bool] = []  # of each compilation, whether it was found in the cache
        self.fails: Exception | None = None
        self.wrong = False
        self.cached = b""
        self.before = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
        monkeypatch.setattr(cuda_backend, "compiler_unavailable", lambda: None)
        monkeypatch.setattr(torch, "compile", self.compile)
        monkeypatch.setattr(torch.compiler, "reset", self.reset)
        monkeypatch.setattr(
            torch.compiler, "save_cache_artifacts", lambda: (b"compiled pipeline", None)
        )
        monkeypatch.setattr(torch.compiler, "load_cache_artifacts", self.load)

    def reset(self) -> None:
        self.cached, self.wrong = b"", False

    def load(self, stored: bytes) -> None:
        self.cached = stored

    def compile(self, step, fullgraph, dynamic):
        assert fullgraph and not dynamic
        assert os.environ.get("TORCHINDUCTOR_CACHE_DIR") == self.before  # not yet its own folder
        done = []

        def run(*inputs):
            if self.fails is not None:
                raise self.fails
            if not done:
                done.append(True)
                self.compiled.append(self.cached == b"compiled pipeline")
                assert "kp_compile_" in os.environ["TORCHINDUCTOR_CACHE_DIR"]
            return step(*inputs) * (0 if self.wrong else 1)

        return run


class Recorded(TorchDispatchMode):
    """Stands for a CUDA graph: records operations, and repeats them on the same tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[tuple] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.steps.append((func, args, kwargs or {}, result))
        return result

    @torch.inference_mode()
    def replay(self) -> None:
        for func, args, kwargs, result in self.steps:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                old.copy_(new)


@pytest.fixture
def cpu_graph(monkeypatch):
    """`CudaGraphStep` with the CPU in the place of the GPU."""

    def on_cpu(make):
        def call(*args, pin_memory=False, device=None, **kwargs):
            return make(*args, **kwargs)

        return call

    for name in ("zeros", "empty"):
        monkeypatch.setattr(torch, name, on_cpu(getattr(torch, name)))
    stream = SimpleNamespace(synchronize=lambda: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Recorded)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, stream: graph)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self: self.clone())


def test_a_captured_step_sees_the_inputs_of_each_call(cpu_graph):
    """Inputs of odd sizes and several types, through the buffers of host and device."""

    def step(images, settings, rows, bits):
        left, right = images.float().sum((1, 2))
        return torch.stack([left, right]), settings * rows.sum(), rows[:, 0].int(), bits + 1

    def inputs(seed: int) -> tuple[torch.Tensor, ...]:
        torch.manual_seed(seed)
        images = torch.randint(0, 255, (2, 5, 7), dtype=torch.uint8)
        return images, torch.randn(11), torch.randn(3, 5), torch.randint(9, (1,), dtype=torch.int32)

    like = [result.numpy() for result in step(*inputs(0))]
    captured = cuda_graph.CudaGraphStep(Packed(step), inputs(0), like)
    results = []
    for seed in (1, 2):
        images, *others = (tensor.numpy() for tensor in inputs(seed))
        results.append(captured((images[0], images[1]), *others))
        for found, expected in zip(results[-1], step(*inputs(seed)), strict=True):
            np.testing.assert_array_equal(found, expected.numpy())
    assert (results[0][0] != results[1][0]).all()  # a result is the caller's to keep


def test_results_leave_as_one_vector_and_come_back():
    results = [
        torch.randn(2, 3).t(), torch.tensor([-1, 5], dtype=torch.int32), torch.tensor(float("nan"))
    ]  # fmt: skip
    packed = Packed(lambda *_: results)(torch.zeros(1))
    assert packed.dtype == torch.int32 and packed.shape == (9,)
    like = [result.numpy() for result in results]
    for found, expected in zip(unpacked(packed.numpy(), like), like, strict=True):
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)


def test_every_result_of_the_pipeline_has_32_bits(pipeline):
    """`Packed` needs this, and engines convert 64-bit results."""
    pipe, inputs = pipeline
    frontend = StereoFrontend(dataclasses.replace(CONFIG, max_motion=64.0))
    tracked = StereoPipeline(pipe.network, frontend.config, HEIGHT, WIDTH).eval()
    arrays = [torch.from_numpy(array) for array in frontend.blank_inputs(WIDTH)]
    found = (*reference(pipe, inputs), *reference(tracked, (inputs[0], *arrays)))
    assert {array.dtype for array in found} == {np.dtype(np.float32), np.dtype(np.int32)}


def test_without_a_compiler_the_pipeline_as_written_is_captured(pipeline, no_gpu, tmp_path, caplog):
    pipe, inputs = pipeline
    options = BackendOptions(precision="fp32", cache=EngineCache(tmp_path))
    engine = make_backend("cuda", pipe, inputs, options)
    found = engine(*(tensor.numpy() for tensor in inputs))
    assert engine.precision == "fp32" and not engine.compiled
    assert agreement(reference(pipe, inputs), found).share == 1.0
    assert caplog.text.count("no compiler today") == 1
    assert not list(tmp_path.iterdir())


def test_a_captured_graph_has_to_agree(pipeline, no_gpu, tmp_path):
    pipe, inputs = pipeline

    class Wrong(PlainStep):
        def __call__(self, *inputs: np.ndarray) -> list[np.ndarray]:
            return [out * 0 for out in super().__call__(*inputs)]

    no_gpu.setattr(cuda_backend, "CudaGraphStep", Wrong)
    options = BackendOptions(precision="fp32", cache=EngineCache(tmp_path))
    with pytest.raises(ValueError, match="does not agree with the reference"):
        make_backend("cuda", pipe, inputs, options)


def test_what_was_compiled_is_kept_and_loaded(pipeline, no_gpu, tmp_path, caplog):
    pipe, inputs = pipeline
    compiler = FakeCompiler(no_gpu)
    options = BackendOptions(precision="fp32", cache=EngineCache(tmp_path))
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            engine = make_backend("cuda", pipe, inputs, options)
            assert engine.compiled
            assert agreement(reference(pipe, inputs), engine(*(t.numpy() for t in inputs))).good
    assert compiler.compiled == [False, True]
    assert caplog.text.count("about a minute") == 1  # the second start builds nothing
    (file,) = tmp_path.iterdir()
    good = file.read_bytes()
    file.write_bytes(good[:-3])  # damaged
    make_backend("cuda", pipe, inputs, options)
    assert compiler.compiled[2:] == [False] and file.read_bytes() == good
    make_backend("cuda", pipe, inputs, dataclasses.replace(options, precision="bf16"))
    assert len(list(tmp_path.iterdir())) == 2  # one for each precision


def test_a_stored_result_that_is_wrong_is_compiled_again(pipeline, no_gpu, tmp_path, caplog):
    pipe, inputs = pipeline
    compiler = FakeCompiler(no_gpu)
    options = BackendOptions(precision="fp32", cache=EngineCache(tmp_path))
    make_backend("cuda", pipe, inputs, options)
    compiler.wrong = True  # until the compiler is reset
    engine = make_backend("cuda", pipe, inputs, options)
    assert "does not agree with the reference" in caplog.text and engine.compiled


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("nvcc died. Set LOUDER=1 for more"),
        torch.OutOfMemoryError("CUDA out of memory"),
    ],
)
def test_a_compiler_that_fails_is_done_without(pipeline, no_gpu, tmp_path, caplog, error):
    pipe, inputs = pipeline
    compiler = FakeCompiler(no_gpu)
    compiler.fails = error
    options = BackendOptions(precision="fp32", cache=EngineCache(tmp_path))
    engine = make_backend("cuda", pipe, inputs, options)
    assert not engine.compiled
    (record,) = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert str(error).split(".")[0] in record.getMessage() and "LOUDER" not in record.getMessage()
    assert agreement(reference(pipe, inputs), engine(*(t.numpy() for t in inputs))).good
    assert os.environ.get("TORCHINDUCTOR_CACHE_DIR") == compiler.before


def test_the_reason_why_nothing_is_compiled_is_exact(monkeypatch):
    monkeypatch.setattr(compilation, "triton_version", lambda: None)
    assert "Triton is not installed" in compilation.compiler_unavailable()
    monkeypatch.setattr(compilation, "triton_version", lambda: "3.7")
    monkeypatch.setenv("CC", "/nowhere/cc")
    assert "C compiler" in compilation.compiler_unavailable()
    monkeypatch.setattr(compilation, "c_compiler", lambda: "/usr/bin/gcc")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (6, 1))
    assert "capability 6.1, Triton needs 7.0" in compilation.compiler_unavailable()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 7))
    assert compilation.compiler_unavailable() is None


def test_a_driver_that_is_too_old_is_named(monkeypatch):
    def fail() -> None:
        raise RuntimeError(
            "The NVIDIA driver on your system is too old (found version 11040). Please update"
        )

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", fail)
    assert gpu_unavailable() == "The NVIDIA driver on your system is too old (found version 11040)"


def test_the_whole_pipeline_is_one_graph_for_the_compiler():
    """fullgraph=True fails where the compiler would have to go back to Python."""
    frontend = StereoFrontend(dataclasses.replace(CONFIG, max_motion=64.0))
    pipe, example = frontend.pipeline(HEIGHT, WIDTH, raw=True)
    inputs = check_inputs(example)
    traced = torch.compile(Packed(pipe), fullgraph=True, dynamic=False, backend="eager")
    expected = reference(pipe, inputs)
    with torch.inference_mode():
        packed = traced(*inputs).numpy()
    for found, want in zip(unpacked(packed, expected), expected, strict=True):
        np.testing.assert_allclose(found, want, atol=1e-5)


@pytest.mark.gpu
def test_the_compiled_graph_agrees_and_memory_stays(pipeline, tmp_path):
    reason = gpu_unavailable() or compilation.compiler_unavailable()
    if reason:
        pytest.skip(reason)
    pipe, inputs = pipeline
    expected, arrays = reference(pipe, inputs), [tensor.numpy() for tensor in inputs]
    for _ in range(2):  # compiled, then from the cache
        engine = make_backend("cuda", pipe, inputs, BackendOptions(cache=EngineCache(tmp_path)))
        assert engine.compiled and agreement(expected, engine(*arrays)).good
    pair = (arrays[0][0], arrays[0][1])  # two images instead of a batch
    for found, again in zip(engine(*arrays), engine(pair, *arrays[1:]), strict=True):
        np.testing.assert_array_equal(found, again)
    before = torch.cuda.memory_allocated()
    for _ in range(10_000):
        engine(*arrays)
    assert torch.cuda.memory_allocated() == before
    assert engine.step.gpu_ms() > 0


@pytest.mark.gpu
@pytest.mark.parametrize("precision", cuda_backend.TYPES)
def test_every_precision_agrees_on_a_gpu(pipeline, tmp_path, precision, monkeypatch):
    if reason := gpu_unavailable():
        pytest.skip(reason)
    monkeypatch.setattr(cuda_backend, "compiler_unavailable", lambda: "not in this test")
    pipe, inputs = pipeline
    options = BackendOptions(precision=precision, cache=EngineCache(tmp_path))
    engine = make_backend("cuda", pipe, inputs, options)  # raises if it does not agree
    assert engine.precision == precision
    assert re.search(r"\d+\.\d", cuda_graph.gpu_key()["gpu"])
