"""Our own small `message_filters`, for Python environments made from wheels.

The real one has no wheel. The folder goes to the end of the module search path, so that of a ROS
installation is found first and ours only serves where the real one is missing.
"""

from __future__ import annotations

import sys
from pathlib import Path


def put_on_path() -> None:
    """Make `import message_filters` work everywhere."""
    here = str(Path(__file__).parent)
    if here not in sys.path:
        sys.path.append(here)
