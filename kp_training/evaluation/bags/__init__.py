"""Bags: reading, writing, and the front end on their stereo pairs."""
