"""Time stamps of messages: pairing of images, and the camera_info of each image."""

from __future__ import annotations

import math

import numpy as np

from kp_training.evaluation.frames import Camera


def pair_stamps(left: np.ndarray, right: np.ndarray, slop: int = 0) -> list[tuple[int, int]]:
    """Pair images: each is the nearest to the other in time, at most `slop` apart.

    Args:
        left, right: (N,), (M,) int64 stamps in nanoseconds in the order of the bag.

    Returns:
        Places (i, j) of the images in `left` and `right`, in the order of the left ones.
    """
    if not left.size or not right.size:
        return []
    to_right, to_left = _nearest(left, right), _nearest(right, left)
    return [
        (i, int(j))
        for i, j in enumerate(to_right)
        if to_left[j] == i and abs(int(left[i]) - int(right[j])) <= slop
    ]


def _nearest(stamps: np.ndarray, others: np.ndarray) -> np.ndarray:
    """For each stamp the index of the nearest of the others; the first of equal ones."""
    order = np.argsort(others, kind="stable")
    ordered = others[order]
    after = np.searchsorted(ordered, stamps).clip(0, len(ordered) - 1)
    before = np.searchsorted(ordered, ordered[(after - 1).clip(0)])
    closer = np.abs(ordered[before] - stamps) <= np.abs(ordered[after] - stamps)
    return order[np.where(closer, before, after)]


def usual_interval(stamps: np.ndarray) -> int:
    """The median time from one stamp (N,) to the next, nanoseconds; 0 of fewer than two."""
    return int(np.median(np.diff(np.sort(stamps)))) if len(stamps) > 1 else 0


def check_set(topic: str, stamps: np.ndarray) -> None:
    """Whether a driver sets stamps at all.

    Args:
        stamps: (N,) of the messages of a topic.

    Raises:
        ValueError: there are several, and all are the same.
    """
    if len(stamps) > 1 and (stamps == stamps[0]).all():
        value = "0" if stamps[0] == 0 else stamp_text(int(stamps[0]))
        raise ValueError(
            f"all {len(stamps)} stamps of {topic} are {value}, the driver does not set them: give "
            "--use-receive-times to take the times at which the bag received the messages"
        )


def no_pairs(
    left: np.ndarray,
    right: np.ndarray,
    left_received: np.ndarray,
    right_received: np.ndarray,
    offset: float = 0.0,
) -> str:
    """A hint for the user if no images form a pair.

    Images that were received together tell how far the stamps of the cameras are apart.

    Args:
        left, right: (N,), (M,) stamps, nanoseconds.
        left_received, right_received: (N,), (M,) when the bag received them.
        offset: seconds that were subtracted from the right stamps.
    """
    half = usual_interval(left_received) // 2
    together = pair_stamps(left_received, right_received, half)
    if len(together) < 2:
        return "allow for a difference (--slop) or an offset (--offset)"
    apart = np.array([right[j] - left[i] for i, j in together])
    middle = int(np.median(apart))
    spread = int(np.abs(apart - middle).max())
    if abs(middle) + spread <= half:
        return f"they differ by up to {_up(np.abs(apart).max())} s: allow for it with --slop"
    if spread > half:
        return "and they have no constant offset either: are the topics of one camera?"
    remedy = f"--offset {middle / 1e9 + offset:.6g}" + (f" --slop {_up(spread)}" if spread else "")
    return f"the right camera's stamps are {middle / 1e9:.6g} s ahead of the left's: give {remedy}"


def _up(nanoseconds: int) -> str:
    """Seconds, rounded up to microseconds."""
    return f"{math.ceil(nanoseconds / 1e3) / 1e6:g}"


class Infos:
    """Cameras by stamp: an image's own, else the last before it, else the first."""

    def __init__(self, cameras: dict[int, Camera]) -> None:
        self._stamps = np.array(sorted(cameras), np.int64)
        self._cameras = cameras

    def __len__(self) -> int:
        return len(self._cameras)

    def at(self, stamp: int) -> Camera | None:
        """The camera at a time; None if there is none at all."""
        if not self._stamps.size:
            return None
        i = max(0, int(np.searchsorted(self._stamps, stamp, "right")) - 1)
        return self._cameras[int(self._stamps[i])]


def stamp_text(stamp: int) -> str:
    """A stamp in seconds, with all its digits."""
    return f"{stamp // 1_000_000_000}.{stamp % 1_000_000_000:09d}"
