"""The folders of the package's files, and the environment of its processes."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rosbags.typesys.store import Typestore


def share_folder(package: str = "kp_frontend") -> Path:
    """Share folder of a package: launch, config, message definitions.

    Looks in the sourced ROS workspace first, then in the environment of the running Python, then
    in the checkout.
    """
    try:
        # Imported here because bags can be read without ROS.
        from ament_index_python.packages import get_package_share_directory

        return Path(get_package_share_directory(package))
    except (ImportError, LookupError, OSError):  # no ROS, not in it, or nothing is sourced
        installed = Path(sys.prefix) / "share" / package
    checkout = Path(__file__).parents[2]
    in_checkout = checkout if package == "kp_frontend" else checkout / package
    return installed if installed.is_dir() else in_checkout


def with_dds_profile(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment with our shared-memory profile, unless the user has set a profile."""
    result = dict(environment)
    names = ("FASTRTPS_DEFAULT_PROFILES_FILE", "FASTDDS_DEFAULT_PROFILES_FILE")
    if not any(name in result for name in names):
        result |= dict.fromkeys(names, str(share_folder() / "config" / "fastdds_shm.xml"))
    return result


def typestore() -> Typestore:
    """The message types of ROS 2 Jazzy and of kp_msgs, to read and write bags."""
    # Imported here because the node does not need rosbags.
    from rosbags.typesys import Stores, get_types_from_msg, get_typestore

    store = get_typestore(Stores.ROS2_JAZZY)
    folder = share_folder("kp_msgs") / "msg"
    for path in sorted(folder.glob("*.msg")):
        store.register(get_types_from_msg(path.read_text(), f"kp_msgs/msg/{path.stem}"))
    return store
