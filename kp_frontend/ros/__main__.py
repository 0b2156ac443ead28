"""Entry point of `ros2 run kp_frontend stereo_node`."""

from __future__ import annotations

import sys


def main() -> int:
    """Run the node. An interrupt during the import of its libraries ends it without a traceback."""
    try:
        from kp_frontend.ros.node import main as run

        return run()
    except KeyboardInterrupt:
        return 0


if __name__ == "__main__":
    sys.exit(main())
