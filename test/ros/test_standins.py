"""Our `message_filters` behaves as the real one does.

The synchroniser tests import whichever `message_filters` is found first, so that they also run
against the real one; tests named `test_ours_...` say where ours differs on purpose.
"""

from __future__ import annotations

import importlib.util
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import rclpy.time
from builtin_interfaces.msg import Time
from std_msgs.msg import String

from kp_frontend.ros import standins

standins.put_on_path()
import message_filters  # noqa: E402

FOLDER = Path(standins.__file__).parent
MS = 1_000_000
is_ours = pytest.mark.skipif(
    not Path(message_filters.__file__).is_relative_to(FOLDER), reason="the real message_filters"
)


# --- finding the packages -----------------------------------------------------------------------


def test_the_real_package_is_found_before_ours(tmp_path, monkeypatch):
    real = tmp_path / "message_filters"
    real.mkdir()
    (real / "__init__.py").touch()
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p != str(FOLDER)] + [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "message_filters")
    standins.put_on_path()
    standins.put_on_path()
    assert sys.path[-1] == str(FOLDER)
    assert sys.path.count(str(FOLDER)) == 1
    assert not str(importlib.util.find_spec("message_filters").origin).startswith(str(FOLDER))


# --- message_filters ----------------------------------------------------------------------------


