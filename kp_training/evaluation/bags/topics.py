"""Which topics of a bag are a stereo camera's."""

from __future__ import annotations

from dataclasses import dataclass

from kp_training.evaluation.bags.reader import (
    CAMERA_INFO,
    COMPRESSED,
    DISPARITY,
    FEATURES,
    IMAGE,
    POSES,
    Bag,
)

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
    for name, kinds in (("disparity", (DISPARITY,)), ("pose", POSES)):
        truth[name] = getattr(given, name)
        if truth[name] is not None:
            bag.require(truth[name], *kinds)
        elif len(bag.of_type(*kinds)) == 1:
            truth[name] = bag.of_type(*kinds)[0]
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
