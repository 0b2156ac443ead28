"""The stereo camera in a bag: which topics are its, which images are pairs, frames of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np

from kp_training.evaluation.bags.messages import camera_of, grey_image, pose_of, true_disparity
from kp_training.evaluation.bags.reader import (
    CAMERA_INFO,
    COMPRESSED,
    DISPARITY,
    FEATURES,
    IMAGE,
    POSE,
    Bag,
    stamp_of,
)
from kp_training.evaluation.frames import Camera, StereoFrame

IMAGES = (IMAGE, COMPRESSED)
# How the two images of a rig are told apart by name, most usual first.
SIDES = (("left", "right"), ("cam0", "cam1"), ("infra1", "infra2"), ("image_0", "image_1"))


@dataclass(frozen=True)
class StereoTopics:
    """Topics of a stereo camera in a bag; None for those that it does not have."""

    left: str | None = None
    right: str | None = None
    left_info: str | None = None
    right_info: str | None = None
    disparity: str | None = None
    pose: str | None = None
    features: str | None = None


def choose_topics(bag: Bag, given: StereoTopics) -> StereoTopics:
    """The topics given, and those that follow from them or that only one choice is left for.

    Recorded features are chosen where there are no images, or where they are given.

    Raises:
        ValueError: a topic is not there or of another type, or the images cannot be guessed; the
            words list the topics of the bag.
    """
    if (given.left is None) != (given.right is None):
        raise ValueError("give both image topics, left and right, or none")
    left, right, features = given.left, given.right, given.features
    if features is not None:
        bag.require(features, FEATURES)
    if left is None:
        guesses = _image_pairs(bag)
        recorded = bag.of_type(FEATURES)
        if len(guesses) == 1:
            left, right = guesses[0]
        elif not guesses and len(recorded) == 1:
            features = features or recorded[0]
        elif features is None:
            what = "more than one pair of image topics" if guesses else "no pair of image topics"
            raise ValueError(
                f"{bag.path} has {what} that could be left and right: give their names; "
                f"it has {bag.listing()}"
            )
    infos = []
    for image, info in ((left, given.left_info), (right, given.right_info)):
        if image is not None:
            bag.require(image, *IMAGES)
        if info is not None:
            bag.require(info, CAMERA_INFO)
        elif image is not None and _info_of(image) in bag.of_type(CAMERA_INFO):
            info = _info_of(image)
        infos.append(info)
    truth = {}
    for name, kind in (("disparity", DISPARITY), ("pose", POSE)):
        truth[name] = getattr(given, name)
        if truth[name] is not None:
            bag.require(truth[name], kind)
        elif len(bag.of_type(kind)) == 1:
            truth[name] = bag.of_type(kind)[0]
    return StereoTopics(left, right, infos[0], infos[1], features=features, **truth)


def _info_of(image: str) -> str:
    """Where ROS's convention puts the camera_info of an image topic: beside it."""
    return image.removesuffix("/compressed").rpartition("/")[0] + "/camera_info"


def _image_pairs(bag: Bag) -> list[tuple[str, str]]:
    """Pairs of image topics that differ in the side only; raw transport before compressed."""
    for kind in IMAGES:
        names = bag.of_type(kind)
        for one, other in SIDES:
            found = [(n, n.replace(one, other)) for n in names if one in n]
            found = [(a, b) for a, b in found if b in names and a != b]
            if found:
                return found
    return []


