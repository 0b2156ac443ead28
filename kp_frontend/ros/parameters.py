"""The node's parameters: declared from the configs' fields, checked, and documented.

What is `fixed` in a config is a read-only parameter. The others change at run time: a new value is
checked together with all the rest, and taken between two pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import Field, dataclass, fields, replace
from typing import Any

from rcl_interfaces.msg import (
    FloatingPointRange,
    IntegerRange,
    ParameterDescriptor,
    SetParametersResult,
)
from rclpy.node import Node
from rclpy.parameter import Parameter

from kp_frontend.config import FrontendConfig
from kp_frontend.encodings import BIT_DEPTH_CHOICES
from kp_frontend.ros.messages import DESCRIPTOR_TYPES
from kp_frontend.settings import bounds, check, setting


@dataclass(frozen=True)
class NodeConfig:
    """Parameters of the node beside those of `FrontendConfig`."""

    autostart: bool = setting(
        True, "configure and activate at start; false: a lifecycle manager does so", fixed=True
    )
    input: str = setting(
        "rectified",
        "what the images are; of raw ones camera_info must give distortion, R and P",
        choices=("rectified", "raw"),
        fixed=True,
    )
    transport: str = setting(
        "raw",
        "how images come: as Image, or as CompressedImage on <topic>/compressed",
        choices=("raw", "compressed"),
        fixed=True,
    )
    bit_depth: str = setting(
        "auto",
        "bits in use of 16-bit images; auto: as many as the greatest value so far needs; "
        "a number also lets 16UC1 be read as an image",
        choices=BIT_DEPTH_CHOICES,
        fixed=True,
    )
    baseline: float = setting(
        0.0,
        "metres between the cameras, in place of what camera_info says; 0: as it says",
        0.0, 1e3, fixed=True,
    )  # fmt: skip
    image_width: int = setting(
        640, "pixels; size that the engine is made ready for at start, any works", 32, 16384,
        fixed=True,
    )  # fmt: skip
    image_height: int = setting(480, "pixels", 32, 16384, fixed=True)
    approximate_sync: bool = setting(
        False, "pair images by nearest stamp instead of by equal stamp", fixed=True
    )
    sync_slop: float = setting(
        0.01, "seconds; stamps of an approximate pair differ by less than this", 1e-6, 10.0,
        fixed=True,
    )  # fmt: skip
    sync_offset: float = setting(
        0.0,
        "seconds by which the right camera's stamps are ahead of the left's; "
        "subtracted before images are paired",
        -1e6, 1e6, fixed=True,
    )  # fmt: skip
    queue_size: int = setting(
        10, "images of each camera that wait for their partner", 1, 1000, fixed=True
    )
    reliable: bool = setting(
        False,
        "ask for reliable delivery of images, which the camera must offer, not for best effort",
        fixed=True,
    )
    descriptor_type: str = setting(
        "float32", "of the descriptors in the message", choices=tuple(DESCRIPTOR_TYPES)
    )
    publish_points: bool = setting(True, "publish ~/points while somebody subscribes")
    publish_debug_image: bool = setting(True, "publish ~/debug_image while somebody subscribes")

    def __post_init__(self) -> None:
        check(self)


CONFIGS = (NodeConfig, FrontendConfig)


class Parameters:
    """The present configs of a node.

    Args:
        changed: called in the executor's thread after a change.

    Raises:
        rclpy.exceptions.ParameterException, ValueError: a value at start that cannot be used.
    """

    def __init__(self, node: Node, changed: Callable[[], None]) -> None:
        self._changed = changed
        self.node = NodeConfig(**declare(node, NodeConfig))
        self.frontend = FrontendConfig(**declare(node, FrontendConfig))
        node.add_on_set_parameters_callback(self._check)
        node.add_post_set_parameters_callback(self._take)

    def _with(self, parameters: list[Parameter]) -> tuple[NodeConfig, FrontendConfig]:
        values = {p.name: p.value for p in parameters}
        node = replace(self.node, **_own(values, NodeConfig))
        frontend = replace(self.frontend, **_own(values, FrontendConfig))
        if frontend.compiled() != self.frontend.compiled():
            raise ValueError("min_margin can go from or to 0 only at a restart")
        return node, frontend

    def _check(self, parameters: list[Parameter]) -> SetParametersResult:
        try:
            self._with(parameters)
        except ValueError as error:
            return SetParametersResult(successful=False, reason=str(error))
        return SetParametersResult(successful=True)

    def _take(self, parameters: list[Parameter]) -> None:
        self.node, self.frontend = self._with(parameters)
        self._changed()


def declare(node: Node, kind: type) -> dict[str, Any]:
    """Declare the settings of a config as parameters of a node; their values by name."""
    declared = {
        f.name: node.declare_parameter(f.name, f.default, descriptor(f)).value for f in fields(kind)
    }
    return _own(declared, kind)


def _own(values: dict[str, Any], kind: type) -> dict[str, Any]:
    """Those of the values that are settings of a config, as it has them."""
    settings = {f.name: f for f in fields(kind)}
    return {
        name: str(value) if _may_look_like_a_number(settings[name], value) else value
        for name, value in values.items()
        if name in settings
    }


def _may_look_like_a_number(declared: Field, value: Any = 0) -> bool:
    """Whether a value was read as a number where the setting is a word such as `12`."""
    words = any(choice.isdigit() for choice in declared.metadata["choices"])
    return words and isinstance(value, int) and not isinstance(value, bool)


def descriptor(declared: Field) -> ParameterDescriptor:
    """What ROS is told about a setting."""
    result = ParameterDescriptor(
        description=meaning(declared),
        read_only=declared.metadata["fixed"],
        dynamic_typing=_may_look_like_a_number(declared),
    )
    limits = bounds(declared)
    if limits is None:
        return result
    low, high = limits
    if isinstance(declared.default, float):
        result.floating_point_range = [FloatingPointRange(from_value=low, to_value=high)]
    else:
        result.integer_range = [IntegerRange(from_value=low, to_value=high)]
    return result


def meaning(declared: Field) -> str:
    """A setting's meaning with its choices."""
    choices = declared.metadata["choices"]
    words = f"{', '.join(choices[:-1])} or {choices[-1]}: " if choices else ""
    return words + declared.metadata["meaning"]


def markdown_table(configs: tuple[type, ...] = CONFIGS) -> str:
    """All parameters of a node as they stand in the documentation."""
    lines = ["| parameter | type | default | range | at run time | |", "|---|---|---|---|---|---|"]
    for f in (f for kind in configs for f in fields(kind)):
        limits = bounds(f)
        default = str(f.default).lower() if isinstance(f.default, bool) else f.default
        cells = (
            f"`{f.name}`",
            {"str": "string", "float": "double"}.get(kind := type(f.default).__name__, kind),
            f"`{default}`",
            f"{limits[0]:g} to {limits[1]:g}" if limits else "",
            "no" if f.metadata["fixed"] else "yes",
            meaning(f),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
