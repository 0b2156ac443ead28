"""Evaluation of keypoint methods on stereo pairs, image pairs, bags and sequences."""
