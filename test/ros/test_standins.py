"""Our `message_filters` and `cv_bridge` behave as the real ones do.

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

import cv2
import numpy as np
import pytest
import rclpy.time
from builtin_interfaces.msg import Time
from sensor_msgs.msg import Image
from std_msgs.msg import Header, String

from kp_frontend.ros import standins

standins.put_on_path()
import message_filters  # noqa: E402
from cv_bridge import CvBridge, CvBridgeError  # noqa: E402

FOLDER = Path(standins.__file__).parent
MS = 1_000_000
is_ours = pytest.mark.skipif(
    not Path(message_filters.__file__).is_relative_to(FOLDER), reason="the real message_filters"
)


# --- finding the packages -----------------------------------------------------------------------


def test_each_real_package_is_found_before_ours(tmp_path, monkeypatch):
    real = tmp_path / "cv_bridge"
    real.mkdir()
    (real / "__init__.py").touch()
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p != str(FOLDER)] + [str(tmp_path)])
    for name in ("cv_bridge", "message_filters"):
        monkeypatch.delitem(sys.modules, name)
    standins.put_on_path()
    standins.put_on_path()
    assert sys.path[-1] == str(FOLDER)
    assert sys.path.count(str(FOLDER)) == 1
    assert importlib.util.find_spec("cv_bridge").origin == str(real / "__init__.py")
    if not any((Path(p) / "message_filters").is_dir() for p in sys.path[:-1]):
        ours = FOLDER / "message_filters" / "__init__.py"
        assert importlib.util.find_spec("message_filters").origin == str(ours)


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


def test_subscriber_subscribes_and_passes_messages_on():
    class Node:
        def create_subscription(self, msg_type, topic, callback, qos_profile, **options):
            self.asked = (msg_type, topic, qos_profile, options)
            self.callback = callback
            return SimpleNamespace(topic_name="/ns/left/image")

    node, got = Node(), []
    subscriber = message_filters.Subscriber(node, Image, "left/image")
    assert node.asked == (Image, "left/image", 10, {})
    subscriber.registerCallback(lambda *a: got.append(a), 7)
    node.callback("image")
    assert got == [("image", 7)]
    assert subscriber.topic == subscriber.getTopic() == "left/image"
    assert subscriber.sub.topic_name == "/ns/left/image"
    message_filters.Subscriber(node, Image, "t", qos_profile=3, raw=True)
    assert node.asked == (Image, "t", 3, {"raw": True})


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


# --- cv_bridge ----------------------------------------------------------------------------------

LAYOUTS = {
    "mono8": (np.uint8, 1), "mono16": (np.uint16, 1), "bgr8": (np.uint8, 3), "rgb8": (np.uint8, 3),
    "bgra8": (np.uint8, 4), "rgba8": (np.uint8, 4), "8UC1": (np.uint8, 1), "8UC3": (np.uint8, 3),
    "16UC1": (np.uint16, 1), "32FC1": (np.float32, 1), "bayer_rggb8": (np.uint8, 1),
    "bayer_bggr8": (np.uint8, 1), "bayer_gbrg8": (np.uint8, 1), "bayer_grbg8": (np.uint8, 1),
}  # fmt: skip
BRIDGE = CvBridge()


def noise(encoding: str, height: int = 6, width: int = 10) -> np.ndarray:
    dtype, channels = LAYOUTS[encoding]
    shape = (height, width) if channels == 1 else (height, width, channels)
    values = np.random.default_rng(0).integers(0, 65536, shape)
    return values.astype(dtype)


def padded(image: np.ndarray, encoding: str, padding: int) -> Image:
    """A message whose rows end in `padding` unused bytes."""
    rows = np.ascontiguousarray(image).view(np.uint8).reshape(image.shape[0], -1)
    rows = np.pad(rows, ((0, 0), (0, padding)), constant_values=77)
    message = BRIDGE.cv2_to_imgmsg(image, encoding)
    message.step = rows.shape[1]
    message.data = rows.tobytes()
    return message


@pytest.mark.parametrize("encoding", LAYOUTS)
def test_every_encoding_goes_there_and_back(encoding):
    image = noise(encoding)
    message = BRIDGE.cv2_to_imgmsg(image, encoding)
    assert (message.height, message.width, message.encoding) == (6, 10, encoding)
    assert message.step * 6 == len(message.data) == image.nbytes
    back = BRIDGE.imgmsg_to_cv2(message)
    assert back.dtype == image.dtype
    np.testing.assert_array_equal(back, image)


@pytest.mark.parametrize("padding", [1, 2, 13])
@pytest.mark.parametrize("encoding", LAYOUTS)
def test_padding_of_rows_is_left_out(encoding, padding):
    image = noise(encoding)
    message = padded(image, encoding, padding)
    np.testing.assert_array_equal(BRIDGE.imgmsg_to_cv2(message), image)


@pytest.mark.parametrize("padding", [0, 2])
@pytest.mark.parametrize("encoding", ["mono16", "16UC1", "32FC1"])
def test_big_endian_data(encoding, padding):
    image = noise(encoding)
    message = padded(image.byteswap(), encoding, padding)
    message.is_bigendian = 1
    back = BRIDGE.imgmsg_to_cv2(message)
    assert back.dtype.isnative
    np.testing.assert_array_equal(back, image)


def test_big_endian_array_is_written_as_its_values():
    image = noise("mono16")
    message = BRIDGE.cv2_to_imgmsg(image.astype(">u2"), "mono16")
    np.testing.assert_array_equal(BRIDGE.imgmsg_to_cv2(message), image)


@pytest.mark.parametrize("encoding", ["passthrough", "mono8"])
def test_mono8_is_not_copied(encoding):
    message = BRIDGE.cv2_to_imgmsg(noise("mono8"), "mono8")
    image = BRIDGE.imgmsg_to_cv2(message, encoding)
    message.data[13] = 200
    assert image[1, 3] == 200
    message.data[13] = 100
    assert image[1, 3] == 100


def test_mono16_to_mono8_keeps_the_range():
    values = np.array([[0, 128, 129, 257, 32768, 65000, 65535]], np.uint16)
    message = BRIDGE.cv2_to_imgmsg(values, "mono16")
    image = BRIDGE.imgmsg_to_cv2(message, "mono8")
    assert image.dtype == np.uint8
    assert image.tolist() == [[0, 0, 1, 1, 128, 253, 255]]
    colour = BRIDGE.imgmsg_to_cv2(message, "bgr8")
    np.testing.assert_array_equal(colour, np.repeat(image[..., None], 3, axis=2))


def test_mono8_to_mono16_keeps_the_range():
    message = BRIDGE.cv2_to_imgmsg(np.array([[0, 1, 255]], np.uint8), "mono8")
    assert BRIDGE.imgmsg_to_cv2(message, "mono16").tolist() == [[0, 257, 65535]]


def test_colours():
    red = np.full((2, 3, 3), (255, 0, 0), np.uint8)
    message = BRIDGE.cv2_to_imgmsg(red, "rgb8")
    assert BRIDGE.imgmsg_to_cv2(message, "rgb8")[0, 0].tolist() == [255, 0, 0]
    assert BRIDGE.imgmsg_to_cv2(message, "bgr8")[0, 0].tolist() == [0, 0, 255]
    assert BRIDGE.imgmsg_to_cv2(message, "bgra8")[0, 0].tolist() == [0, 0, 255, 255]
    assert BRIDGE.imgmsg_to_cv2(message, "mono8")[0, 0] == 76  # 0.299 of red
    message.encoding = "bgr8"
    assert BRIDGE.imgmsg_to_cv2(message, "mono8")[0, 0] == 29  # 0.114 of blue
    message = BRIDGE.cv2_to_imgmsg(np.full((2, 3, 4), (255, 0, 0, 9), np.uint8), "rgba8")
    assert BRIDGE.imgmsg_to_cv2(message, "bgr8")[0, 0].tolist() == [0, 0, 255]
    assert BRIDGE.imgmsg_to_cv2(message, "mono8")[0, 0] == 76


@pytest.mark.parametrize("pattern", ["rggb", "bggr", "gbrg", "grbg"])
def test_bayer_patterns_name_the_first_two_rows(pattern):
    colour = {"r": 250, "g": 120, "b": 10}
    cell = np.array([[colour[pattern[0]], colour[pattern[1]]],
                     [colour[pattern[2]], colour[pattern[3]]]], np.uint8)  # fmt: skip
    message = BRIDGE.cv2_to_imgmsg(np.tile(cell, (4, 6)), f"bayer_{pattern}8")
    assert np.all(BRIDGE.imgmsg_to_cv2(message, "rgb8") == (250, 120, 10))
    assert np.all(BRIDGE.imgmsg_to_cv2(message, "bgr8") == (10, 120, 250))
    grey = cv2.cvtColor(np.array([[[250, 120, 10]]], np.uint8), cv2.COLOR_RGB2GRAY).item()
    assert np.all(np.abs(BRIDGE.imgmsg_to_cv2(message, "mono8").astype(int) - grey) <= 1)


@pytest.mark.parametrize(
    "change",
    [
        {"step": 9},  # shorter than a row
        {"step": 11},  # more than there is
        {"height": 7},
        {"height": 5},  # data left over
        {"width": 11},
        {"data": bytes(59)},
        {"data": bytes(61)},
        {"data": b""},
        {"height": 0, "data": b""},
        {"width": 0, "step": 0, "data": b""},
        {"width": 0},
    ],
    ids=str,
)
def test_sizes_that_disagree_are_errors(change):
    message = BRIDGE.cv2_to_imgmsg(noise("mono8"), "mono8")
    for name, value in change.items():
        setattr(message, name, value)
    with pytest.raises(CvBridgeError, match=r"\d+x\d+"):
        BRIDGE.imgmsg_to_cv2(message, "mono8")


@pytest.mark.parametrize("encoding", ["", "jpeg", "mono", "passthrough", "8UC"])
def test_unknown_encodings_are_errors(encoding):
    message = BRIDGE.cv2_to_imgmsg(noise("mono8"), "mono8")
    if encoding != "passthrough":
        with pytest.raises(CvBridgeError):
            BRIDGE.imgmsg_to_cv2(message, encoding)
        with pytest.raises(CvBridgeError):
            BRIDGE.cv2_to_imgmsg(noise("mono8"), encoding)
    message.encoding = encoding
    with pytest.raises(CvBridgeError, match="encoding"):
        BRIDGE.imgmsg_to_cv2(message, "mono8")


@pytest.mark.parametrize(
    ("source", "target"),
    [("16UC1", "mono8"), ("32FC1", "mono8"), ("8UC3", "mono8"), ("mono8", "bayer_rggb8")],
)
def test_conversions_without_a_meaning_are_errors(source, target):
    with pytest.raises(CvBridgeError, match=f"{source}.*{target}"):
        BRIDGE.imgmsg_to_cv2(BRIDGE.cv2_to_imgmsg(noise(source), source), target)


@pytest.mark.parametrize(
    ("image", "encoding"),
    [
        (noise("bgr8"), "mono8"),
        (noise("mono8"), "bgr8"),
        (noise("mono16"), "mono8"),
        (noise("mono8").astype(np.float64), "passthrough"),
        (np.zeros(5, np.uint8), "mono8"),
        (np.zeros((0, 5), np.uint8), "mono8"),
        ([[1, 2], [3, 4]], "mono8"),
        (None, "mono8"),
    ],
)
def test_arrays_that_do_not_fit_the_encoding_are_errors(image, encoding):
    with pytest.raises(CvBridgeError):
        BRIDGE.cv2_to_imgmsg(image, encoding)


def test_errors_are_type_errors():
    assert issubclass(CvBridgeError, TypeError)


def test_passthrough_names_the_type_and_the_header_is_kept():
    header = Header(frame_id="left", stamp=Time(sec=3, nanosec=4))
    for name in ("8UC1", "8UC3", "16UC1", "32FC1"):
        message = BRIDGE.cv2_to_imgmsg(noise(name), header=header)
        assert message.encoding == name
        assert message.header == header
    assert BRIDGE.cv2_to_imgmsg(noise("8UC1")).header == Header()


def test_parts_and_transposed_arrays():
    image = noise("bgr8")
    for part in (image[::2, ::-1], image.transpose(1, 0, 2), image[1:4, 2:5]):
        message = BRIDGE.cv2_to_imgmsg(part, "bgr8")
        np.testing.assert_array_equal(BRIDGE.imgmsg_to_cv2(message), part)
    message = BRIDGE.cv2_to_imgmsg(image[..., :1], "mono8")
    np.testing.assert_array_equal(BRIDGE.imgmsg_to_cv2(message), image[..., 0])


def test_a_large_image_takes_no_time():
    image = np.zeros((2160, 3840, 3), np.uint8)
    start = time.thread_time()
    message = BRIDGE.cv2_to_imgmsg(image, "bgr8")
    assert BRIDGE.imgmsg_to_cv2(message, "bgr8").shape == image.shape
    assert time.thread_time() - start < 0.25  # value by value it is over a second
