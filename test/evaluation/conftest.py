"""Shared by the tests of bags."""

from __future__ import annotations

from pathlib import Path

import made_world
import pytest
from made_bags import COUNT

from kp_training.evaluation.bags import writer


@pytest.fixture(scope="session")
def frames() -> list:
    """Frames of a camera that moves along the made wall."""
    return made_world.wall(COUNT)


@pytest.fixture(scope="session")
def bag_path(frames, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bag of them."""
    path = tmp_path_factory.mktemp("bags") / "wall.mcap"
    writer.write_bag(made_world.sequence(frames), path)
    return path
