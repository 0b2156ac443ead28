"""Build, agreement, speed, profile and tests on an NVIDIA GPU, in one call of a few minutes.

    python3 bench/gpu_check.py --out gpu_check_out

It needs torch, NumPy and OpenCV; without safetensors and SciPy it uses stand-ins for the few
functions that the front end calls, and without pytest it leaves the tests out. Parts for which no
time is left are left out as well. With `--cpu` it runs at a small size without a GPU, to test
itself.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

import standins  # noqa: E402

standins.install()

import torch  # noqa: E402

from kp_frontend.backends import backend_module, compilation, cuda_backend  # noqa: E402
from kp_frontend.backends.agreement import agreement, check_images, reference  # noqa: E402
from kp_frontend.backends.cuda_graph import gpu_driver, gpu_unavailable  # noqa: E402
from kp_frontend.config import FrontendConfig  # noqa: E402
from kp_frontend.frontend import StereoFrontend  # noqa: E402
from kp_frontend.tools.gpu_figures import graph_ms, kernels, measure  # noqa: E402

CASES = (("tiny", 640, 480), ("base", 1920, 1080))
CPU_CASES = (("tiny", 160, 128),)
BUDGET = 330.0  # seconds after which no part is started
CALLS = 10_000  # to see that memory stays
ROUNDS = 60
SHOWN = 15  # kernels


class Checks:
    """Runs the parts one after another; what one raises does not stop the next."""

    def __init__(self, out: Path, cpu: bool) -> None:
        self.out, self.cpu = out, cpu
        self.cases = CPU_CASES if cpu else CASES
        self.begin = time.perf_counter()
        self.report: dict = {}

    def part(self, name: str, run: Callable[[], object]) -> None:
        """Run one part and keep what it returns."""
        elapsed = time.perf_counter() - self.begin
        print(f"\n== {name} (after {elapsed:.0f} s)", flush=True)
        if elapsed > BUDGET:
            self.report[name] = "left out: no time"
        else:
            try:
                self.report[name] = run()
            except Exception as error:  # the report says so, and the next part runs
                self.report[name] = f"failed: {type(error).__name__}: {error}"
        print(json.dumps(self.report[name], indent=1), flush=True)
        (self.out / "gpu_check.json").write_text(json.dumps(self.report, indent=1) + "\n")

    def machine(self) -> dict[str, str]:
        """The GPU and its software."""
        reason = gpu_unavailable()
        if reason is not None:
            return {"torch": torch.__version__, "GPU": f"none: {reason}"}
        return {
            "torch": torch.__version__,
            "GPU": torch.cuda.get_device_name(),
            "driver": gpu_driver(),
            "compiler": compilation.compiler_unavailable() or "works",
            "C compiler": compilation.c_compiler() or "none",
            "Triton": compilation.triton_version() or "none",
            "TensorRT": backend_module("tensorrt").unavailable() or "works",
        }

    def starts(self, model: str, width: int, height: int) -> list[dict]:
        """Two starts in processes of their own: the first builds, the second has a full cache."""
        found = []
        for _ in range(2):
            begin = time.perf_counter()
            command = [sys.executable, __file__, "--start", model, f"{width}x{height}"]
            done = subprocess.run(
                command + ["--cpu"] * self.cpu, capture_output=True, text=True, check=False
            )
            if done.returncode:
                raise RuntimeError(done.stderr[-2000:])
            process_s = round(time.perf_counter() - begin, 1)
            found.append({**json.loads(done.stdout.splitlines()[-1]), "process_s": process_s})
        return found

    def speed(self, model: str, width: int, height: int) -> dict:
        """Medians of interleaved calls, and what the graph does on the GPU."""
        images = check_images(height, width)
        frontends = {"eager fp32": StereoFrontend(self._config(model, "torch"))}
        if not self.cpu:
            frontends["compiled"] = StereoFrontend(self._config(model, "cuda"))
            frontends["as written"] = StereoFrontend(self._config(model, "cuda"))
        for name, frontend in frontends.items():
            with _compiler(name != "as written"):
                frontend.warm_up(height, width)
        took: dict[str, list[float]] = {name: [] for name in frontends}
        for _ in range(3 if self.cpu else ROUNDS):
            for name, frontend in frontends.items():
                begin = time.perf_counter()
                frontend(*images)
                took[name].append(1e3 * (time.perf_counter() - begin))
        report: dict = {f"{name}, host to host, ms": _median(ms) for name, ms in took.items()}
        if self.cpu:
            return report
        engine, plain = (frontends[name].engine for name in ("compiled", "as written"))
        pipeline, _ = frontends["compiled"].pipeline(height, width)
        figures = measure(engine, pipeline, images)
        inputs = (images, *frontends["compiled"].blank_inputs(width))
        expected = reference(pipeline, tuple(map(torch.from_numpy, inputs)))
        top = kernels(engine.step)
        return {
            **report,
            "compiled": figures.compiled,
            "graph on the GPU, ms": round(figures.gpu_ms, 3),
            "kernels": figures.kernels,
            "as written, on the GPU, ms": round(graph_ms(plain.step), 3),
            "as written, kernels": sum(kernel.calls for kernel in kernels(plain.step)),
            "network on the GPU, ms": figures.network_ms,
            "roofline of the network, ms": figures.roofline_ms,
            "share of the roofline": figures.share,
            "agreement": str(agreement(expected, engine(*inputs))),
            "profile, ms": {f"{k.calls} x {k.name[:90]}": round(k.ms, 4) for k in top[:SHOWN]},
        }

    def memory(self) -> dict:
        """Memory before and after many calls."""
        model, width, height = self.cases[0]
        frontend = StereoFrontend(self._config(model, "torch" if self.cpu else "cuda"))
        images = check_images(height, width)
        calls = 10 if self.cpu else CALLS

        def used() -> tuple[float, float]:
            status = Path("/proc/self/status").read_text().split("VmRSS:")[1]
            gpu = 0 if self.cpu else torch.cuda.memory_allocated()
            return round(int(status.split()[0]) / 1024, 1), gpu / 2**20

        for _ in range(calls // 10):
            frontend(*images)
        before = used()
        for _ in range(calls):
            frontend(*images)
        return {"calls": calls, "MiB resident and on the GPU": [before, used()]}

    def tests(self) -> str:
        """The tests marked `gpu`."""
        if importlib.util.find_spec("pytest") is None:
            return "left out: pytest is not installed"
        files = [str(ROOT / "test/frontend" / f"test_{n}.py") for n in ("cuda_backend", "onnx")]
        options = ["--noconftest", "-m", "gpu", "-q", "-rs", "-p", "no:cacheprovider", *files]
        command = (
            f"import standins; standins.install(); import pytest; exit(pytest.main({options}))"
        )
        done = subprocess.run(
            [sys.executable, "-c", command],
            capture_output=True,
            text=True,
            check=False,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        words = "\n".join(done.stdout.splitlines()[-12:])
        if done.returncode:
            raise RuntimeError(words)
        return words

    def tensorrt(self) -> dict | str:
        """The backend `tensorrt`, where it is installed."""
        reason = backend_module("tensorrt").unavailable()
        if reason is not None:
            return f"left out: {reason}"
        found = {}
        for model, width, height in self.cases:
            frontend = StereoFrontend(self._config(model, "tensorrt"))
            begin = time.perf_counter()
            frontend.warm_up(height, width)
            start = time.perf_counter() - begin
            found[model] = {
                "start s": round(start, 1), "graph, ms": graph_ms(frontend.engine.step)
            }  # fmt: skip
        return found

    def _config(self, model: str, backend: str) -> FrontendConfig:
        most = 256 if self.cpu else 1024
        device = "cpu" if self.cpu else "cuda"
        return FrontendConfig(model=model, backend=backend, device=device, max_keypoints=most)


def _median(ms: list[float]) -> float:
    return round(statistics.median(ms), 3)


class _compiler:
    """Whether engines that are built inside are compiled."""

    def __init__(self, on: bool) -> None:
        self.on, self.before = on, cuda_backend.compiler_unavailable

    def __enter__(self) -> None:
        if not self.on:
            cuda_backend.compiler_unavailable = lambda: "not compiled for comparison"

    def __exit__(self, *_: object) -> None:
        cuda_backend.compiler_unavailable = self.before


def start(model: str, size: str, cpu: bool) -> None:
    """Warm up a front end and print how long it took, as JSON."""
    width, height = map(int, size.split("x"))
    most = 256 if cpu else 1024
    begin = time.perf_counter()
    frontend = StereoFrontend(
        FrontendConfig(model=model, backend="torch" if cpu else "cuda", max_keypoints=most)
    )
    frontend.warm_up(height, width)
    found = {
        "backend": frontend.backend,
        "compiled": getattr(frontend.engine, "compiled", False),
        "start_s": round(time.perf_counter() - begin, 1),
    }
    print(json.dumps(found))


def main() -> int:
    """Run all parts; exit status 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=Path, default=Path("gpu_check_out"), help="folder for results"
    )
    parser.add_argument("--cpu", action="store_true", help="leave out what needs a GPU")
    parser.add_argument("--start", nargs=2, metavar=("MODEL", "SIZE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.start:
        start(*arguments.start, arguments.cpu)
        return 0
    reason = gpu_unavailable()
    if reason is not None and not arguments.cpu:
        print(f"gpu_check: {reason}; --cpu runs the parts that need no GPU", file=sys.stderr)
        return 1
    arguments.out.mkdir(parents=True, exist_ok=True)
    os.environ["KP_ENGINE_CACHE"] = str(arguments.out.resolve() / "engines")
    checks = Checks(arguments.out, arguments.cpu)
    checks.part("machine", checks.machine)
    for case in checks.cases:
        name = "{} {}x{}".format(*case)
        checks.part(f"{name}, starts", lambda case=case: checks.starts(*case))
        checks.part(f"{name}, speed", lambda case=case: checks.speed(*case))
    checks.part("tests", checks.tests)
    checks.part("memory", checks.memory)
    checks.part("tensorrt", checks.tensorrt)
    bad = [name for name, found in checks.report.items() if str(found).startswith("failed")]
    print(f"\n{len(bad)} parts failed {bad or ''}; {arguments.out / 'gpu_check.json'}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
