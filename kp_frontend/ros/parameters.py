"""Parameters of the node: declared, checked and documented from the fields of the configs.

A setting that is `fixed` in its config becomes a read-only parameter. The others can change at run
time. A new value is validated together with all other parameters and takes effect with the next
pair.
"""

from __future__ import annotations

import difflib
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
from kp_frontend.ros.rclpy_private import given_parameters
from kp_frontend.settings import bounds, check, setting


@dataclass(frozen=True)
class NodeConfig:
    """Parameters of the node that are not in `FrontendConfig`."""

    autostart: bool = setting(
        True, "configure and activate at startup; false: wait for a lifecycle manager", fixed=True
    )
    input: str = setting(
        "rectified",
        "type of the input images; raw images need K, D, R and P in camera_info",
        choices=("rectified", "raw"),
        fixed=True,
    )
    transport: str = setting(
        "raw",
        "message type of the images; compressed: CompressedImage on <topic>/compressed",
        choices=("raw", "compressed"),
        fixed=True,
    )
    bit_depth: str = setting(
        "auto",
        "significant bits of 16-bit images; auto: enough for the largest value so far; "
        "a number also enables 16UC1 images",
        choices=BIT_DEPTH_CHOICES,
        fixed=True,
    )
    baseline: float = setting(
        0.0,
        "distance between the cameras in metres, overrides camera_info; 0: use camera_info",
        0.0, 1e3, fixed=True,
    )  # fmt: skip
    image_width: int = setting(
        640,
        "expected image width in pixels; for another size the engine is rebuilt once",
        32,
        16384,
        fixed=True,
    )
    image_height: int = setting(480, "expected image height in pixels", 32, 16384, fixed=True)
    approximate_sync: bool = setting(
        False, "pair images with the nearest time stamps; false: with equal ones", fixed=True
    )
    sync_slop: float = setting(
        0.01,
        "maximum time stamp difference of a pair in seconds; used with approximate_sync",
        1e-6,
        10.0,
        fixed=True,
    )
    sync_offset: float = setting(
        0.0,
        "seconds by which the right camera's clock is ahead of the left one's; "
        "subtracted from the right time stamps before pairing",
        -1e6, 1e6, fixed=True,
    )  # fmt: skip
    queue_size: int = setting(
        10, "maximum number of images per camera that wait for their partner", 1, 1000, fixed=True
    )
    reliable: bool = setting(
        False,
        "subscribe to images with reliable QoS, which the camera must offer; false: best effort",
        fixed=True,
    )
    descriptor_type: str = setting(
        "float32", "data type of the published descriptors", choices=tuple(DESCRIPTOR_TYPES)
    )
    publish_points: bool = setting(True, "publish ~/points while it has subscribers")
    publish_debug_image: bool = setting(True, "publish ~/debug_image while it has subscribers")

    def __post_init__(self) -> None:
        check(self)


CONFIGS = (NodeConfig, FrontendConfig)


class Parameters:
    """The current parameter values of a node.

    Args:
        changed: called in the executor's thread after a change.

    Raises:
        rclpy.exceptions.ParameterException, ValueError: an initial value is invalid.
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
            raise ValueError("switching min_margin or max_motion on or off (0) requires a restart")
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
    """Declare the settings of a config as parameters of a node. Returns their values by name."""
    declared = {
        f.name: node.declare_parameter(f.name, f.default, descriptor(f)).value for f in fields(kind)
    }
    return _own(declared, kind)


def warn_of_unknown(node: Node) -> None:
    """Log the parameters that a node was given but ignores, with the closest name that exists.

    A file of parameters may be for several nodes, so those of our other nodes are not reported.
    """
    given = {name for name in given_parameters(node) if not node.has_parameter(name)}
    if not given:
        return
    from kp_frontend.ros.odometry_parameters import ODOMETRY_CONFIGS  # late: it loads SciPy

    ours = {f.name for kind in (*CONFIGS, *ODOMETRY_CONFIGS) for f in fields(kind)}
    unknown = []
    for name in sorted(given - ours):
        if not name.startswith("qos_overrides."):  # rclpy's own
            close = difflib.get_close_matches(name, ours, n=1)
            unknown.append(f"{name} (did you mean {close[0]}?)" if close else name)
    if unknown:
        node.get_logger().warning(f"unknown parameters are ignored: {', '.join(unknown)}")


def _own(values: dict[str, Any], kind: type) -> dict[str, Any]:
    """The values that belong to a config, converted to the types of its settings."""
    settings = {f.name: f for f in fields(kind)}
    return {
        name: str(value) if _may_look_like_a_number(settings[name], value) else value
        for name, value in values.items()
        if name in settings
    }


def _may_look_like_a_number(declared: Field, value: Any = 0) -> bool:
    """Whether ROS may parse a value of this string setting, such as `12`, as a number."""
    words = any(choice.isdigit() for choice in declared.metadata["choices"])
    return words and isinstance(value, int) and not isinstance(value, bool)


def descriptor(declared: Field) -> ParameterDescriptor:
    """ROS parameter descriptor of a setting."""
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
    """Description of a setting with its choices."""
    choices = declared.metadata["choices"]
    words = f"{', '.join(choices[:-1])} or {choices[-1]}: " if choices else ""
    return words + declared.metadata["meaning"]


def markdown_table(configs: tuple[type, ...] = CONFIGS) -> str:
    """The table of a node's parameters in the documentation."""
    lines = [
        "| parameter | type | default | range | at run time | description |",
        "|---|---|---|---|---|---|",
    ]
    for f in (f for kind in configs for f in fields(kind)):
        limits = bounds(f)
        default = str(f.default).lower() if isinstance(f.default, bool) else f.default
        default = '""' if default == "" else default
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
