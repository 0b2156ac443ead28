"""`kp doctor`: hardware and software of this machine, and its backends; for bug reports."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import statistics
import time
from pathlib import Path

import cv2
import torch
from rich.console import Console
from rich.table import Table

from kp_frontend.backends import (
    BACKENDS,
    BackendOptions,
    backend_module,
    make_backend,
    processor,
)
from kp_frontend.backends.agreement import agreement, check_images, reference
from kp_frontend.backends.compilation import c_compiler, compiler_unavailable, triton_version
from kp_frontend.backends.cuda_graph import gpu_driver, gpu_unavailable
from kp_frontend.backends.tensorrt_library import installed, library
from kp_frontend.config import FrontendConfig
from kp_frontend.frontend import StereoFrontend
from kp_frontend.pipeline import StereoPipeline

PACKAGES = ("numpy", "opencv-python-headless", "torch", "openvino", "torch_tensorrt")
FEATURES = (
    "avx2", "avx512f", "avx_vnni", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8",
    "asimd", "asimddp", "i8mm", "bf16",
)  # fmt: skip
CALLS = 10  # number of calls of a backend to measure its latency


def machine() -> dict[str, str]:
    """Hardware and package versions of this machine, as text."""
    flags = processor.features()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    found = {
        "system": f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
        "processor": processor.processor().get("model name", platform.machine()),
        "cores": str(len(os.sched_getaffinity(0))),
        "features": " ".join(f for f in FEATURES if f in flags) or "none listed",
        "int8": processor.int8_dot_products() or "no dot products, so `auto` does not use int8",
        "memory": f"{memory:.0f} GiB",
    }
    if gpu_unavailable() is None:
        found |= {"GPU": torch.cuda.get_device_name(), "driver": gpu_driver()}
        found["compiler for the GPU"] = compiler_unavailable() or "works with torch.compile"
    else:
        found["GPU"] = f"none: {gpu_unavailable()}"
    found["C compiler"] = c_compiler() or "none"
    found["Triton"] = triton_version() or "not installed"
    found["TensorRT"] = ", ".join(str(library(module)) for module in installed()) or "none"
    for name in PACKAGES:
        found[name] = _version(name)
    return found


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        pass
    if package == "opencv-python-headless":  # on a robot, OpenCV comes from the distribution
        return cv2.__version__
    return "not installed"


def ros() -> dict[str, str]:
    """The ROS installation, as text."""
    if importlib.util.find_spec("rclpy") is None:
        return {"ROS": "rclpy not found: source a ROS 2 installation or run `make setup`"}
    import rclpy

    from kp_frontend.ros import standins

    here = str(Path(standins.__file__).parent)
    standins.put_on_path()
    profile = os.environ.get(
        "FASTDDS_DEFAULT_PROFILES_FILE", os.environ.get("FASTRTPS_DEFAULT_PROFILES_FILE")
    )
    wheel = next((d for d in importlib.metadata.distributions() if d.name.endswith("-rclpy")), None)
    found = {
        "ROS": os.environ.get("ROS_DISTRO") or (f"{wheel.name} {wheel.version}" if wheel else "?"),
        "RMW": rclpy.get_rmw_implementation_identifier(),
        "ROS_DOMAIN_ID": os.environ.get("ROS_DOMAIN_ID", "0"),
        "Fast DDS profile": profile
        or "none: 1080p images can be lost (the launch files set a profile)",
    }
    if Path("/dev/shm").is_dir():
        found["shared memory"] = f"{shutil.disk_usage('/dev/shm').free / 2**20:.0f} MiB free"
    spec = importlib.util.find_spec("message_filters")
    origin = spec.origin if spec else None
    if origin is None or origin.startswith(here):
        found["message_filters"] = "the built-in replacement"
    else:
        found["message_filters"] = str(Path(origin).parent)
    return found


def examine(model: str, height: int, width: int) -> list[dict[str, str | float | None]]:
    """For each backend: availability, agreement with the reference, and time of a call."""
    frontend = StereoFrontend(FrontendConfig(model=model))
    pipeline = StereoPipeline(
        frontend.network, frontend.config, height, width, uncertainty=frontend.uncertainty
    ).eval()
    inputs = (check_images(height, width), *frontend.blank_inputs(width))
    tensors = tuple(torch.from_numpy(array) for array in inputs)
    expected = reference(pipeline, tensors)
    rows = []
    for name in BACKENDS:
        row: dict[str, str | float | None] = {"backend": name, "precision": None, "ms": None}
        rows.append(row)
        row["state"] = backend_module(name).unavailable()
        if row["state"] is not None:
            continue
        begin = time.perf_counter()
        try:
            backend = make_backend(name, pipeline, tensors, BackendOptions())
        except ValueError as error:
            row["state"] = str(error)
            continue
        row["start_s"] = round(time.perf_counter() - begin, 2)
        row["precision"] = backend.precision
        state = str(agreement(expected, backend(*inputs)))
        row["state"] = state + ("" if getattr(backend, "compiled", True) else "; not compiled")
        took = []
        for _ in range(CALLS):
            begin = time.perf_counter()
            backend(*inputs)
            took.append(1e3 * (time.perf_counter() - begin))
        row["ms"] = round(statistics.median(took), 2)
    return rows


def run_doctor(model: str, size: tuple[int, int]) -> dict:
    """Print the report; returns it for JSON.

    Args:
        model: network name or weights file.
        size: width and height of the images for the latency.

    Raises:
        ValueError: the weights cannot be used.
    """
    console = Console()
    width, height = size
    about = {"machine": machine(), "ros": ros()}
    backends = examine(model, height, width)
    for title, values in about.items():
        table = Table(title=title, show_header=False)
        for name, value in values.items():
            table.add_row(name, value)
        console.print(table)
    usable = [row["backend"] for row in backends if row["ms"] is not None]
    title = f"{model}, one {width}x{height} pair; auto selects {usable[0]}"
    table = Table("backend", "precision", "start s", "call ms", "agreement or reason", title=title)
    for row in backends:
        cells = (row["backend"], row["precision"], row.get("start_s"), row["ms"], row["state"])
        table.add_row(*("" if cell is None else str(cell) for cell in cells))
    console.print(table)
    return {**about, "backends": backends, "auto": usable[0]}
