"""Stand-ins for the parts of safetensors and SciPy that the front end calls, for bare machines."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64}


class SafetensorError(Exception):
    """A file is not a safetensors file."""


class SafeFile:
    """A safetensors file: the length of a JSON header, the header, the tensors."""

    def __init__(self, path: str, framework: str = "pt") -> None:
        content = Path(path).read_bytes()
        end = 8 + int.from_bytes(content[:8], "little")
        try:
            self.header = json.loads(content[8:end])
        except ValueError as error:
            raise SafetensorError(str(error)) from error
        self.data = bytearray(content[end:])

    def __enter__(self) -> SafeFile:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def metadata(self) -> dict[str, str] | None:
        """Text by name."""
        return self.header.get("__metadata__")

    def keys(self) -> list[str]:
        """Names of the tensors."""
        return [name for name in self.header if name != "__metadata__"]

    def get_tensor(self, name: str) -> Tensor:
        """A tensor by name."""
        entry = self.header[name]
        begin, end = entry["data_offsets"]
        if begin == end:
            return torch.empty(entry["shape"], dtype=TYPES[entry["dtype"]])
        flat = torch.frombuffer(self.data[begin:end], dtype=TYPES[entry["dtype"]])
        return flat.reshape(entry["shape"])


def load_file(path: str) -> dict[str, Tensor]:
    """All tensors of a file."""
    file = SafeFile(str(path))
    return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def _save(*_: object) -> bytes:
    raise NotImplementedError("this stand-in only reads")


class KDTree:
    """Nearest points by comparing all."""

    def __init__(self, points: np.ndarray) -> None:
        self.points = np.asarray(points)

    def query(self, others: np.ndarray, k: range) -> tuple[np.ndarray, np.ndarray]:
        """Distances and rows of the nearest points, of the ranks `k`, which count from 1."""
        apart = np.linalg.norm(np.asarray(others)[:, None] - self.points, axis=-1)
        rows = np.argsort(apart, axis=1)[:, np.array(k) - 1]
        return np.take_along_axis(apart, rows, 1), rows


def install() -> None:
    """Put the stand-ins in the place of what is not installed."""
    if importlib.util.find_spec("safetensors") is None:
        module, torch_part = ModuleType("safetensors"), ModuleType("safetensors.torch")
        module.SafetensorError, module.safe_open = SafetensorError, SafeFile
        torch_part.load_file, torch_part.save = load_file, _save
        module.torch = torch_part
        sys.modules.update({"safetensors": module, "safetensors.torch": torch_part})
    if importlib.util.find_spec("scipy") is None:
        module, spatial = ModuleType("scipy"), ModuleType("scipy.spatial")
        spatial.cKDTree = KDTree
        module.spatial = spatial
        sys.modules.update({"scipy": module, "scipy.spatial": spatial})
