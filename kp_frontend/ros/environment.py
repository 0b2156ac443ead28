"""Where the package's files are, and the environment that its processes run in."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ament_index_python.packages import PackageNotFoundError, get_package_share_directory

if TYPE_CHECKING:
    from rosbags.typesys.store import Typestore


def share_folder(package: str = "kp_frontend") -> Path:
    """Installed files (launch, config, message definitions) of a package.

    Where no ROS environment is sourced, or one without this package, they are beside the running
    Python's own.
    """
    try:
        return Path(get_package_share_directory(package))
    except (PackageNotFoundError, OSError):  # OSError: nothing is sourced at all
        return Path(sys.prefix) / "share" / package


def with_dds_profile(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment with our shared-memory profile, unless the user has one of his own."""
    result = dict(environment)
    names = ("FASTRTPS_DEFAULT_PROFILES_FILE", "FASTDDS_DEFAULT_PROFILES_FILE")
    if not any(name in result for name in names):
        result |= dict.fromkeys(names, str(share_folder() / "config" / "fastdds_shm.xml"))
    return result


def typestore() -> Typestore:
    """ROS 2 Jazzy's message types and ours, for reading and writing bags."""
    # Only here: the node needs no bags.
    from rosbags.typesys import Stores, get_types_from_msg, get_typestore

    store = get_typestore(Stores.ROS2_JAZZY)
    folder = share_folder("kp_msgs") / "msg"
    for path in sorted(folder.glob("*.msg")):
        store.register(get_types_from_msg(path.read_text(), f"kp_msgs/msg/{path.stem}"))
    return store
