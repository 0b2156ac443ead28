"""TensorRT: the whole exported pipeline as one engine, built once for a GPU and cached."""

from __future__ import annotations

import copy
import importlib.metadata
import importlib.util
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from kp_frontend.backends import BackendOptions, choose_precision
from kp_frontend.backends.agreement import check_inputs, reference, require
from kp_frontend.backends.cuda_graph import CudaGraphStep, gpu_key, gpu_unavailable
from kp_frontend.backends.engine_cache import file_digest
from kp_frontend.pipeline import StereoPipeline

MOST_KEYPOINTS = 3840  # largest K of TensorRT's top-K layer
TYPES = {"fp16": torch.float16, "fp32": torch.float32}


class TensorRtBackend:
    """A deserialised engine, launched by a CUDA graph.

    Raises:
        RuntimeError: TensorRT rejects the engine, or its inputs differ from those of the example.
    """

    name = "tensorrt"

    def __init__(self, stored: bytes, example: tuple[Tensor, ...], precision: str) -> None:
        import tensorrt

        self.precision = precision
        runtime = tensorrt.Runtime(tensorrt.Logger(tensorrt.Logger.WARNING))
        self.engine = runtime.deserialize_cuda_engine(stored)
        if self.engine is None:
            raise RuntimeError("TensorRT cannot read the engine")
        self.context = self.engine.create_execution_context()
        if self.context is None:
            raise RuntimeError("TensorRT cannot allocate memory for the engine's context")
        names = [self.engine.get_tensor_name(i) for i in range(self.engine.num_io_tensors)]
        is_input = {
            name: self.engine.get_tensor_mode(name) == tensorrt.TensorIOMode.INPUT for name in names
        }
        self.inputs = [name for name in names if is_input[name]]
        shapes = [tuple(self.engine.get_tensor_shape(name)) for name in self.inputs]
        if shapes != [tuple(tensor.shape) for tensor in example]:
            raise RuntimeError(f"the engine has inputs of other shapes: {shapes}")
        self.results: dict[str, Tensor] = {}
        for name in names:
            if not is_input[name]:
                kind = torch.from_numpy(
                    np.empty(0, tensorrt.nptype(self.engine.get_tensor_dtype(name)))
                ).dtype
                shape = tuple(self.engine.get_tensor_shape(name))
                self.results[name] = torch.empty(shape, dtype=kind, device="cuda")
                self.context.set_tensor_address(name, self.results[name].data_ptr())
        self.step = CudaGraphStep(self._run, example)
        self.images = self.step.host[0]

    def _run(self, *inputs: Tensor) -> Sequence[Tensor]:
        for name, tensor in zip(self.inputs, inputs, strict=True):
            self.context.set_tensor_address(name, tensor.data_ptr())
        if not self.context.execute_async_v3(torch.cuda.current_stream().cuda_stream):
            raise RuntimeError("TensorRT could not run the engine")
        return list(self.results.values())

    def __call__(self, *inputs: np.ndarray) -> list[np.ndarray]:
        return self.step(*inputs)


def unavailable() -> str | None:
    """The reason why this machine cannot run the backend, or None."""
    missing = [n for n in ("tensorrt", "torch_tensorrt") if importlib.util.find_spec(n) is None]
    if missing:
        return f"not installed: {' and '.join(missing)}"
    return gpu_unavailable()


def export(
    pipeline: StereoPipeline, example: tuple[Tensor, ...], precision: str
) -> torch.export.ExportedProgram:
    """Export the pipeline as a graph with the network in `precision`, on its current device.

    TensorRT keeps the types of the graph. Only the network uses the lower precision, so positions
    and probabilities stay in fp32.
    """
    lowered = copy.deepcopy(pipeline)
    lowered.network.to(TYPES[precision])
    return torch.export.export(lowered, example, strict=False)


def build(
    pipeline: StereoPipeline, example: tuple[Tensor, ...], options: BackendOptions
) -> TensorRtBackend:
    """Load the engine from the cache, or build it once, which takes some minutes."""
    import torch_tensorrt

    count = pipeline.count
    if count > MOST_KEYPOINTS:
        raise RuntimeError(f"TensorRT supports at most {MOST_KEYPOINTS} keypoints, not {count}")
    precision = choose_precision(options.precision, "fp16", tuple(TYPES))
    on_gpu = copy.deepcopy(pipeline).cuda()
    check = check_inputs(example)
    expected = reference(on_gpu, check)

    def compile_engine() -> bytes:
        inputs = tuple(tensor.cuda() for tensor in example)
        return torch_tensorrt.dynamo.convert_exported_program_to_serialized_trt_engine(
            export(on_gpu, inputs, precision),
            arg_inputs=list(inputs),
            require_full_compilation=True,
            immutable_weights=True,
        )

    def load(stored: bytes) -> TensorRtBackend:
        backend = TensorRtBackend(stored, example, precision)
        require("tensorrt", expected, backend(*(tensor.numpy() for tensor in check)))
        return backend

    return options.cache.engine(_key(pipeline, precision), compile_engine, load)


def _key(pipeline: StereoPipeline, precision: str) -> dict[str, str]:
    """Everything that an engine depends on."""
    return {
        "backend": "tensorrt",
        "pipeline": pipeline.fingerprint(),
        "precision": precision,
        "built by": file_digest(__file__),
        **gpu_key(),
        **{name: importlib.metadata.version(name) for name in ("torch_tensorrt", "tensorrt")},
    }
