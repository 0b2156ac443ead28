"""A step with fixed shapes as one CUDA graph, from host memory to host memory."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from kp_frontend.backends import Images

Step = Callable[..., Sequence[Tensor]]

ALIGNMENT = 256  # bytes, of each input on the device
WARM_UPS = 3  # warm-up calls before the capture, in which libraries choose their kernels


def gpu_unavailable() -> str | None:
    """The reason why torch cannot use an NVIDIA GPU on this machine, or None.

    Without a GPU, without a driver, or with one that is too old, it is the one that torch gives.
    """
    if torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the same as the error of init
        if torch.cuda.is_available():
            return None
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return first_sentence(error)
    return "no NVIDIA GPU that torch can use"


def first_sentence(error: BaseException) -> str:
    """An error of torch or CUDA in one line, without the advice that follows it."""
    words = " ".join(str(error).split()) or type(error).__name__
    return words.split(". ")[0].rstrip(".")


def gpu_driver() -> str:
    """Version text of the NVIDIA driver; on a Jetson, of the board support package."""
    for file in (Path("/proc/driver/nvidia/version"), Path("/etc/nv_tegra_release")):
        if file.is_file():
            return file.read_text().splitlines()[0]
    return "unknown"


def gpu_key() -> dict[str, str]:
    """Properties of the GPU and its software on which an engine depends."""
    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": f"{properties.name}, {properties.major}.{properties.minor}, "
        f"{properties.multi_processor_count} multiprocessors",
        "driver": gpu_driver(),
        "cuda": str(torch.version.cuda),
        "torch": torch.__version__,
    }


class Packed(nn.Module):
    """A step whose results leave as one vector, so that one transfer brings them to the host.

    Args:
        step: maps tensors to tensors of 32-bit elements.
    """

    def __init__(self, step: Step) -> None:
        super().__init__()
        self.step = step

    def forward(self, *inputs: Tensor) -> Tensor:
        """The bits of all results one after another, int32."""
        return torch.cat([result.reshape(-1).view(torch.int32) for result in self.step(*inputs)])


def unpacked(packed: np.ndarray, like: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The results in a vector of `Packed`, of the shapes and types of `like`, as views."""
    ends = np.cumsum([array.size for array in like])
    parts = np.split(packed, ends[:-1])
    return [
        part.view(array.dtype).reshape(array.shape) for part, array in zip(parts, like, strict=True)
    ]


class Inputs:
    """Tensors in one buffer on the host and one on the device, copied by one transfer."""

    def __init__(self, example: Sequence[Tensor]) -> None:
        sizes = [-(-tensor.nbytes // ALIGNMENT) * ALIGNMENT for tensor in example]
        self._host = torch.zeros(sum(sizes), dtype=torch.uint8, pin_memory=True)
        self._device = torch.zeros(sum(sizes), dtype=torch.uint8, device="cuda")
        self.host, self.device = (
            [
                part[: tensor.nbytes].view(tensor.dtype).reshape(tensor.shape)
                for part, tensor in zip(buffer.split(sizes), example, strict=True)
            ]
            for buffer in (self._host, self._device)
        )
        self._arrays = [tensor.numpy() for tensor in self.host]

    def send(self, arrays: Sequence[np.ndarray]) -> None:
        """Copy arrays into the buffer and start its transfer on the current stream."""
        for buffer, array in zip(self._arrays, arrays, strict=True):
            buffer[...] = array
        self._device.copy_(self._host, non_blocking=True)


class CudaGraphStep:
    """Runs a step of fixed shapes from host memory to host memory.

    Host buffers are pinned and device buffers are static, as a graph requires. While one image is
    on its way to the device, the next one is copied into its host buffer. The graph holds the step
    and the one transfer of its results.

    Args:
        step: maps device tensors to one vector, as `Packed` does, without host synchronisation.
        example: host tensors that define shapes and types. The first one is a batch of images.
        like: arrays of the shapes and types of the results.
    """

    def __init__(
        self, step: Callable[..., Tensor], example: tuple[Tensor, ...], like: Sequence[np.ndarray]
    ) -> None:
        images, *others = example
        self._images = images.clone().pin_memory()
        self._image_arrays = [image.numpy() for image in self._images]
        self._images_on_device = images.cuda()
        self._others = Inputs(others) if others else None
        self._like = like
        inputs = (self._images_on_device, *(self._others.device if self._others else ()))
        self.stream = torch.cuda.Stream()
        with torch.inference_mode(), torch.cuda.stream(self.stream):
            for _ in range(WARM_UPS):
                packed = step(*inputs)
            self._packed = torch.empty(packed.shape, dtype=packed.dtype, pin_memory=True)
            self.stream.synchronize()
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, stream=self.stream):
                self._result = step(*inputs)
                self._packed.copy_(self._result, non_blocking=True)

    def __call__(self, images: Images, *others: np.ndarray) -> list[np.ndarray]:
        """Run once and wait for the results."""
        with torch.cuda.stream(self.stream):
            if self._others is not None:
                self._others.send(others)
            for i, image in enumerate(images):
                self._image_arrays[i][...] = image
                self._images_on_device[i].copy_(self._images[i], non_blocking=True)
            self.graph.replay()
        self.stream.synchronize()
        return unpacked(self._packed.numpy().copy(), self._like)

    def gpu_ms(self) -> float:
        """Milliseconds that the GPU takes for the graph, without the transfers of the inputs."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.stream(self.stream):
            begin.record()
            self.graph.replay()
            end.record()
        end.synchronize()
        return begin.elapsed_time(end)
