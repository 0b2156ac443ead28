"""Tracks: the same point through consecutive pairs."""

from __future__ import annotations

import numpy as np

from kp_frontend.pipeline import PipelineResults

MOST_IDS = 2**32 - 1  # then ids start again from 1; 0 means no track
LONGEST = 2**16 - 1  # what a track's length can be in a message


class Tracker:
    """Gives each left keypoint the track of the keypoint before it, or a new one.

    Args:
        count: keypoints per image.
        dim: values in each descriptor.
    """

    def __init__(self, count: int, dim: int) -> None:
        self._count, self._dim = count, dim
        self._next_id = 1
        self.reset()

    def reset(self) -> None:
        """Forget the previous pair: every keypoint of the next one starts a new track."""
        self.before = self.nothing_before()
        self._ids = np.zeros(self._count, np.uint32)
        self._lengths = np.zeros(self._count, np.uint16)

    def nothing_before(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Positions, scores and descriptors of a previous left image without keypoints."""
        return (
            np.zeros((self._count, 2), np.float32),
            np.zeros(self._count, np.float32),
            np.zeros((self._count, self._dim), np.float32),
        )

    def update(self, results: PipelineResults) -> tuple[np.ndarray, np.ndarray]:
        """Go on to the next pair.

        Returns:
            Track ids (K,) uint32 and lengths (K,) uint16 of the left rows, 0 where there is no
            keypoint. They are the caller's to change.
        """
        scores, before_row = results.scores[0], results.before_row
        ids, lengths = np.zeros(len(scores), np.uint32), np.zeros(len(scores), np.uint16)
        known = before_row >= 0
        ids[known] = self._ids[before_row[known]]
        lengths[known] = np.minimum(self._lengths[before_row[known]], LONGEST - 1) + 1
        new = np.flatnonzero(~known & (scores > 0))
        ids[new] = (self._next_id - 1 + np.arange(len(new), dtype=np.uint64)) % MOST_IDS + 1
        lengths[new] = 1
        self._next_id = (self._next_id - 1 + len(new)) % MOST_IDS + 1
        # Copies: what the caller does to the results must not reach the next pair's tracks.
        self.before = (
            results.xy[0].copy(),
            results.scores[0].copy(),
            results.descriptors[0].copy(),
        )
        self._ids, self._lengths = ids.copy(), lengths.copy()
        return ids, lengths
