"""The pipeline as an ONNX graph, for TensorRT and other engines.

Beside each exported file lies a description of the same name with the suffix `.json`. It tells of
which network and for which images the graph, or an engine that was built from it, is.
"""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import json
import logging
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kp_frontend
from kp_frontend.pipeline import MODULES, PipelineResults, StereoPipeline, TrackResults
from kp_frontend.quantization import require_ranges, with_quantized_network

if TYPE_CHECKING:
    import onnx_ir

# The newest that torch writes without a conversion. TensorRT 10 reads 9 to 20.
OPSET = 18
PRECISIONS = ("fp32", "fp16", "int8")
REQUIRED = ("onnx", "onnxscript")


def unavailable() -> str | None:
    """The reason why nothing can be exported here, or None."""
    missing = [name for name in REQUIRED if importlib.util.find_spec(name) is None]
    return f"not installed: {' and '.join(missing)} (requirements-export.txt)" if missing else None


class NetworkOnly(nn.Module):
    """The network of a pipeline alone, in fp32 to the outside."""

    def __init__(self, pipeline: StereoPipeline) -> None:
        super().__init__()
        self.network, self.pad = pipeline.network, pipeline.pad

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Maps images (2, H, W) uint8 to the logits and the two maps of features."""
        logits, features = self.network(F.pad(images.float()[:, None], self.pad, mode="replicate"))
        return tuple(found.float() for found in (logits, *features))


def lowered(pipeline: StereoPipeline, precision: str) -> StereoPipeline:
    """A copy of a pipeline with the network in a precision; all after it stays in fp32.

    int8 rounds to signed numbers only, because TensorRT has no others.

    Raises:
        ValueError: int8 without ranges.
    """
    if precision == "int8":
        require_ranges(pipeline.network)
        return with_quantized_network(pipeline, signed=True)
    result = copy.deepcopy(pipeline)
    result.network.to({"fp32": torch.float32, "fp16": torch.float16}[precision])
    return result


def names(pipeline: StereoPipeline) -> tuple[list[str], list[str]]:
    """Names of the inputs and outputs of the exported pipeline, in its order."""
    inputs = ["images", "settings"]
    outputs = [n for n in PipelineResults._fields if n not in ("places", "tracks")]
    if pipeline.raw:
        outputs.append("places")
    if pipeline.tracked:
        inputs += ["known_points", "known_descriptors", "known_windows"]
        outputs += TrackResults._fields
    if pipeline.raw:
        inputs.append("maps")
    return inputs, outputs


def describe(pipeline: StereoPipeline, precision: str, part: str = "pipeline") -> dict[str, str]:
    """What an exported file is of, as text."""
    height, width = pipeline.size
    folder = Path(kp_frontend.__file__).parent
    code = hashlib.sha256(b"".join((folder / f"{name}.py").read_bytes() for name in MODULES))
    return {
        "part": part,
        "size": f"{width}x{height}",
        "input": "raw" if pipeline.raw else "rectified",
        "max_keypoints": str(pipeline.count),
        "nms_radius": str(pipeline.radius),
        "border": str(pipeline.border),
        "min_margin": "on" if pipeline.with_margin else "off",
        "tracks": "on" if pipeline.tracked else "off",
        "weights": json.dumps(weights_signature(pipeline)),
        "code": code.hexdigest()[:16],
        "precision": precision,
    }


def weights_signature(pipeline: StereoPipeline) -> list[float]:
    """Eight numbers that tell weights apart.

    A digest would not do: folding the batch normalisation gives other last bits on another
    processor.
    """
    tensors = (tensor.double().flatten() for _, tensor in sorted(pipeline.state_dict().items()))
    flat = torch.cat(list(tensors)).numpy()
    place = np.arange(flat.size)
    return [round(float(flat @ np.cos(i * place + i)), 6) for i in range(1, 9)]


def description_file(path: str | Path) -> Path:
    """The file beside an exported graph or an engine that describes it."""
    return Path(path).with_suffix(".json")


def write(path: Path, content: bytes, description: dict[str, str]) -> None:
    """Write an exported graph or an engine, and its description beside it."""
    path.write_bytes(content)
    described = {**description, "sha256": hashlib.sha256(content).hexdigest()}
    description_file(path).write_text(json.dumps(described, indent=1) + "\n")


def read(path: str | Path, pipeline: StereoPipeline) -> tuple[bytes, str]:
    """Read an exported graph or an engine that was built from it.

    Returns:
        The content and the precision.

    Raises:
        ValueError: it is not of this pipeline, or its description is missing.
    """
    file, about = Path(path), description_file(path)
    try:
        content = file.read_bytes()
        found = json.loads(about.read_text())
        precision = str(found["precision"])
        expected = describe(pipeline, precision)
        weights = np.array(json.loads(found["weights"]), float).reshape(8)
    except OSError as error:
        raise ValueError(
            f"{path} cannot be used: {error.strerror}: {error.filename} (`kp export` writes both)"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{about} is not a description by `kp export`") from error
    for name, value in expected.items():
        if name != "weights" and found.get(name) != value:
            wrong = f"for {name} {found.get(name)}, not {value}"
            if name == "code":
                wrong = "by another version of kp_frontend"
            raise ValueError(f"{path} is {wrong}: run `kp export` again")
    if not np.allclose(weights, weights_signature(pipeline), rtol=1e-3, atol=1e-3):
        raise ValueError(f"{path} is of another network: run `kp export` again")
    if file.suffix == ".onnx" and found.get("sha256") != hashlib.sha256(content).hexdigest():
        raise ValueError(f"{path} is damaged or not the file of {about.name}")
    return content, precision


def export(pipeline: StereoPipeline, example: tuple[Tensor, ...], precision: str) -> bytes:
    """The pipeline as an ONNX file, with the network in a precision.

    Raises:
        ValueError: int8 without ranges.
    """
    inputs, outputs = names(pipeline)
    return _onnx(
        lowered(pipeline, precision), example, inputs, outputs, describe(pipeline, precision)
    )


def export_network(pipeline: StereoPipeline, example: tuple[Tensor, ...], precision: str) -> bytes:
    """The network alone as an ONNX file.

    Raises:
        ValueError: int8 without ranges.
    """
    network = NetworkOnly(lowered(pipeline, precision)).eval()
    about = describe(pipeline, precision, "network")
    return _onnx(network, example[:1], ["images"], ["logits", "coarse", "fine"], about)


def _onnx(
    module: nn.Module,
    example: tuple[Tensor, ...],
    inputs: list[str],
    outputs: list[str],
    metadata: dict[str, str],
) -> bytes:
    from onnxscript import optimizer

    # It warns of operators of torchvision, which is not used.
    logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # from torch's own export
        program = torch.onnx.export(
            torch.export.export(module, example, strict=False),
            dynamo=True,
            opset_version=OPSET,
            input_names=inputs,
            output_names=outputs,
            custom_translation_table=_quantizers(),
            optimize=False,  # its rewriting takes a minute and engines have their own
            verbose=False,
        )
    assert program is not None
    model: onnx_ir.Model = program.model
    optimizer.fold_constants(model)
    optimizer.remove_unused_nodes(model)
    model.metadata_props.update(metadata)
    model.graph.name = "kp_frontend"
    return program.model_proto.SerializeToString()


def _quantizers() -> dict[Any, Any]:
    """How fake quantization is written: QuantizeLinear, then DequantizeLinear."""
    import onnx
    from onnxscript import opset18 as op

    def constant(value: Any) -> Any:
        return op.Constant(value=onnx.numpy_helper.from_array(value))

    def number(least: int) -> type:
        return np.int8 if least < 0 else np.uint8

    def per_tensor(x, scale: float, zero_point: int, quant_min: int, quant_max: int):  # noqa: ANN001
        step, zero = constant(np.float32(scale)), constant(number(quant_min)(zero_point))
        return op.DequantizeLinear(op.QuantizeLinear(x, step, zero), step, zero)

    def per_channel(x, scale, zero_point, axis: int, quant_min: int, quant_max: int):  # noqa: ANN001
        zero = op.Cast(zero_point, to=onnx.TensorProto.INT8)
        rounded = op.QuantizeLinear(x, scale, zero, axis=axis)
        return op.DequantizeLinear(rounded, scale, zero, axis=axis)

    aten = torch.ops.aten
    return {
        aten.fake_quantize_per_tensor_affine.default: per_tensor,
        aten.fake_quantize_per_channel_affine.default: per_channel,
    }
