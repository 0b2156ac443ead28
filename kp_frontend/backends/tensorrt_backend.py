"""TensorRT: the whole exported pipeline as one engine, built once for a GPU and cached.

The engine comes from the first of these that there is: the file of the option `engine`,
torch-tensorrt, the ONNX parser of the installed TensorRT.
"""

from __future__ import annotations

import copy
import hashlib
import importlib.metadata
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kp_frontend.backends import (
    BackendOptions,
    Images,
    choose_precision,
    onnx_graph,
    tensorrt_library,
)
from kp_frontend.backends.agreement import check_inputs, reference, require
from kp_frontend.backends.cuda_graph import CudaGraphStep, Packed, gpu_key, gpu_unavailable
from kp_frontend.backends.engine_cache import file_digest
from kp_frontend.backends.tensorrt_library import Library, installed, library
from kp_frontend.pipeline import StereoPipeline

MOST_KEYPOINTS = 3840  # largest K of TensorRT's top-K layer
TYPES = ("fp16", "fp32")  # of torch-tensorrt
DURATION = "up to some minutes"


class TensorRtBackend:
    """A deserialised engine, launched by a CUDA graph.

    Args:
        tensorrt: the library that built the engine.
        stored: the engine.
        example: host tensors that define shapes and types of the inputs.
        like: arrays of the shapes and types of the results, in the pipeline's order.
        names: names of the results in this order; None: the engine has this order.

    Raises:
        RuntimeError: the library rejects the engine, or its inputs or outputs are others.
    """

    name = "tensorrt"

    def __init__(
        self,
        tensorrt: Library,
        stored: bytes,
        example: tuple[Tensor, ...],
        like: Sequence[np.ndarray],
        names: list[str] | None,
        precision: str,
    ) -> None:
        self.precision = precision
        self.engine = tensorrt.load(stored)
        self.context = self.engine.create_execution_context()
        if self.context is None:
            raise RuntimeError("TensorRT cannot allocate memory for the engine's context")
        self.inputs, outputs = tensor_names(tensorrt.api, self.engine)
        if names is not None:
            if sorted(names) != sorted(outputs):
                raise RuntimeError(f"the engine has other outputs: {', '.join(outputs)}")
            outputs = names
        self._require(tensorrt.api, self.inputs, [tensor.numpy() for tensor in example])
        self._require(tensorrt.api, outputs, like)
        self.results = [torch.from_numpy(np.empty_like(array)).cuda() for array in like]
        for name, result in zip(outputs, self.results, strict=True):
            self.context.set_tensor_address(name, result.data_ptr())
        self.step = CudaGraphStep(Packed(self._run), example, like)

    def _require(self, api: Any, names: list[str], expected: Sequence[np.ndarray]) -> None:
        """Check shapes and types: TensorRT writes as many bytes as the engine says."""
        found = [
            (
                tuple(self.engine.get_tensor_shape(name)),
                np.dtype(api.nptype(self.engine.get_tensor_dtype(name))),
            )
            for name in names
        ]
        if found != [(array.shape, array.dtype) for array in expected]:
            words = ", ".join(
                f"{name} {kind} {shape}" for name, (shape, kind) in zip(names, found, strict=True)
            )
            raise RuntimeError(f"the engine has other shapes or types: {words}")

    def _run(self, *inputs: Tensor) -> Sequence[Tensor]:
        for name, tensor in zip(self.inputs, inputs, strict=True):
            self.context.set_tensor_address(name, tensor.data_ptr())
        if not self.context.execute_async_v3(torch.cuda.current_stream().cuda_stream):
            raise RuntimeError("TensorRT could not run the engine")
        return self.results

    def __call__(self, images: Images, *others: np.ndarray) -> list[np.ndarray]:
        return self.step(images, *others)


def tensor_names(api: Any, engine: Any) -> tuple[list[str], list[str]]:
    """Names of the inputs and outputs of an engine, in its order."""
    names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
    is_input = [engine.get_tensor_mode(name) == api.TensorIOMode.INPUT for name in names]
    return (
        [name for name, i in zip(names, is_input, strict=True) if i],
        [name for name, i in zip(names, is_input, strict=True) if not i],
    )


def unavailable() -> str | None:
    """The reason why this machine cannot run the backend, or None."""
    modules = installed()
    if not modules:
        return "not installed: tensorrt or tensorrt_rtx"
    reason = gpu_unavailable()
    if reason is not None:
        return reason
    reasons = [library(m).unsupported(torch.cuda.get_device_capability()) for m in modules]
    return None if None in reasons else "; ".join(reason for reason in reasons if reason)


