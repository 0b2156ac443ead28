"""Stereo feature front end: keypoints, descriptors, stereo matches and depth from a camera pair."""

__version__ = "0.2.0"  # setup.py reads it from here; package.xml must have the same
