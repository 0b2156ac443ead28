"""The bridge to RTAB-Map: features, images and camera_infos in, `rtabmap_msgs/RGBDImage` out.

RTAB-Map then uses these features instead of detecting its own. The images must be rectified.
"""

from __future__ import annotations

import sys
from array import array
from collections import Counter
from collections.abc import Callable
from typing import Any

from kp_msgs.msg import StereoFeatures as StereoFeaturesMsg
from rclpy.node import Node
from rclpy.qos import qos_profile_sensor_data
from sensor_msgs.msg import CameraInfo, Image

from kp_frontend.ros.messages import stamp_ns, stereo_features
from kp_frontend.ros.rtabmap_features import KEYPOINT_SIZE, NO_ANGLE, rtabmap_features
from kp_frontend.ros.run_node import run_node

SIDES = ("left", "right")
KEPT = 30  # images of each side that wait for their features


class PairKeeper:
    """Keeps the newest images until the features of one of them arrive."""

    def __init__(self) -> None:
        self._images: dict[str, dict[int, Image]] = {side: {} for side in SIDES}
        self.infos: dict[str, CameraInfo] = {}

    def put(self, side: str, image: Image) -> None:
        """Store an image of a side."""
        kept = self._images[side]
        kept[stamp_ns(image)] = image
        while len(kept) > KEPT:
            del kept[next(iter(kept))]

    def pair(self, left_ns: int, right_ns: int) -> tuple[Image, Image]:
        """The images with these stamps.

        Raises:
            LookupError: one of them, or a camera_info, has not arrived.
        """
        missing = [f"{side}/camera_info" for side in SIDES if side not in self.infos]
        stamps = zip(SIDES, (left_ns, right_ns), strict=True)
        missing += [f"the {side} image" for side, ns in stamps if ns not in self._images[side]]
        if missing:
            raise LookupError(f"{' and '.join(missing)} did not arrive")
        return self._images["left"].pop(left_ns), self._images["right"].pop(right_ns)


def rgbd_image(
    features: StereoFeaturesMsg,
    images: tuple[Image, Image],
    infos: tuple[CameraInfo, CameraInfo],
    kinds: Any,
) -> Any:
    """The message for RTAB-Map.

    Args:
        features: of the pair of `images`, left and right; rectified, with their camera_infos.
        kinds: the module `rtabmap_msgs.msg`.

    Raises:
        ValueError: the array lengths of the features are inconsistent, or there are no keypoints.
    """
    found = rtabmap_features(stereo_features(features))
    message = kinds.RGBDImage(header=features.header)
    # For a stereo camera the left image is in `rgb` and the right one in `depth`.
    message.rgb, message.depth = images
    message.rgb_camera_info, message.depth_camera_info = infos
    message.key_points = [
        kinds.KeyPoint(
            pt=kinds.Point2f(x=x, y=y),
            size=KEYPOINT_SIZE,
            angle=NO_ANGLE,
            response=response,
            octave=0,
            class_id=-1,
        )
        for (x, y), response in zip(found.keypoints.tolist(), found.responses.tolist(), strict=True)
    ]
    message.points = [kinds.Point3f(x=x, y=y, z=z) for x, y, z in found.points.tolist()]
    message.descriptors = array("B", found.descriptors)
    return message


class RtabmapBridge(Node):
    """Subscribes to features, images and camera_infos; publishes `rgbd_image`.

    Args:
        kinds: the module `rtabmap_msgs.msg`.
    """

    def __init__(self, kinds: Any) -> None:
        super().__init__("rtabmap_bridge")
        self._kinds = kinds
        self._keeper = PairKeeper()
        self.counts: Counter[str] = Counter()
        self._publisher = self.create_publisher(kinds.RGBDImage, "rgbd_image", 5)
        for side in SIDES:
            image, info = self._takers(side)
            self.create_subscription(Image, f"{side}/image", image, qos_profile_sensor_data)
            self.create_subscription(
                CameraInfo, f"{side}/camera_info", info, qos_profile_sensor_data
            )
        self.create_subscription(StereoFeaturesMsg, "features", self._on_features, 5)

    def _takers(self, side: str) -> tuple[Callable[[Image], None], Callable[[CameraInfo], None]]:
        def take_image(image: Image) -> None:
            self._keeper.put(side, image)

        def take_info(info: CameraInfo) -> None:
            self._keeper.infos[side] = info

        return take_image, take_info

    def _on_features(self, features: StereoFeaturesMsg) -> None:
        self.counts["received"] += 1
        try:
            pair = self._keeper.pair(stamp_ns(features), stamp_ns(features.right))
            infos = self._keeper.infos["left"], self._keeper.infos["right"]
            message = rgbd_image(features, pair, infos, self._kinds)
        except (LookupError, ValueError) as error:
            self.counts["dropped"] += 1
            self.get_logger().warning(f"features dropped: {error}", throttle_duration_sec=1.0)
            return
        self._publisher.publish(message)
        self.counts["published"] += 1


def main(args: list[str] | None = None) -> int:
    """Run the bridge until it is interrupted; exit status 1 if it cannot start."""
    try:
        from rtabmap_msgs import msg as kinds
    except ImportError:
        print(
            "rtabmap_bridge cannot start: rtabmap_msgs is not installed; "
            "sudo apt install ros-$ROS_DISTRO-rtabmap-ros",
            file=sys.stderr,
        )
        return 1
    return run_node("rtabmap_bridge", lambda: RtabmapBridge(kinds), _print_counts, args)


def _print_counts(bridge: RtabmapBridge) -> None:
    counts = ", ".join(f"{name} {number}" for name, number in bridge.counts.items())
    print(f"features: {counts or 'none received'}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
