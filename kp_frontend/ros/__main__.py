"""What `ros2 run kp_frontend stereo_node` starts."""

from __future__ import annotations

import sys


def main() -> int:
    """Run the node; interrupted while it still loads its libraries it ends as quietly as later."""
    try:
        from kp_frontend.ros.node import main as run

        return run()
    except KeyboardInterrupt:
        return 0


if __name__ == "__main__":
    sys.exit(main())
