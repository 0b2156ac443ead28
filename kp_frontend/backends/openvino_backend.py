"""OpenVINO: the fastest way to run the pipeline on a CPU."""

from __future__ import annotations

import ctypes
import importlib.util
import logging
import sys
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from kp_frontend import quantization
from kp_frontend.backends import BackendOptions, Images, choose_precision
from kp_frontend.backends.agreement import check_inputs, reference, require
from kp_frontend.backends.engine_cache import file_digest
from kp_frontend.backends.processor import int8_dot_products
from kp_frontend.network import KeypointNetwork
from kp_frontend.pipeline import ImageFeatures, StereoPipeline
from kp_frontend.quantization import with_quantized_network

if TYPE_CHECKING:
    import openvino

log = logging.getLogger(__name__)

# With this package, openvino sends usage statistics over the network when it is imported and at
# each conversion, from a forked process. Without it, it does not: None makes the import fail.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]

PRECISIONS = ("int8", "bf16", "fp32")  # fastest first


class ImagePart(nn.Module):
    """The first part of a pipeline: what can be computed of each image alone."""

    def __init__(self, pipeline: StereoPipeline) -> None:
        super().__init__()
        self.pipeline = pipeline

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Map an image (H, W) to the tensors of `ImageFeatures`."""
        return self.pipeline.image_features(image.float()[None, None]).tensors


class PairPart(nn.Module):
    """The second part of a pipeline: the results of a pair from those of its images.

    Args:
        count: number of tensors that `ImagePart` gives.
    """

    def __init__(self, pipeline: StereoPipeline, count: int) -> None:
        super().__init__()
        self.pipeline, self.count = pipeline, count

    def forward(self, left: Tensor, right: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Take both images (H, W), the tensors of `ImagePart` of the left one, then of the right
        one, and the inputs of the pipeline after the images."""
        both, others = inputs[: 2 * self.count], inputs[2 * self.count :]
        sides = [ImageFeatures.of(both[: self.count]), ImageFeatures.of(both[self.count :])]
        return self.pipeline.pair((left, right), sides, *others)


class ImageModel:
    """A compiled model that runs on both images at the same time, each on half of the threads.

    Threads that work on one image each wait for each other less than threads that share every step.
    """

    def __init__(self, compiled: openvino.CompiledModel) -> None:
        self.requests = [compiled.create_infer_request() for _ in range(2)]

    def __call__(self, images: Images) -> None:
        """Process a pair; the results are the output tensors of `requests`."""
        try:
            for request, image in zip(self.requests, images, strict=True):
                request.start_async([image], share_inputs=True)
        finally:  # an error must not leave a request busy
            for request in self.requests:
                request.wait()


class OpenVinoBackend:
    """Two compiled models, tuned for latency."""

    name = "openvino"

    def __init__(
        self, image: openvino.CompiledModel, pair: openvino.CompiledModel, precision: str
    ) -> None:
        self.image, self.pair = ImageModel(image), pair.create_infer_request()
        self.outputs = pair.outputs
        self.precision = precision
        self.given = 2  # inputs of the pair's model that are set
        for request in self.image.requests:
            for tensor in request.output_tensors:
                self.pair.set_input_tensor(self.given, tensor)
                self.given += 1

    def __call__(self, images: Images, *others: np.ndarray) -> list[np.ndarray]:
        self.image(images)
        inputs = dict(enumerate(images)) | dict(enumerate(others, self.given))
        results = self.pair.infer(inputs, share_inputs=True)
        return [results[output].copy() for output in self.outputs]


def unavailable() -> str | None:
    """The reason why this machine cannot run the backend, or None."""
    if importlib.util.find_spec("openvino") is None:
        return "the Python package openvino is not installed"
    return None


def convert(module: nn.Module, example: tuple[Tensor, ...]) -> bytes:
    """Convert a module with fixed shapes to OpenVINO's graph and weights, in one byte string."""
    import openvino

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # from torch's own export
        model = openvino.convert_model(torch.export.export(module, example, strict=False))
    # Converted shapes are dynamic, which costs time in every call.
    model.reshape({i: list(tensor.shape) for i, tensor in enumerate(example)})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.xml"
        openvino.save_model(model, path, compress_to_fp16=False)
        return packed(path.read_bytes(), path.with_suffix(".bin").read_bytes())


