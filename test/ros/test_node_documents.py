"""Documentation, examples and launch files say what the node does."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from kp_frontend.ros.image_counters import REASONS
from kp_frontend.ros.parameters import CONFIGS, markdown_table

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted(set((ROOT / "config").glob("*.yaml")) - {ROOT / "config/odometry.yaml"})
PARAMETERS = {f.name for kind in CONFIGS for f in fields(kind)}


def test_the_documentations_table_of_parameters_is_generated():
    text = (ROOT / "docs/node.md").read_text()
    table = text.partition("checked by a test -->\n")[2].partition("\n<!-- end -->")[0]
    assert table == markdown_table()


def test_every_reason_is_documented():
    text = (ROOT / "docs/node.md").read_text()
    assert all(f"| `{reason}` |" in text for reason in REASONS)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_an_example_has_only_parameters_that_exist_with_values_that_are_taken(path):
    values = yaml.safe_load(path.read_text())["/**"]["ros__parameters"]
    assert set(values) <= PARAMETERS
    for kind in CONFIGS:
        own = {f.name: f.default for f in fields(kind)}
        config = kind(**{k: v for k, v in values.items() if k in own})
        for name in own.keys() & values.keys():  # ROS takes no integer for a double
            assert type(getattr(config, name)) is type(own[name]), name


def test_the_common_example_is_of_all_parameters_with_their_defaults():
    values = yaml.safe_load((ROOT / "config/stereo.yaml").read_text())["/**"]["ros__parameters"]
    defaults = {f.name: f.default for kind in CONFIGS for f in fields(kind)}
    assert values == {k: v for k, v in defaults.items() if k != "autostart"}


def test_the_launch_files_are_twins():
    """The same arguments with the same defaults, parameters and remappings."""
    source = (ROOT / "launch/stereo.launch.py").read_text()
    tree = ElementTree.parse(ROOT / "launch/stereo.launch.xml").getroot()
    for argument in tree.iter("arg"):
        assert f'"{argument.get("name")}": (' in source
        default = argument.get("default").replace("$(find-pkg-share kp_frontend)/config/", "")
        assert f'"{default}"' in source
        assert f'"{argument.get("description")}"' in source
    assert len(list(tree.iter("arg"))) == source.count('": (')
    for remap in tree.iter("remap"):
        assert f'("{remap.get("from")}", LaunchConfiguration(' in source
