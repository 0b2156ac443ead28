"""What the front end logs, in the log of the node."""

from __future__ import annotations

import logging
from unittest.mock import Mock

from kp_frontend.backends.engine_cache import EngineCache
from kp_frontend.ros.log_handler import RosLogHandler


def test_the_node_logs_that_an_engine_is_built(tmp_path):
    ros = Mock()
    handler = RosLogHandler(ros)
    handler.install()
    try:
        key = {"backend": "cuda"}
        cache = EngineCache(tmp_path)
        cache.engine(key, lambda: b"engine", bytes, "about a minute")
        (text,) = ros.info.call_args.args
        assert "backend cuda takes about a minute" in text and str(tmp_path) in text
        cache.path(key).write_bytes(b"damaged")
        cache.read(key)
        assert "damaged" in ros.warning.call_args.args[0] and not ros.error.called
    finally:
        handler.close()
    cache.read(key)
    assert ros.warning.call_count == 1
    assert logging.getLogger("kp_frontend").level == logging.NOTSET