def convert_parts(pipeline: StereoPipeline, example: tuple[Tensor, ...]) -> bytes:
    """Convert the two parts of a pipeline, in one byte string."""
    images, *others = example
    image_part = ImagePart(pipeline).eval()
    with torch.no_grad():
        found = [tensor for image in images for tensor in image_part(image)]
    pair_part = PairPart(pipeline, len(found) // 2).eval()
    pair_example = (*images, *found, *others)
    return packed(convert(image_part, (images[0],)), convert(pair_part, pair_example))


def packed(first: bytes, second: bytes) -> bytes:
    """Two byte strings in one."""
    return len(first).to_bytes(8, "little") + first + second


def unpacked(both: bytes) -> tuple[bytes, bytes]:
    """The two byte strings of `packed`."""
    end = 8 + int.from_bytes(both[:8], "little")
    return both[8:end], both[end:]


def multiplies_bf16() -> bool:
    """Whether the processor multiplies bf16 natively."""
    import openvino

    return "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def best_precisions(network: KeypointNetwork) -> list[str]:
    """The precisions that suit the processor and the weights, fastest first.

    int8 needs int8 dot products and weights with ranges. bf16 needs native support.
    """
    suits = {
        "int8": bool(network.ranges) and int8_dot_products() is not None,
        "bf16": multiplies_bf16(),
        "fp32": True,
    }
    return [precision for precision in PRECISIONS if suits[precision]]


def compile_model(
    stored: bytes, precision: str, threads: int = 0, streams: int = 1
) -> openvino.CompiledModel:
    """Compile the result of `convert`. It can process `streams` inputs at the same time, each with
    its share of the threads.

    In a quantized network, everything between the int8 kernels is bf16 if the processor supports it
    natively. OpenVINO applies this hint only up to the last convolution of the network. Everything
    after it, including all coordinates, stays in fp32.
    """
    import openvino

    core = openvino.Core()
    lowered = precision == "bf16" or (precision == "int8" and multiplies_bf16())
    settings: dict[str, str | int] = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "bf16" if lowered else "f32",
        "NUM_STREAMS": streams,
    }
    if threads:
        settings["INFERENCE_NUM_THREADS"] = threads
    compiled = core.compile_model(core.read_model(*unpacked(stored)), "CPU", settings)
    _drop_signal_stack()
    return compiled


def compile_parts(stored: bytes, precision: str, threads: int = 0) -> OpenVinoBackend:
    """Compile the result of `convert_parts`.

    The pair's part has no convolutions, and its coordinates need fp32. In a quantized pipeline, its
    descriptors are compared in int8 all the same.
    """
    image, pair = unpacked(stored)
    return OpenVinoBackend(
        compile_model(image, precision, threads, streams=1 if threads == 1 else 2),
        compile_model(pair, "fp32", threads),
        precision,
    )


class _SignalStack(ctypes.Structure):
    """Linux's `stack_t`."""

    _fields_ = (("base", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))


def _drop_signal_stack() -> None:
    """Restore the ordinary stack for the signal handlers of this thread.

    OpenVINO gives the thread a signal stack that is hardly larger than the processor's registers.
    Python's handlers overflow it, so the next signal that Python handles would end the process.
    """
    if sys.platform == "linux":
        disable = 2
        ctypes.CDLL(None).sigaltstack(ctypes.byref(_SignalStack(None, disable, 0)), None)


def build(
    pipeline: StereoPipeline, example: tuple[Tensor, ...], options: BackendOptions
) -> OpenVinoBackend:
    """Compile for the shapes of `example`. The conversion, the slowest part, is cached.

    Precision `auto` takes the fastest one that agrees with the reference.
    """
    check = check_inputs(example)
    expected = reference(pipeline, check)

    def engine(precision: str) -> OpenVinoBackend:
        graph = with_quantized_network(pipeline) if precision == "int8" else pipeline

        def load(stored: bytes) -> OpenVinoBackend:
            backend = compile_parts(stored, precision, options.threads)
            found = backend(*(tensor.numpy() for tensor in check))
            require(f"openvino {precision}", expected, found)
            return backend

        return options.cache.engine(_key(graph), lambda: convert_parts(graph, example), load)

    if options.precision != "auto":
        return engine(choose_precision(options.precision, "", PRECISIONS))
    *faster, last = best_precisions(pipeline.network)
    for precision in faster:
        try:
            return engine(precision)
        except RuntimeError as error:
            log.warning("%s; the next precision is tried", error)
    return engine(last)


def _key(pipeline: StereoPipeline) -> dict[str, str]:
    """All that an engine depends on; the precision is chosen when it is compiled."""
    import openvino

    return {
        "backend": "openvino",
        "pipeline": pipeline.fingerprint(),
        "quantized by": file_digest(quantization.__file__),
        "openvino": openvino.__version__,
        "torch": torch.__version__,
        "built by": file_digest(__file__),
    }
