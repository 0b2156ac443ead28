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
from kp_frontend.backends import BackendOptions, Images, batch, choose_precision
from kp_frontend.backends.agreement import check_inputs, reference, require
from kp_frontend.backends.engine_cache import file_digest
from kp_frontend.backends.processor import int8_dot_products
from kp_frontend.network import KeypointNetwork
from kp_frontend.pipeline import StereoPipeline
from kp_frontend.quantization import with_quantized_network

if TYPE_CHECKING:
    import openvino

log = logging.getLogger(__name__)

PRECISIONS = ("int8", "bf16", "fp32")  # fastest first


class OpenVinoBackend:
    """One compiled model with one inference request, tuned for latency."""

    name = "openvino"

    def __init__(self, compiled: openvino.CompiledModel, precision: str) -> None:
        self.request = compiled.create_infer_request()
        self.outputs = compiled.outputs
        self.precision = precision

    def __call__(self, images: Images, *others: np.ndarray) -> list[np.ndarray]:
        results = self.request.infer([batch(images), *others], share_inputs=True)
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
        graph, weights = path.read_bytes(), path.with_suffix(".bin").read_bytes()
    return len(graph).to_bytes(8, "little") + graph + weights


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


def compile_model(stored: bytes, precision: str, threads: int = 0) -> OpenVinoBackend:
    """Compile the result of `convert`.

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
    }
    if threads:
        settings["INFERENCE_NUM_THREADS"] = threads
    end = 8 + int.from_bytes(stored[:8], "little")
    model = core.read_model(stored[8:end], stored[end:])
    compiled = core.compile_model(model, "CPU", settings)
    _drop_signal_stack()
    return OpenVinoBackend(compiled, precision)


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
            backend = compile_model(stored, precision, options.threads)
            found = backend(*(tensor.numpy() for tensor in check))
            require(f"openvino {precision}", expected, found)
            return backend

        return options.cache.engine(_key(graph), lambda: convert(graph, example), load)

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