def stamped(ns: int, name: str = "") -> SimpleNamespace:
    stamp = Time(sec=ns // 10**9, nanosec=ns % 10**9)
    return SimpleNamespace(header=SimpleNamespace(stamp=stamp), ns=ns, name=name)


class Rig:
    """Filters into a synchroniser, and the stamps of what comes out."""

    def __init__(self, filters: int, queue_size: int, slop_ms: float | None = None, **options):
        self.filters = [message_filters.SimpleFilter() for _ in range(filters)]
        if slop_ms is None:
            self.sync = message_filters.TimeSynchronizer(self.filters, queue_size)
        else:
            self.sync = message_filters.ApproximateTimeSynchronizer(
                self.filters, queue_size, slop_ms / 1000, **options
            )
        self.sets: list[tuple[SimpleNamespace, ...]] = []
        self.sync.registerCallback(lambda *messages: self.sets.append(messages))

    def put(self, filter_number: int, *stamps: int, name: str = "") -> None:
        for ns in stamps:
            self.filters[filter_number].signalMessage(stamped(ns, name))

    @property
    def stamps(self) -> list[tuple[int, ...]]:
        return [tuple(m.ns for m in messages) for messages in self.sets]


def test_filter_calls_all_callbacks_with_messages_then_arguments():
    calls = []
    source = message_filters.SimpleFilter()
    first = source.registerCallback(lambda *a: calls.append(("first", *a)), "x", "y")
    second = source.registerCallback(cb=lambda *a: calls.append(("second", *a)))
    source.signalMessage(1, 2)
    assert calls == [("first", 1, 2, "x", "y"), ("second", 1, 2)]
    assert first != second


def test_equal_stamps_pair_in_the_order_of_the_filters():
    rig = Rig(2, 5)
    rig.put(1, 100, name="right")
    assert rig.sets == []
    rig.put(0, 100, name="left")
    assert [[m.name for m in s] for s in rig.sets] == [["left", "right"]]


def test_stamps_that_differ_by_a_nanosecond_do_not_pair():
    now = 1_700_000_000_123_456_789  # too fine for a float of seconds
    rig = Rig(2, 5)
    rig.put(0, now)
    rig.put(1, now + 1)
    assert rig.stamps == []
    rig.put(1, now)
    assert rig.stamps == [(now, now)]


def test_a_message_pairs_once():
    rig = Rig(2, 5)
    rig.put(0, 1)
    rig.put(1, 1, 1)
    assert rig.stamps == [(1, 1)]


def test_a_later_message_of_the_same_stamp_replaces_the_waiting_one():
    rig = Rig(2, 5)
    rig.put(0, 1, name="old")
    rig.put(0, 1, name="new")
    rig.put(1, 1)
    assert [s[0].name for s in rig.sets] == ["new"]


def test_a_pair_leaves_unpaired_older_messages_waiting():
    rig = Rig(2, 5)
    rig.put(0, 1, 2)
    rig.put(1, 2, 1)
    assert rig.stamps == [(2, 2), (1, 1)]


@pytest.mark.parametrize("slop_ms", [None, 1e-6 * 5])
def test_full_queue_gives_up_the_oldest_stamp(slop_ms):
    rig = Rig(2, 2, slop_ms)
    rig.put(0, 100, 300, 200)  # 100 goes, though it was not the last to arrive
    rig.put(1, 100)
    assert rig.stamps == []
    rig.put(1, 200, 300)
    assert rig.stamps == [(200, 200), (300, 300)]


@pytest.mark.parametrize("slop_ms", [None, 1e-6 * 5])
def test_full_queue_gives_up_a_late_message_at_once(slop_ms):
    rig = Rig(2, 2, slop_ms)
    rig.put(1, 100)
    rig.put(0, 200, 300, 100)
    assert rig.stamps == []


def test_three_filters_wait_for_the_third():
    rig = Rig(3, 5)
    rig.put(0, 1)
    rig.put(1, 1)
    assert rig.stamps == []
    rig.put(2, 1)
    assert rig.stamps == [(1, 1, 1)]


def test_approximate_pairs_within_less_than_the_slop():
    rig = Rig(2, 5, slop_ms=10)
    rig.put(0, 100 * MS)
    rig.put(1, 110 * MS)
    assert rig.stamps == []
    rig.put(1, 110 * MS - 1)
    assert rig.stamps == [(100 * MS, 110 * MS - 1)]


@pytest.mark.parametrize("partners", [(95, 102, 108), (108, 102, 95)])
def test_approximate_takes_the_nearest(partners):
    rig = Rig(2, 5, slop_ms=10)
    rig.put(1, *(p * MS for p in partners))
    rig.put(0, 100 * MS)
    assert rig.stamps == [(100 * MS, 102 * MS)]
    rig.put(0, 96 * MS)  # what is left still waits, what was used does not
    assert rig.stamps[1:] == [(96 * MS, 95 * MS)]


def test_approximate_sets_span_less_than_the_slop():
    rig = Rig(3, 5, slop_ms=10)
    rig.put(0, 93 * MS)
    rig.put(1, 106 * MS)  # 13 ms from the first
    rig.put(2, 100 * MS)
    assert rig.stamps == []
    rig.put(0, 97 * MS)
    assert rig.stamps == [(97 * MS, 106 * MS, 100 * MS)]


def test_approximate_looks_for_the_first_filters_nearest_first():
    rig = Rig(3, 5, slop_ms=10)
    rig.put(0, 99 * MS, 102 * MS)
    rig.put(1, 91 * MS, 108 * MS + 1, 108 * MS + 2)
    rig.put(2, 100 * MS)
    assert rig.stamps == [(99 * MS, 108 * MS + 1, 100 * MS)]


def test_approximate_drops_messages_without_a_header():
    rig = Rig(2, 5, slop_ms=10)
    rig.filters[0].signalMessage(String())
    rig.filters[1].signalMessage(String())
    assert rig.sets == []


def test_approximate_stamps_messages_without_a_header_when_allowed():
    rig = Rig(2, 5, slop_ms=1000, allow_headerless=True)
    words = String(data="words")
    rig.filters[0].signalMessage(words)
    rig.put(1, time.time_ns() - 5_000_000_000)
    assert rig.sets == []
    rig.put(1, time.time_ns())
    assert [s[0] for s in rig.sets] == [words]


def test_approximate_takes_stamps_that_are_times_of_rclpy():
    rig = Rig(2, 5, slop_ms=10)
    time_of_rclpy = rclpy.time.Time(seconds=3, nanoseconds=5)
    message = SimpleNamespace(header=SimpleNamespace(stamp=time_of_rclpy))
    rig.filters[0].signalMessage(message)
    rig.put(1, 3 * 10**9)
    assert [s[0] for s in rig.sets] == [message]


def random_streams(seed: int, filters: int) -> list[tuple[int, int]]:
    """(filter, stamp) in a mixed-up order of arrival, some lost."""
    rng = np.random.default_rng(seed)
    events = [
        (frame * 33 + rng.integers(0, 60), f, frame * 33 * MS + int(rng.integers(0, 3 * MS)))
        for frame in range(40)
        for f in range(filters)
        if rng.random() > 0.1
    ]
    return [(f, stamp) for _, f, stamp in sorted(events)]


@pytest.mark.parametrize("seed", range(5))
def test_approximate_pairs_all_frames_that_arrived_whole(seed):
    rig = Rig(2, 10, slop_ms=4)
    events = random_streams(seed, 2)
    for number, stamp in events:
        rig.put(number, stamp)
    frames = [{stamp // (33 * MS) for n, stamp in events if n == side} for side in (0, 1)]
    assert sorted(left // (33 * MS) for left, _ in rig.stamps) == sorted(frames[0] & frames[1])
    assert all(abs(left - right) < 4 * MS for left, right in rig.stamps)


@pytest.mark.parametrize("slop_ms", [None, 0.0005])
def test_other_threads_wait_while_callbacks_run(slop_ms):
    rig = Rig(2, 5, slop_ms)
    entered, leave = threading.Event(), threading.Event()
    rig.sync.registerCallback(lambda *_: (entered.set(), leave.wait(10)))
    rig.put(0, 1000, 9000)
    threads = [threading.Thread(target=rig.put, args=(1, ns)) for ns in (1000, 9000)]
    threads[0].start()
    assert entered.wait(10)
    threads[1].start()
    time.sleep(0.1)
    during = list(rig.stamps)
    leave.set()
    for thread in threads:
        thread.join(10)
    assert during == [(1000, 1000)]
    assert rig.stamps == [(1000, 1000), (9000, 9000)]


@is_ours
@pytest.mark.parametrize("slop_ms", [None, 10])
def test_ours_goes_on_after_a_callback_that_fails(slop_ms):
    """The real one never releases its lock then, and the next message waits for ever."""
    rig = Rig(2, 5, slop_ms)

    def fail(*_):
        raise RuntimeError("callback")

    number = rig.sync.registerCallback(fail)
    rig.put(0, 1)
    with pytest.raises(RuntimeError, match="callback"):
        rig.put(1, 1)
    del rig.sync.callbacks[number]
    rig.put(0, 100 * MS)
    rig.put(1, 100 * MS)
    assert rig.stamps[1:] == [(100 * MS, 100 * MS)]
