"""What every node does when it starts."""

from __future__ import annotations

import signal

import pytest
from conftest import OTHER_DOMAIN
from rclpy.node import Node

from kp_frontend.ros.parameters import NodeConfig, declare
from kp_frontend.ros.run_node import run_node


def started(monkeypatch, *arguments: str) -> int:
    """Run a node with the parameters of `NodeConfig` until its start is over."""

    def make():
        node = Node("started")
        declare(node, NodeConfig)
        return node

    def interrupted(node):
        raise KeyboardInterrupt

    monkeypatch.setenv("ROS_DOMAIN_ID", str(OTHER_DOMAIN))
    handler = signal.getsignal(signal.SIGTERM)
    try:
        return run_node("started", make, lambda _: None, ["--ros-args", *arguments], interrupted)
    finally:
        signal.signal(signal.SIGTERM, handler)


def test_unknown_parameters_are_reported_once_with_the_closest_name(monkeypatch, capfd):
    given = ("max_keypionts:=500", "queue_szie:=3", "zzz:=1", "queue_size:=5")
    assert started(monkeypatch, *(word for p in given for word in ("-p", p))) == 0
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "unknown" in line]
    assert line.endswith(
        "unknown parameters are ignored: max_keypionts (did you mean max_keypoints?), "
        "queue_szie (did you mean queue_size?), zzz"
    )


@pytest.mark.parametrize("where", ["/**", "started"])
def test_parameters_of_our_other_nodes_and_of_rclpy_are_not_reported(
    where, monkeypatch, capfd, tmp_path
):
    file = tmp_path / "parameters.yaml"
    file.write_text(
        f"{where}:\n  ros__parameters:\n    use_sim_time: true\n    window: 5\n    model: base\n"
        "    qos_overrides: {/parameter_events: {publisher: {depth: 5}}}\n    input: raw\n"
    )
    assert started(monkeypatch, "--params-file", str(file)) == 0
    assert "unknown" not in capfd.readouterr().err
