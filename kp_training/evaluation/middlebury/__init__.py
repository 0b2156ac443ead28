"""Evaluation on stereo pairs with ground truth disparity."""
