"""Time stamps of two cameras: do their clocks agree?"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def clock_offset(left: npt.ArrayLike, right: npt.ArrayLike) -> int | None:
    """By how much the right camera's stamps are ahead of the left's for images of one moment.

    Stamps of periodic images do not tell it: shifted by whole periods they look the same. The times
    of arrival do, if both cameras' images take about as long to arrive. They are exact to some
    milliseconds; of all differences of two stamps the one nearest to what they say is taken.

    Args:
        left, right: (N, 2) and (M, 2) nanoseconds, stamp and time of arrival of each image, on one
            clock for the arrivals of both.

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
    """Median time between successive stamps (N,), in their unit; None of fewer than two."""
    steps = np.diff(np.sort(np.asarray(stamps)))
    return float(np.median(steps)) if len(steps) else None