def pair_stamps(left: np.ndarray, right: np.ndarray, slop: int = 0) -> list[tuple[int, int]]:
    """Which images are pairs: each other's nearest stamp, at most `slop` apart.

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
    """For each stamp the place of the nearest of the others; the first of equal ones."""
    order = np.argsort(others, kind="stable")
    ordered = others[order]
    after = np.searchsorted(ordered, stamps).clip(0, len(ordered) - 1)
    before = np.searchsorted(ordered, ordered[(after - 1).clip(0)])
    closer = np.abs(ordered[before] - stamps) <= np.abs(ordered[after] - stamps)
    return order[np.where(closer, before, after)]


@dataclass
class StereoBag:
    """The stereo camera of an open bag.

    Its stamps are read first, so that the pairs are known, then `frames` reads the images.
    `skipped` names what could not be used, `unpaired` the stamps of images without a partner.

    Raises:
        ValueError: no pair at all, or a broken bag.
    """

    bag: Bag
    topics: StereoTopics
    slop: float = 0.0  # seconds that stamps of a pair may differ by
    raw: bool = False  # images are not rectified
    skipped: list[str] = field(default_factory=list)
    images: dict[str, int] = field(default_factory=dict)
    unpaired: dict[str, list[int]] = field(default_factory=dict)
    stamps: list[int] = field(default_factory=list)  # of the pairs: the left image's

    def __post_init__(self) -> None:
        t = self.topics
        if t.left is None or t.right is None:
            raise ValueError(f"{self.bag.path}: the image topics are not known")
        self._sides = t.left, t.right
        kinds = (t.left, t.right, t.left_info, t.right_info, t.disparity, t.pose)
        of: dict[str, list[int]] = {name: [] for name in kinds if name}
        infos: dict[str, dict[int, Camera]] = {n: {} for n in (t.left_info, t.right_info) if n}
        self._poses: dict[int, np.ndarray] = {}
        for topic, stamp, raw in self._stamped(of):
            of[topic].append(stamp)
            try:
                if topic in infos:
                    infos[topic][stamp] = camera_of(self.bag.read(topic, raw))
                elif topic == t.pose:
                    self._poses[stamp] = pose_of(self.bag.read(topic, raw))
            except ValueError as error:
                self.skipped.append(f"{stamp_text(stamp)}: {error}")
        left, right = (np.array(of[name], np.int64) for name in self._sides)
        pairs = pair_stamps(left, right, round(self.slop * 1e9))
        self._pair_of = (
            {i: n for n, (i, _) in enumerate(pairs)},
            {j: n for n, (_, j) in enumerate(pairs)},
        )
        self.stamps = [int(left[i]) for i, _ in pairs]
        self.images = {"left": len(left), "right": len(right)}
        for side, stamps, paired in zip(
            ("left", "right"), (left, right), self._pair_of, strict=True
        ):
            self.unpaired[side] = [int(s) for i, s in enumerate(stamps) if i not in paired]
        self._infos = [Infos(infos[n] if n else {}) for n in (t.left_info, t.right_info)]
        self._truths = set(of[t.disparity] if t.disparity else ())
        if not pairs:
            raise ValueError(
                f"{self.bag.path}: none of {len(left)} images of {t.left} and {len(right)} of "
                f"{t.right} have stamps that are equal"
                + (f" within {self.slop} s" if self.slop else "; allow for a difference (--slop)")
                + "".join(f"; {note}" for note in self.bag.notes)
            )

    def frames(self) -> Iterator[StereoFrame]:
        """The pairs, with what is known of them; one that cannot be used is named in `skipped`."""
        left, right = self._sides
        truth = self.topics.disparity
        seen = {left: 0, right: 0}
        parts: dict[int, dict[str, bytes]] = {}
        n_of_stamp = {stamp: n for n, stamp in enumerate(self.stamps)}
        for topic, stamp, raw in self._stamped([left, right, *([truth] if truth else [])]):
            if topic == truth:
                n = n_of_stamp.get(stamp)
            else:
                n = self._pair_of[topic == right].get(seen[topic])
                seen[topic] += 1
            if n is None:
                continue
            found = parts.setdefault(n, {})
            found[topic] = raw
            if len(found) == 2 + (self.stamps[n] in self._truths):
                frame = self._frame(n, parts.pop(n))
                if frame is not None:
                    yield frame

    def _stamped(self, topics: Iterable[str]) -> Iterator[tuple[str, int, bytes]]:
        """Messages and their stamps; one too short to have a stamp is named in `skipped`, once."""
        for topic, time, raw in self.bag.messages(topics):
            try:
                stamp = stamp_of(raw)
            except ValueError as error:
                words = f"{topic}, recorded at {stamp_text(time)}: {error}"
                if words not in self.skipped:
                    self.skipped.append(words)
                continue
            yield topic, stamp, raw

    def camera_at(self, side: int, stamp: int) -> Camera | None:
        """The left (0) or right (1) camera at a time; None if the bag has no camera_info."""
        return self._infos[side].at(stamp)

    def _frame(self, n: int, raws: dict[str, bytes]) -> StereoFrame | None:
        stamp = self.stamps[n]
        left_topic, right_topic = self._sides
        try:
            message = self.bag.read(left_topic, raws[left_topic])
            left = grey_image(message)
            right = grey_image(self.bag.read(right_topic, raws[right_topic]))
            if left.shape != right.shape:
                raise ValueError(f"the left image is {left.shape}, the right one {right.shape}")
        except ValueError as error:
            self.skipped.append(f"{stamp_text(stamp)}: {error}")
            return None
        left_camera = self.camera_at(0, stamp_of(raws[left_topic]))
        right_camera = self.camera_at(1, stamp_of(raws[right_topic]))
        frame = StereoFrame(
            stamp,
            left,
            right,
            (left_camera, right_camera) if left_camera and right_camera else None,
            self._disparity(stamp, raws, left.shape),
            self._poses.get(stamp),
            message.header.frame_id,
            self.raw,
        )
        if self.raw and frame.cameras is None:
            raise ValueError(f"{left_topic} is raw, and has no camera_info that rectifies it")
        if not self.raw and "raw" in left_topic and frame.cameras and frame.cameras[0].distorted:
            raise ValueError(f"{left_topic} is not rectified, says its camera_info: give --raw")
        return frame

    def _disparity(
        self, stamp: int, raws: dict[str, bytes], shape: tuple[int, ...]
    ) -> np.ndarray | None:
        """The true disparity of a pair, if there is one that fits it."""
        topic = self.topics.disparity
        if topic is None or topic not in raws:
            return None
        try:
            disparity = true_disparity(self.bag.read(topic, raws[topic]))
            if disparity.shape != shape:
                raise ValueError(f"the disparity map is {disparity.shape}, the image {shape}")
        except ValueError as error:
            self.skipped.append(f"{stamp_text(stamp)}: without ground truth: {error}")
            return None
        return disparity


class Infos:
    """Cameras by stamp: an image's own, else the last before it, else the first."""

    def __init__(self, cameras: dict[int, Camera]) -> None:
        self._stamps = np.array(sorted(cameras), np.int64)
        self._cameras = cameras

    def at(self, stamp: int) -> Camera | None:
        """The camera at a time; None if there is none at all."""
        if not self._stamps.size:
            return None
        i = max(0, int(np.searchsorted(self._stamps, stamp, "right")) - 1)
        return self._cameras[int(self._stamps[i])]


def stamp_text(stamp: int) -> str:
    """A stamp in seconds, with all its digits."""
    return f"{stamp // 1_000_000_000}.{stamp % 1_000_000_000:09d}"
