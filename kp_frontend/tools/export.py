"""`kp export`: the pipeline or the network as an ONNX graph or a TensorRT engine."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from kp_frontend.backends import onnx_graph
from kp_frontend.backends.tensorrt_library import installed, library
from kp_frontend.config import FrontendConfig
from kp_frontend.frontend import StereoFrontend
from kp_frontend.output_paths import check_file

FORMATS = ("onnx", "tensorrt")


def run_export(
    config: FrontendConfig,
    size: tuple[int, int],
    out: Path,
    raw: bool = False,
    network_only: bool = False,
    form: str = "onnx",
    capability: tuple[int, int] | None = None,
) -> None:
    """Write a file and its description beside it, and print its inputs and outputs.

    Args:
        config: settings; those that an engine is built for are in the graph, with `precision`
            (auto: fp16 for TensorRT, else fp32).
        size: width and height of the images.
        out: file to write.
        raw: whether the images are raw instead of rectified.
        network_only: only the network, without detection, matching and tracks.
        form: one of `FORMATS`.
        capability: for TensorRT, compute capability of the GPU, see `Library.build`.

    Raises:
        ValueError: something is missing, the graph cannot be built, or `out` cannot be written.
        RuntimeError: TensorRT cannot build the engine.
    """
    reason = onnx_graph.unavailable()
    if reason is not None:
        raise ValueError(reason)
    if capability and form != "tensorrt":
        raise ValueError("--gpu is for --format tensorrt: a graph does not depend on the GPU")
    if form == "tensorrt":
        if not installed():
            raise ValueError("not installed: tensorrt or tensorrt_rtx")
        reason = library(installed()[0]).unsupported(capability) if capability else None
        if reason is not None:
            raise ValueError(reason)
    pipeline, example = StereoFrontend(config).pipeline(size[1], size[0], raw)
    check_file(out, beside=True)
    if out == onnx_graph.description_file(out):
        raise ValueError(f"{out}: .json is the suffix of the description, choose another one")
    precision = config.precision
    if precision == "auto":
        precision = "fp16" if form == "tensorrt" else "fp32"
    if precision not in onnx_graph.PRECISIONS:
        choices = ", ".join(onnx_graph.PRECISIONS)
        raise ValueError(f"precision {precision} cannot be exported, only {choices}")
    make = onnx_graph.export_network if network_only else onnx_graph.export
    content = make(pipeline, example, precision)
    table = _table(content, f"{config.model}, {size[0]}x{size[1]}, {precision}")
    about = onnx_graph.describe(pipeline, precision, "network" if network_only else "pipeline")
    if form == "tensorrt":
        tensorrt = library(installed()[0])
        content = tensorrt.build(content, capability)
        about["library"] = str(tensorrt)
    onnx_graph.write(out, content, about)
    console = Console()
    console.print(table)
    console.print(f"{out}: {len(content) / 2**20:.1f} MiB; {onnx_graph.description_file(out)}")


def _table(content: bytes, title: str) -> Table:
    """Inputs and outputs of an ONNX file."""
    import onnx

    graph = onnx.load_model_from_string(content).graph
    table = Table("", "name", "type", "shape", title=title)
    for what, tensors in (("input", graph.input), ("output", graph.output)):
        for tensor in tensors:
            kind = tensor.type.tensor_type
            shape = "x".join(str(d.dim_value) for d in kind.shape.dim)
            table.add_row(
                what, tensor.name, onnx.TensorProto.DataType.Name(kind.elem_type).lower(), shape
            )
    return table
