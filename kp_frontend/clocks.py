"""Compares the time stamps of two cameras to find a clock offset."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def clock_offset(left: npt.ArrayLike, right: npt.ArrayLike) -> int | None:
    """Clock offset: time stamp of the right camera minus that of the left one, for the same moment.

    Time stamps alone are ambiguous, because periodic stamps look the same after a shift by whole
    periods. Arrival times resolve this if the images of both cameras have a similar delay. They are
    accurate to some milliseconds, so the result is the stamp difference that is nearest to the
    offset by arrival times.

    Args:
        left, right: (N, 2) and (M, 2) nanoseconds, time stamp and arrival time of each image. The
            arrival times of both are on one clock.

    Returns:
        Nanoseconds; None if one camera has no images.
    """
    a, b = (np.asarray(v, np.int64).reshape(-1, 2) for v in (left, right))
    if not len(a) or not len(b):
        return None
    by_arrival = np.median(b[:, 0] - b[:, 1]) - np.median(a[:, 0] - a[:, 1])
    differences = (b[:, 0] - a[:, :1]).ravel()
    return int(differences[np.abs(differences - by_arrival).argmin()])


def period(stamps: npt.ArrayLike) -> float | None:
    """Median time between successive stamps (N,), in their unit; None for fewer than two."""
    steps = np.diff(np.sort(np.asarray(stamps)))
    return float(np.median(steps)) if len(steps) else None
