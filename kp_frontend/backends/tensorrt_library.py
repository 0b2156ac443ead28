"""NVIDIA's TensorRT libraries behind one interface: TensorRT, and TensorRT for RTX GPUs."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
from types import ModuleType
from typing import Any

log = logging.getLogger(__name__)

# Python modules and what they are called. TensorRT for RTX has another name in NVIDIA's own archive
# than on PyPI.
MODULES = {
    "tensorrt": "TensorRT",
    "tensorrt_rtx": "TensorRT for RTX",
    "tensorrt_rtx_bindings": "TensorRT for RTX",
}
LEAST_VERSION = 10  # of TensorRT: the first with strongly typed networks


class Library:
    """One installed TensorRT library.

    Args:
        module: its Python module, of `MODULES`.
    """

    def __init__(self, module: str) -> None:
        self.api = importlib.import_module(module)
        self.name, self.version = MODULES[module], str(self.api.__version__)
        self.for_rtx = "rtx" in module
        self.messages: list[str] = []  # warnings and errors since the last `build` or `load`
        self._logger = _logger(self.api, self.messages)

    def __str__(self) -> str:
        return f"{self.name} {self.version}"

    def unsupported(self, capability: tuple[int, int]) -> str | None:
        """The reason why the library cannot build for a GPU of a compute capability, or None."""
        if not self.for_rtx and int(self.version.split(".")[0]) < LEAST_VERSION:
            return f"{self} is too old, version {LEAST_VERSION} is needed"
        wanted = f"SM{capability[0]}{capability[1]}"
        if self.for_rtx and wanted not in self.capabilities():
            known = ", ".join(self.capabilities())
            return f"{self} supports {known}, not {wanted}"
        return None

    def capabilities(self) -> list[str]:
        """Compute capabilities for which TensorRT for RTX builds, as `SM89`."""
        return [n for n in self.api.ComputeCapability.__members__ if n.startswith("SM")]

    def parse(self, onnx: bytes) -> tuple[Any, Any]:
        """Parse an ONNX file; the builder and the network, which keeps the types of the graph.

        Raises:
            RuntimeError: an operator is not supported, the file is damaged, or the library finds no
                GPU.
        """
        self.messages.clear()
        try:
            builder = self.api.Builder(self._logger)
        except TypeError as error:  # so it says that there is no GPU
            raise RuntimeError(f"{self} cannot start: {self._last_message()}") from error
        flags = self.api.NetworkDefinitionCreationFlag
        typed = getattr(flags, "STRONGLY_TYPED", None)
        network = builder.create_network(0 if typed is None else 1 << int(typed))
        parser = self.api.OnnxParser(network, self._logger)
        if not parser.parse(onnx):
            reasons = [parser.get_error(i).desc() for i in range(parser.num_errors)]
            raise RuntimeError(f"{self} cannot read the ONNX graph: {'; '.join(reasons[:2])}")
        return builder, network

    def build(self, onnx: bytes, capability: tuple[int, int] | None = None) -> bytes:
        """Build an engine from an ONNX file.

        Args:
            capability: compute capability of the GPU, for TensorRT for RTX only. None: TensorRT
                builds for the GPU of this machine, TensorRT for RTX for 8.6, 8.9 and 12.0.

        Raises:
            RuntimeError: the engine cannot be built.
        """
        if capability is not None and not self.for_rtx:
            raise RuntimeError(f"{self} builds only for the GPU of the machine that it runs on")
        reason = None if capability is None else self.unsupported(capability)
        if reason is not None:
            raise RuntimeError(reason)
        builder, network = self.parse(onnx)
        config = builder.create_builder_config()
        # Rounded factors of 10 bits would move positions.
        config.clear_flag(self.api.BuilderFlag.TF32)
        if capability is not None:
            config.num_compute_capabilities = 1
            wanted = self.api.ComputeCapability.__members__[f"SM{capability[0]}{capability[1]}"]
            config.set_compute_capability(wanted, 0)
        serialised = builder.build_serialized_network(network, config)
        for message in self.messages:
            log.warning("%s: %s", self, message)
        if serialised is None:
            raise RuntimeError(f"{self} could not build the engine: {self._last_message()}")
        return bytes(serialised)

    def load(self, engine: bytes) -> Any:
        """Deserialise an engine.

        Raises:
            RuntimeError: it is damaged, or of another version or GPU.
        """
        self.messages.clear()
        self._runtime = self.api.Runtime(self._logger)  # must outlive its engines
        loaded = self._runtime.deserialize_cuda_engine(engine)
        if loaded is None:
            raise RuntimeError(f"{self} cannot read the engine: {self._first_message()}")
        return loaded

    def _first_message(self) -> str:
        return self.messages[0] if self.messages else "it gives no reason"

    def _last_message(self) -> str:
        return self.messages[-1] if self.messages else "it gives no reason"


def _logger(api: ModuleType, messages: list[str]) -> Any:
    """A logger that collects warnings and errors in one line each."""

    class Logger(api.ILogger):  # type: ignore[name-defined]
        def log(self, severity: Any, message: str) -> None:
            if severity not in (api.ILogger.INFO, api.ILogger.VERBOSE):
                messages.append(" ".join(message.split())[:300])

    return Logger()


@functools.cache
def library(module: str) -> Library:
    """The library of a Python module. It may be given only one logger in a process."""
    return Library(module)


def installed() -> list[str]:
    """The modules of `MODULES` that are installed."""
    return [module for module in MODULES if importlib.util.find_spec(module) is not None]
