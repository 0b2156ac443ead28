"""The stereo camera in a bag: pairs of images with their calibration and ground truth."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np

from kp_frontend.encodings import GreyConverter
from kp_frontend.health import says_raw
from kp_training.evaluation.bags.messages import camera_of, pose_of, true_disparity
from kp_training.evaluation.bags.reader import Bag, stamp_of
from kp_training.evaluation.bags.stamps import (
    Infos,
    check_set,
    no_pairs,
    pair_stamps,
    stamp_text,
    usual_interval,
)
from kp_training.evaluation.bags.topics import StereoTopics
from kp_training.evaluation.frames import Camera, StereoFrame, size_text
from kp_training.evaluation.poses import Poses


@dataclass(frozen=True)
class Reading:
    """How the stereo camera of a bag is read."""

    slop: float = 0.0  # seconds that stamps of a pair may differ by
    offset: float = 0.0  # seconds by which the right camera's stamps are ahead of the left's
    receive_times: bool = False  # the times at which the bag received messages are their stamps
    raw: bool = False  # images are not rectified
    bit_depth: str = "auto"  # of 16-bit images, as `GreyConverter` has it
    baseline: float | None = None  # metres, overrides camera_info
    pose_axes: str = "optical"  # of the true poses, or "body"


@dataclass
class StereoBag:
    """The stereo camera of an open bag.

    Its stamps are read first, so that the pairs are known, then `frames` reads the images.
    `skipped` names what could not be used, `unpaired` the stamps of images without a partner.

    Raises:
        ValueError: no pair at all, stamps that are not set, or a broken bag.
    """

    bag: Bag
    topics: StereoTopics
    reading: Reading = field(default_factory=Reading)
    skipped: list[str] = field(default_factory=list)
    images: dict[str, int] = field(default_factory=dict)
    unpaired: dict[str, list[int]] = field(default_factory=dict)
    stamps: list[int] = field(default_factory=list)  # of the pairs: the left image's

    def __post_init__(self) -> None:
        t = self.topics
        if t.left is None or t.right is None:
            raise ValueError(f"{self.bag.path}: the image topics are not known")
        self._sides = t.left, t.right
        self.grey = GreyConverter(self.reading.bit_depth, self.bag.notes.append)
        stamps, received = self._read_stamps()
        left, right = (stamps[name] for name in self._sides)
        slop = round(self.reading.slop * 1e9)
        if self.reading.receive_times:
            slop = slop or usual_interval(left) // 2
        else:
            check_set(t.left, left)
            check_set(t.right, right)
        right = right - round(self.reading.offset * 1e9)
        pairs = pair_stamps(left, right, slop)
        if not pairs:
            times = received[t.left], received[t.right]
            advice = no_pairs(left, right, *times, offset=self.reading.offset)
            raise ValueError(
                f"{self.bag.path}: none of {len(left)} images of {t.left} and {len(right)} of "
                f"{t.right} have stamps that are equal"
                + (f" within {self.reading.slop:g} s" if slop else "")
                + f"; {advice}{self.bag.noted()}"
            )
        self._pair_of = (
            {i: n for n, (i, _) in enumerate(pairs)},
            {j: n for n, (_, j) in enumerate(pairs)},
        )
        self.stamps = [int(left[i]) for i, _ in pairs]
        self._right_stamps = [int(right[j]) for _, j in pairs]
        self.images = {"left": len(left), "right": len(right)}
        for side, found, paired in zip(
            ("left", "right"), (left, right), self._pair_of, strict=True
        ):
            self.unpaired[side] = [int(s) for i, s in enumerate(found) if i not in paired]
        truths = stamps[t.disparity] if t.disparity else np.zeros(0, np.int64)
        of_truths = pair_stamps(
            np.array(self.stamps), truths, slop if self.reading.receive_times else 0
        )
        self._truth_of = {j: n for n, j in of_truths}

    def _read_stamps(self) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Read all messages for their stamps, those of cameras and poses whole.

        Returns:
            By topic, (N,) int64 nanoseconds: the stamps, and when the bag received them.
        """
        t = self.topics
        kinds = (t.left, t.right, t.left_info, t.right_info, t.disparity, t.pose)
        stamps: dict[str, list[int]] = {name: [] for name in kinds if name}
        received: dict[str, list[int]] = {name: [] for name in stamps}
        infos: dict[str, dict[int, Camera]] = {n: {} for n in (t.left_info, t.right_info) if n}
        poses: dict[int, np.ndarray] = {}
        shift = round(self.reading.offset * 1e9)
        for topic, stamp, time, raw in self._stamped(stamps):
            stamps[topic].append(stamp)
            received[topic].append(time)
            try:
                if topic in infos:
                    of_left = stamp - (shift if topic == t.right_info else 0)
                    infos[topic][of_left] = camera_of(self.bag.read(topic, raw))
                elif topic == t.pose:
                    poses[stamp] = pose_of(self.bag.read(topic, raw), self.reading.pose_axes)
            except ValueError as error:
                self._skip(f"{stamp_text(stamp)}: {error}")
        self._infos = [Infos(infos[n] if n else {}) for n in (t.left_info, t.right_info)]
        self._poses = Poses(poses)
        for side, known, name in zip(
            ("left", "right"), self._infos, (t.left_info, t.right_info), strict=True
        ):
            if not len(known):
                where = f"on {name}" if name else "beside its images"
                self.bag.note(f"no camera_info of the {side} camera is {where}: there is no depth")
        return (
            {name: np.array(values, np.int64) for name, values in stamps.items()},
            {name: np.array(values, np.int64) for name, values in received.items()},
        )

    def _skip(self, words: str) -> None:
        if words not in self.skipped:
            self.skipped.append(words)

    def frames(self) -> Iterator[StereoFrame]:
        """The pairs with their calibration and ground truth. `skipped` lists unusable pairs."""
        left, right = self._sides
        places = {left: self._pair_of[0], right: self._pair_of[1]}
        if self.topics.disparity:
            places[self.topics.disparity] = self._truth_of
        seen = dict.fromkeys(places, 0)
        with_truth = set(self._truth_of.values())
        parts: dict[int, dict[str, bytes]] = {}
        for topic, _, _, raw in self._stamped(places):
            n = places[topic].get(seen[topic])
            seen[topic] += 1
            if n is None:
                continue
            found = parts.setdefault(n, {})
            found[topic] = raw
            if len(found) == 2 + (n in with_truth):
                frame = self._frame(n, parts.pop(n))
                if frame is not None:
                    yield frame

    def _stamped(self, topics: Iterable[str]) -> Iterator[tuple[str, int, int, bytes]]:
        """Messages with their stamps and times of receipt; one without a stamp is skipped."""
        for topic, time, raw in self.bag.messages(topics):
            try:
                stamp = time if self.reading.receive_times else stamp_of(raw)
            except ValueError as error:
                self._skip(f"{topic}, recorded at {stamp_text(time)}: {error}")
                continue
            yield topic, stamp, time, raw

    def _frame(self, n: int, raws: dict[str, bytes]) -> StereoFrame | None:
        stamp = self.stamps[n]
        left_topic, _ = self._sides
        try:
            messages = [self.bag.read(topic, raws[topic]) for topic in self._sides]
            left, right = self.grey.images(messages, ("left", "right"))
            if left.shape != right.shape:
                raise ValueError(
                    f"the left image is {size_text(left)}, the right one {size_text(right)}"
                )
        except ValueError as error:
            self._skip(f"{stamp_text(stamp)}: {error}")
            return None
        left_camera = self._infos[0].at(stamp)
        right_camera = self._infos[1].at(self._right_stamps[n])
        frame = StereoFrame(
            stamp,
            left,
            right,
            (left_camera, right_camera) if left_camera and right_camera else None,
            self._disparity(stamp, raws, left),
            self._poses.at(stamp),
            messages[0].header.frame_id,
            self.reading.raw,
            self.reading.baseline,
        )
        if frame.raw and frame.cameras is None:
            raise ValueError(f"{left_topic} is raw, and has no camera_info that rectifies it")
        if not frame.raw and says_raw(left_topic) and frame.cameras and frame.cameras[0].distorted:
            raise ValueError(f"{left_topic} is not rectified (see its camera_info): give --raw")
        return frame

    def _disparity(
        self, stamp: int, raws: dict[str, bytes], image: np.ndarray
    ) -> np.ndarray | None:
        """The ground-truth disparity of a pair, if there is one of its size."""
        topic = self.topics.disparity
        if topic is None or topic not in raws:
            return None
        try:
            disparity = true_disparity(self.bag.read(topic, raws[topic]))
            if disparity.shape != image.shape:
                raise ValueError(
                    f"the disparity map is {size_text(disparity)}, the image {size_text(image)}"
                )
        except ValueError as error:
            self._skip(f"{stamp_text(stamp)}: without ground truth: {error}")
            return None
        return disparity
