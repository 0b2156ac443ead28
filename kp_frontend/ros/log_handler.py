"""Messages of the front end, which knows no ROS, in the log of a node."""

from __future__ import annotations

import logging

from rclpy.impl.rcutils_logger import RcutilsLogger


class RosLogHandler(logging.Handler):
    """Gives what the package logs to the logger of a node, from `install` to `close`."""

    def __init__(self, logger: RcutilsLogger) -> None:
        super().__init__(logging.INFO)
        self._ros = logger
        self._package = logging.getLogger("kp_frontend")
        self._level = self._package.level

    def install(self) -> None:
        """Start."""
        self._package.addHandler(self)
        self._package.setLevel(logging.INFO)

    def close(self) -> None:
        """Stop."""
        self._package.removeHandler(self)
        self._package.setLevel(self._level)
        super().close()

    def emit(self, record: logging.LogRecord) -> None:
        """Log one message. ROS wants each place in the code to have one severity."""
        text = record.getMessage()
        if record.levelno >= logging.ERROR:
            self._ros.error(text)
        elif record.levelno >= logging.WARNING:
            self._ros.warning(text)
        else:
            self._ros.info(text)
