"""Disparity to depth."""

from __future__ import annotations

import math

import numpy as np
import pytest

from kp_frontend.calibration import StereoCalibration

LEFT = [700, 0, 320, 0, 0, 710, 240, 0, 0, 0, 1, 0]
RIGHT = [700, 0, 330, -70, 0, 710, 240, 0, 0, 0, 1, 0]


def test_points_project_back():
    rig = StereoCalibration.from_projections(LEFT, RIGHT)
    assert (rig.baseline, rig.offset) == (pytest.approx(0.1), -10)
    points = np.array([[0.3, -0.2, 2.0], [-1.0, 0.5, 7.0]])
    projected = []
    for matrix in (LEFT, RIGHT):
        image = np.column_stack([points, np.ones(2)]) @ np.reshape(matrix, (3, 4)).T
        projected.append(image[:, :2] / image[:, 2:])
    disparity = projected[0][:, 0] - projected[1][:, 0]
    np.testing.assert_allclose(rig.points(projected[0], disparity), points, rtol=1e-5)
    assert rig.disparity(2.0) == pytest.approx(disparity[0])
    assert rig.disparity(math.inf) == -10


def test_a_point_at_infinity_or_behind_is_nan():
    rig = StereoCalibration.from_projections(LEFT, RIGHT)
    points = rig.points(np.zeros((2, 2)), np.array([-10.0, -11.0]))
    assert np.isnan(points).all()


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ([0.0] * 12, [0.0] * 12),
        (LEFT, LEFT),
        (LEFT, [700, 0, 320, 70, 0, 700, 240, 0, 0, 0, 1, 0]),
        (LEFT[:9], RIGHT),
        ([math.nan] * 12, RIGHT),
    ],
)
def test_what_is_no_stereo_rig_is_refused(left, right):
    with pytest.raises(ValueError):
        StereoCalibration.from_projections(left, right)
