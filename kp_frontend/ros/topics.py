"""The node's input topics: what carries them, and what is there instead where nothing comes."""

from __future__ import annotations

from rclpy.node import Node
from rclpy.qos import DurabilityPolicy
from sensor_msgs.msg import CompressedImage, Image

from kp_frontend.ros.parameters import NodeConfig

IMAGE = "sensor_msgs/msg/Image"
COMPRESSED = "sensor_msgs/msg/CompressedImage"
INFO = "sensor_msgs/msg/CameraInfo"
MOST_NAMED = 6  # topics named in a sentence


class Topics:
    """The input topics, by their names after remapping."""

    def __init__(self, node: Node, config: NodeConfig) -> None:
        self._node, self._config = node, config
        self._compressed = config.transport == "compressed"
        self._incompatible: dict[str, str] = {}  # of topics whose publishers offer another QoS

    def name(self, side: str) -> str:
        """The topic of a camera's images."""
        return self._node.resolve_topic_name(f"{side}/image")

    def of_images(self, side: str) -> list[tuple[str, type]]:
        """Topics to subscribe to for the images of a camera, and their types.

        Compressed images arrive on `<topic>/compressed`, as in image_transport, or on the topic.
        """
        name = self.name(side)
        if not self._compressed:
            return [(name, Image)]
        names = [name] if name.endswith("/compressed") else [f"{name}/compressed", name]
        return [(n, CompressedImage) for n in names]

    def incompatible(self, topic: str) -> str:
        """Record that a topic's publishers offer an incompatible QoS. Returns the warning."""
        asked = "reliable" if self._config.reliable else "best effort"
        name = self._node.resolve_topic_name(topic)
        words = f"{name} is published with a QoS that is incompatible with {asked} subscribers"
        if self._config.reliable:
            words += "; set reliable to false"
        self._incompatible[name] = words
        return words

    def _types(self, name: str) -> set[str]:
        """Types with which a topic is published."""
        return {info.topic_type for info in self._node.get_publishers_info_by_topic(name)}

    def why_silent(self, sides: list[str]) -> str:
        """Why no image arrives from some cameras, as one sentence."""
        reasons: dict[str, list[str]] = {}
        for side in sides:
            for reason, name in self._why_silent(side):
                reasons.setdefault(reason, []).append(name)
        return "; ".join(
            reason.format(" and ".join(names)) for reason, names in reasons.items()
        ) + self._others(reasons)

    def _why_silent(self, side: str) -> list[tuple[str, str]]:
        """Reasons, each with `{}` in place of the topic, and the topic."""
        base = self.name(side)
        wanted = COMPRESSED if self._compressed else IMAGE
        names = [name for name, _ in self.of_images(side)]
        found = [(reason, name) for name in names if (reason := self._incompatible.get(name))]
        found = [(reason.replace(name, "{}"), name) for reason, name in found]
        if any(wanted in self._types(name) for name in names):
            return [("no image comes on {}", names[0]), *found]
        if not self._compressed and COMPRESSED in self._types(base):
            return [("the images on {} are CompressedImage: set transport to compressed", base)]
        packed = f"{base}/compressed"
        if not self._compressed and COMPRESSED in self._types(packed):
            return [("only compressed images come, on {}: set transport to compressed", packed)]
        if self._compressed and IMAGE in self._types(base):
            return [("the images on {} are Image, not compressed: set transport to raw", base)]
        if types := self._types(names[0]):
            return [(f"the type of {{}} is {' and '.join(sorted(types))}, not {wanted}", names[0])]
        return [(NOBODY, names[0])]

    def _others(self, reasons: dict[str, list[str]]) -> str:
        """Topics that do have images, if one of the configured topics has no publisher."""
        if NOBODY not in reasons:
            return ""
        own = self._node.get_fully_qualified_name()
        found = [
            name
            for name, types in self._node.get_topic_names_and_types()
            if {IMAGE, COMPRESSED} & set(types)
            and not name.startswith(own + "/")
            and self._types(name) & {IMAGE, COMPRESSED}
        ]
        if not found:
            return ""
        more = f" and {len(found) - MOST_NAMED} more" if len(found) > MOST_NAMED else ""
        return f"; images are on {', '.join(sorted(found)[:MOST_NAMED])}{more}"

    def latched(self, topic: str) -> bool:
        """Whether a publisher offers camera_info with transient-local durability."""
        name = self._node.resolve_topic_name(topic)
        return any(
            info.topic_type == INFO
            and info.qos_profile.durability == DurabilityPolicy.TRANSIENT_LOCAL
            for info in self._node.get_publishers_info_by_topic(name)
        )

    def missing_info(self, topic: str) -> str:
        """A topic without camera_info, with the reason if it is known."""
        name = self._node.resolve_topic_name(topic)
        types = self._types(name)
        if not types:
            return f"{name} (nobody publishes it)"
        if INFO not in types:
            return f"{name} (its type is {' and '.join(sorted(types))})"
        return name


NOBODY = "nobody publishes {}"
