"""docs/slam.md, the launch files and the configuration say what the odometry and the bridge do."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
import types
from dataclasses import fields
from pathlib import Path

import made_views
import numpy as np
import pytest
import rclpy
import yaml
from conftest import DOMAIN
from kp_msgs.msg import StereoFeatures
from std_msgs.msg import Header

from kp_frontend.ros.messages import stereo_message
from kp_frontend.ros.odometry_parameters import ODOMETRY_CONFIGS
from kp_frontend.ros.odometry_worker import REASONS
from kp_frontend.ros.parameters import CONFIGS, markdown_table

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs/slam.md").read_text()
DEFAULTS = {f.name: f.default for kind in ODOMETRY_CONFIGS for f in fields(kind)}


def test_the_documentations_table_of_parameters_is_generated():
    table = TEXT.partition("checked by a test -->\n")[2].partition("\n<!-- end -->")[0]
    assert table == markdown_table(ODOMETRY_CONFIGS)


def test_every_reason_is_documented():
    assert all(f"| `{reason}` | {words} |" in TEXT for reason, words in REASONS.items())


def test_the_configuration_is_of_all_parameters_with_their_defaults():
    values = yaml.safe_load((ROOT / "config/odometry.yaml").read_text())["/**"]["ros__parameters"]
    assert values == DEFAULTS
    assert all(type(value) is type(DEFAULTS[name]) for name, value in values.items())
    # One file serves both nodes.
    assert not DEFAULTS.keys() & {f.name for kind in CONFIGS for f in fields(kind)}


def test_the_subscriber_of_the_documentation_runs():
    program = TEXT.partition("```python\n")[2].partition("```")[0]
    assert len(program.splitlines()) < 40
    environment = {"ROS_DOMAIN_ID": str(DOMAIN), "ROS_AUTOMATIC_DISCOVERY_RANGE": "LOCALHOST"}
    os.environ |= {"ROS_AUTOMATIC_DISCOVERY_RANGE": "LOCALHOST"}
    child = subprocess.Popen(
        [sys.executable, "-c", program], env=os.environ | environment, stdout=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    context = rclpy.Context()
    rclpy.init(context=context, domain_id=DOMAIN)
    node = rclpy.create_node("sender", context=context)
    executor = rclpy.executors.SingleThreadedExecutor(context=context)
    executor.add_node(node)
    try:
        sender = node.create_publisher(StereoFeatures, "kp_frontend/features", 5)
        end = time.monotonic() + 30
        while not sender.get_subscription_count():
            assert child.poll() is None and time.monotonic() < end
            executor.spin_once(timeout_sec=0.05)
        world = made_views.corridor()
        for sequence in (7, 8, 11):
            features = made_views.view(world, np.eye(4))
            header = Header(frame_id="left_optical")
            sender.publish(stereo_message(features, header, header, sequence, "float32"))
        lines = [child.stdout.readline().strip() for _ in range(4)]
    finally:
        child.terminate()
        child.wait(20)
        executor.shutdown()
        node.destroy_node()
        rclpy.shutdown(context=context)
    depth = np.median(features.points[:, 2])
    seen = f"{len(features)} tracked points, median depth {depth:.2f} m"
    assert lines == [seen, seen, "missed 2 messages", seen]


class Recorded:
    """Stands for any class of the launch packages, which have no wheel; keeps its arguments."""

    def __init__(self, *args, **kwargs):
        self.args, self.kwargs = args, kwargs


def described(name, monkeypatch, **given):
    """The nodes, included files and arguments of a launch file that is given some arguments."""
    for module, names in {
        "launch": ["LaunchDescription"],
        "launch.actions": [
            "DeclareLaunchArgument",
            "IncludeLaunchDescription",
            "OpaqueFunction",
        ],
        "launch.conditions": ["IfCondition"],
        "launch.launch_description_sources": ["PythonLaunchDescriptionSource"],
        "launch.substitutions": ["LaunchConfiguration"],
        "launch_ros": [],
        "launch_ros.actions": ["Node"],
    }.items():
        made = types.ModuleType(module)
        for kind in names:
            setattr(made, kind, type(kind, (Recorded,), {}))
        monkeypatch.setitem(sys.modules, module, made)
    ament = types.ModuleType("ament_index_python.packages")
    ament.get_package_share_directory = lambda package: str(ROOT)
    monkeypatch.setitem(sys.modules, "ament_index_python.packages", ament)
    spec = importlib.util.spec_from_file_location("described", ROOT / "launch" / name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    actions = module.generate_launch_description().args[0]
    values = {
        a.args[0]: a.kwargs["default_value"]
        for a in actions
        if type(a).__name__ == "DeclareLaunchArgument"
    } | given
    module.LaunchConfiguration.perform = lambda self, context: context[self.args[0]]
    found = {}
    for action in actions:
        made = [action]
        if type(action).__name__ == "OpaqueFunction":
            made = action.kwargs["function"](values)
        for one in made:
            found.setdefault(type(one).__name__, []).append(one)
    return found


@pytest.mark.parametrize(
    ("name", "programs"),
    [
        ("odometry.launch.py", {"stereo_odometry", "rviz2"}),
        ("rtabmap.launch.py", {"rtabmap_bridge", "rtabmap"}),
    ],
)
def test_launch_files_start_what_there_is(name, programs, monkeypatch):
    found = described(name, monkeypatch)
    assert {node.kwargs["executable"] for node in found["Node"]} == programs
    setup = (ROOT / "setup.py").read_text()
    for node in found["Node"]:
        if node.kwargs["package"] == "kp_frontend":
            assert f'"{node.kwargs["executable"]} = ' in setup
    declared = {action.args[0] for action in found["DeclareLaunchArgument"]}
    (included,) = found["IncludeLaunchDescription"]
    path = Path(included.args[0].args[0])
    assert path.is_file()
    passed = dict(included.kwargs["launch_arguments"])
    assert passed.keys() <= declared
    # What is passed on is an argument there, or of the file which that one includes.
    further = path.read_text() + (ROOT / "launch/stereo.launch.py").read_text()
    assert all(f'"{argument}": (' in further for argument in passed)


def test_the_base_frame_reaches_odometry_and_rtabmap(monkeypatch):
    for given in ({}, {"base_frame": "base_footprint"}):
        found = described("odometry.launch.py", monkeypatch, **given)
        odometry = next(n for n in found["Node"] if n.kwargs["name"] == "stereo_odometry")
        (parameters,) = odometry.kwargs["parameters"]
        assert parameters.keys() - {"use_sim_time"} == given.keys()
        assert parameters.get("base_frame") == given.get("base_frame")
    found = described("rtabmap.launch.py", monkeypatch)
    (included,) = found["IncludeLaunchDescription"]
    (rtabmap,) = (n for n in found["Node"] if n.kwargs["name"] == "rtabmap")
    for value in (
        dict(included.kwargs["launch_arguments"])["base_frame"],
        rtabmap.kwargs["parameters"][0]["frame_id"],
    ):
        assert value.args == ("base_frame",)


def test_rtabmap_is_told_to_use_our_features(monkeypatch):
    found = described("rtabmap.launch.py", monkeypatch)
    (rtabmap,) = (node for node in found["Node"] if node.kwargs["package"] == "rtabmap_slam")
    (parameters,) = rtabmap.kwargs["parameters"]
    assert parameters["Mem/UseOdomFeatures"] == "true" and parameters["subscribe_rgbd"] is True
    assert parameters["Kp/DetectorStrategy"] == parameters["Vis/FeatureType"]
