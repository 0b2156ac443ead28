"""Stereo feature front end: keypoints, descriptors, stereo matches and depth from a camera pair."""

__version__ = "0.1.0"
