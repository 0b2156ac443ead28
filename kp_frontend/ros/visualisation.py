"""Visualisation publishers: the point cloud and the debug image.

A separate thread publishes them for the newest pair. It does no work without subscribers.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from rclpy.node import Node
from sensor_msgs.msg import Image, PointCloud2
from std_msgs.msg import Header

from kp_frontend.features import StereoFeatures
from kp_frontend.ros.messages import image_message, points_message
from kp_frontend.ros.newest_wins import NewestWins
from kp_frontend.ros.parameters import NodeConfig
from kp_frontend.ros.rclpy_private import RCLError
from kp_frontend.tools.overlay import draw_matches

# One pair: its results, its left image, and that image's header.
Item = tuple[StereoFeatures, np.ndarray, Header]


class VisualisationPublishers:
    """Publishes `~/points` and `~/debug_image`.

    Args:
        config: returns the current parameters.
        say: called with each warning.
    """

    def __init__(
        self, node: Node, config: Callable[[], NodeConfig], say: Callable[[str], None]
    ) -> None:
        self._node, self._config, self._say = node, config, say
        self._points = node.create_publisher(PointCloud2, "~/points", 2)
        self._image = node.create_publisher(Image, "~/debug_image", 2)
        self._thread = NewestWins("visualisation", self._publish)

    def _wanted(self) -> tuple[bool, bool]:
        config = self._config()
        return (
            config.publish_points and self._points.get_subscription_count() > 0,
            config.publish_debug_image and self._image.get_subscription_count() > 0,
        )

    def offer(self, result: StereoFeatures, left: np.ndarray, header: Header) -> None:
        """Accept a pair if there are subscribers. Returns immediately."""
        if any(self._wanted()):
            self._thread.put((result, left, header))

    def _publish(self, item: Item) -> None:
        result, left, header = item
        points, image = self._wanted()
        try:
            if points:
                self._points.publish(points_message(result, header))
            if image:
                self._image.publish(image_message(debug_image(result, left), "bgr8", header))
        except RCLError as error:  # the context was shut down meanwhile
            self._say(f"~/points or ~/debug_image not published: {error}")

    def close(self) -> None:
        """End the thread and the publishers."""
        self._thread.stop()
        self._node.destroy_publisher(self._points)
        self._node.destroy_publisher(self._image)


def debug_image(result: StereoFeatures, left: np.ndarray) -> np.ndarray:
    """The left image with its matches, coloured by depth (without depth by disparity), in rings
    coloured by confidence."""
    inverse = 1 / result.points[:, 2]
    near = inverse if np.isfinite(inverse).any() else result.disparity
    # Percentiles, so that a few outliers do not set the colour range.
    low, high = np.nanpercentile(near, (5, 95)) if len(near) else (0.0, 1.0)
    xy = result.left.keypoints[result.left_index]
    scaled = (near - low) / max(high - low, 1e-6)
    return draw_matches(left, xy, scaled, confidence=result.confidence)