def build(
    pipeline: StereoPipeline, example: tuple[Tensor, ...], options: BackendOptions
) -> TensorRtBackend:
    """Load the engine from the cache or a file, or build it once, which can take some minutes.

    Raises:
        ValueError: the file of the option `engine` is of another pipeline.
        RuntimeError: the engine cannot be built, read or run.
    """
    if pipeline.count > MOST_KEYPOINTS:
        raise RuntimeError(
            f"TensorRT supports at most {MOST_KEYPOINTS} keypoints, not {pipeline.count}"
        )
    capability = torch.cuda.get_device_capability()
    module = next(m for m in installed() if library(m).unsupported(capability) is None)
    tensorrt = library(module)
    source = choose_source(pipeline, example, options, tensorrt)
    on_gpu = copy.deepcopy(pipeline).cuda()
    check = check_inputs(example)
    expected = reference(on_gpu, check)

    def load(stored: bytes) -> TensorRtBackend:
        backend = TensorRtBackend(
            tensorrt, stored, example, expected, source.outputs, source.precision
        )
        require("tensorrt", expected, backend(*(tensor.numpy() for tensor in check)))
        return backend

    if source.engine is not None:
        return load(source.engine)
    return options.cache.engine(_key(pipeline, source, tensorrt), source.build, load, DURATION)


@dataclass(frozen=True)
class Source:
    """Where an engine comes from.

    `outputs` are the names of the results in the pipeline's order, None where the engine has this
    order.
    """

    precision: str
    outputs: list[str] | None
    key: str  # for the engine cache
    build: Callable[[], bytes]
    engine: bytes | None = None  # one that is built already


def choose_source(
    pipeline: StereoPipeline,
    example: tuple[Tensor, ...],
    options: BackendOptions,
    tensorrt: Library,
) -> Source:
    """The source of the engine for a pipeline.

    Raises:
        ValueError: the file of the option `engine` is of another pipeline.
        RuntimeError: the file has another precision, or nothing that makes an engine is installed.
    """
    outputs = onnx_graph.names(pipeline)[1]
    if options.engine:
        content, precision = onnx_graph.read(options.engine, pipeline)
        choose_precision(options.precision, precision, (precision,))
        ready = None if options.engine.endswith(".onnx") else content
        digest = hashlib.sha256(content).hexdigest()
        return Source(precision, outputs, digest, lambda: build_here(tensorrt, content), ready)
    precision = choose_precision(options.precision, "fp16", onnx_graph.PRECISIONS)
    if importlib.util.find_spec("torch_tensorrt") and not tensorrt.for_rtx and precision in TYPES:
        version = importlib.metadata.version("torch_tensorrt")
        return Source(
            precision,
            None,
            f"torch_tensorrt {version}",
            lambda: build_with_torch(pipeline, example, precision),
        )
    reason = onnx_graph.unavailable()
    if reason is not None:
        raise RuntimeError(f"{reason}; or set `engine` to a file of `kp export`")
    return Source(
        precision,
        outputs,
        "onnx",
        lambda: build_here(tensorrt, onnx_graph.export(pipeline, example, precision)),
    )


def build_here(tensorrt: Library, content: bytes) -> bytes:
    """The engine of an ONNX file for the GPU of this machine."""
    return tensorrt.build(content, torch.cuda.get_device_capability() if tensorrt.for_rtx else None)


def export(
    pipeline: StereoPipeline, example: tuple[Tensor, ...], precision: str
) -> torch.export.ExportedProgram:
    """Export the pipeline for torch-tensorrt, with the network in `precision`, on its device.

    TensorRT keeps the types of the graph. Only the network uses the lower precision, so positions
    and probabilities stay in fp32.
    """
    return torch.export.export(onnx_graph.lowered(pipeline, precision), example, strict=False)


def build_with_torch(
    pipeline: StereoPipeline, example: tuple[Tensor, ...], precision: str
) -> bytes:
    """The engine by torch-tensorrt."""
    import torch_tensorrt

    on_gpu = copy.deepcopy(pipeline).cuda()
    inputs = tuple(tensor.cuda() for tensor in example)
    return torch_tensorrt.dynamo.convert_exported_program_to_serialized_trt_engine(
        export(on_gpu, inputs, precision),
        arg_inputs=list(inputs),
        require_full_compilation=True,
        immutable_weights=True,
    )


def _key(pipeline: StereoPipeline, source: Source, tensorrt: Library) -> dict[str, str]:
    """Everything that an engine depends on."""
    files = (__file__, onnx_graph.__file__, tensorrt_library.__file__)
    return {
        "backend": "tensorrt",
        "pipeline": pipeline.fingerprint(),
        "precision": source.precision,
        "source": source.key,
        "library": str(tensorrt),
        "built by": "".join(file_digest(file) for file in files),
        **gpu_key(),
    }
