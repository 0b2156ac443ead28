"""OpenVINO: the fastest way to run the pipeline on a CPU."""

from __future__ import annotations

import numpy as np
import openvino
from torch import Tensor, nn


class OpenVinoBackend:
    """One compiled model with one inference request, tuned for latency."""

    name = "openvino"

    def __init__(self, compiled: openvino.CompiledModel) -> None:
        self.request = compiled.create_infer_request()
        self.outputs = compiled.outputs
        kind = compiled.get_property("INFERENCE_PRECISION_HINT")
        self.precision = {"f32": "fp32", "f16": "fp16"}.get(kind.to_string(), kind.to_string())

    def __call__(self, *inputs: np.ndarray) -> list[np.ndarray]:
        results = self.request.infer(list(inputs), share_inputs=True)
        return [results[output].copy() for output in self.outputs]


def build(pipeline: nn.Module, example: tuple[Tensor, ...], threads: int) -> OpenVinoBackend:
    """Convert and compile for the shapes of `example`."""
    model = openvino.convert_model(
        pipeline, example_input=example, input=[tuple(tensor.shape) for tensor in example]
    )
    options: dict[str, object] = {
        "PERFORMANCE_HINT": "LATENCY",
        # fp32 keeps every keypoint; positions are read from a heatmap that bf16 would coarsen.
        "INFERENCE_PRECISION_HINT": "f32",
    }
    if threads:
        options["INFERENCE_NUM_THREADS"] = threads
    return OpenVinoBackend(openvino.Core().compile_model(model, "CPU", options))
