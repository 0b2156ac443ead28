"""Quality of service as bags write it."""

from __future__ import annotations

from rosbags.rosbag2.metadata import parse_qos
from ruamel.yaml.error import YAMLError


def offered_reliability(profiles: str | list) -> str:
    """The reliability of the first of the profiles that a topic was offered with.

    Returns:
        `reliable`, `best_effort` and so on; `unknown` where the bag does not say.
    """
    try:
        parsed = parse_qos(profiles)
        return parsed[0].reliability.name.lower() if parsed else "unknown"
    except (YAMLError, KeyError, IndexError, TypeError, ValueError, AttributeError):
        return "unknown"
