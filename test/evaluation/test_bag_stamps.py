"""Stamps and poses of bags: not set, offset, at their own rate."""

from __future__ import annotations

from dataclasses import replace

import made_world
import numpy as np
import pytest
from made_world import INTERVAL
from rosbags.rosbag2 import StoragePlugin, Writer
from scipy.spatial.transform import Rotation

from kp_frontend.cli import main
from kp_frontend.config import FrontendConfig
from kp_training.evaluation.bags.evaluation import evaluate_bag
from kp_training.evaluation.bags.messages import BODY_FROM_OPTICAL
from kp_training.evaluation.bags.reader import CAMERA_INFO, DISPARITY, IMAGE, POSE, POSES, Bag
from kp_training.evaluation.bags.stereo import Reading, StereoBag
from kp_training.evaluation.bags.topics import StereoTopics, choose_topics
from kp_training.evaluation.bags.writer import _Messages
from kp_training.evaluation.poses import Poses
from kp_training.evaluation.reasons import grouped, listed

COUNT = 4
MADE = _Messages()


@pytest.fixture
def messages() -> list:
    """Topic, type, time of receipt and message; every test changes its own."""
    return [
        (topic, kind, frame.stamp, message)
        for frame in made_world.wall(COUNT)
        for topic, kind, message in MADE.of_frame(frame, "image_rect")
    ]


def write(path, messages):
    with Writer(path, version=9, storage_plugin=StoragePlugin.MCAP) as writer:
        connections = {}
        for topic, kind, time, message in messages:
            if topic not in connections:
                connections[topic] = writer.add_connection(topic, kind, typestore=MADE.store)
            writer.write(connections[topic], time, MADE.store.serialize_cdr(message, kind))
    return path


def read(path, given=None, **reading):
    """All frames, and the notes."""
    with Bag(path) as bag:
        topics = choose_topics(bag, given or StereoTopics())
        return list(StereoBag(bag, topics, Reading(**reading)).frames()), bag.notes


def shift(messages, nanoseconds, side="right"):
    for topic, _, _, message in messages:
        if topic.startswith(f"/{side}"):
            stamp = message.header.stamp
            total = stamp.sec * 10**9 + stamp.nanosec + nanoseconds
            message.header = MADE.header(total, message.header.frame_id)


def test_stamps_that_are_not_set_are_told_and_replaced_by_the_times_of_receipt(messages, tmp_path):
    late = []
    for i, (topic, kind, time, message) in enumerate(messages):
        message.header = MADE.header(0, message.header.frame_id)
        late.append((topic, kind, time + 1_000_000 * (i % 6), message))  # one after the other
    path = write(tmp_path / "bag", late)
    with pytest.raises(ValueError, match=r"all 4 stamps of /left/image_rect are 0.*--use-receive"):
        read(path)
    found, _ = read(path, receive_times=True)
    assert len(found) == COUNT
    for frame, expected in zip(found, made_world.wall(COUNT), strict=True):
        assert abs(frame.stamp - expected.stamp) < 6_000_000
        np.testing.assert_array_equal(frame.right, expected.right)
        np.testing.assert_array_equal(frame.disparity, expected.disparity)
        assert frame.calibration() == expected.calibration()
        np.testing.assert_allclose(frame.pose, expected.pose, atol=0.01)
    with pytest.raises(ValueError, match="cannot be used with --live"):
        evaluate_bag(
            path, StereoTopics(), FrontendConfig(), tmp_path, Reading(receive_times=True), live=True
        )


def test_one_stamp_of_zero_is_a_stamp(messages, tmp_path):
    first = [m for m in messages if m[2] == messages[0][2]]
    for *_, message in first:
        message.header = MADE.header(0, message.header.frame_id)
    assert len(read(write(tmp_path / "bag", first))[0]) == 1


@pytest.mark.parametrize("offset_s", [2.0, -0.35])
def test_clocks_that_differ_are_measured_and_corrected(messages, tmp_path, offset_s):
    shift(messages, round(offset_s * 1e9))
    path = write(tmp_path / "bag", messages)
    with pytest.raises(ValueError, match=rf"s are {offset_s:g} s ahead .*--offset {offset_s:g}$"):
        read(path)
    found, _ = read(path, offset=offset_s)
    assert [f.stamp for f in found] == [f.stamp for f in made_world.wall(COUNT)]
    assert all(f.calibration().baseline == pytest.approx(0.12) for f in found)
    with pytest.raises(ValueError, match=rf"give --offset {offset_s:g}$"):  # a wrong one is mended
        read(path, offset=5.0)


def test_an_offset_with_jitter_needs_both_options(messages, tmp_path):
    stamps = [f.stamp for f in made_world.wall(COUNT)]
    for topic, _, time, message in messages:
        if topic.startswith("/right"):
            jitter = (0, 1500, -700, 300)[stamps.index(time)] * 1000
            message.header = MADE.header(time + 10**9 + jitter, "right_optical")
    path = write(tmp_path / "bag", messages)
    with pytest.raises(ValueError, match=r"give --offset 1\.00015 --slop 0\.00135"):
        read(path)
    assert len(read(path, offset=1.00015, slop=0.00135)[0]) == COUNT


def test_stamps_without_any_relation_are_told(messages, tmp_path):
    for i, (topic, _, time, message) in enumerate(messages):
        if topic.startswith("/right"):
            message.header = MADE.header(time + i * i * 10**9, "right_optical")
    with pytest.raises(ValueError, match="no constant offset"):
        read(write(tmp_path / "bag", messages), slop=0.001)


def test_a_missing_camera_info_is_named(messages, tmp_path):
    one = [m for m in messages if m[0] != "/right/camera_info"]
    found, notes = read(write(tmp_path / "one", one))
    assert len(found) == COUNT and found[0].calibration() is None
    assert notes == ["no camera_info of the right camera is beside its images: there is no depth"]


def test_a_window_and_a_given_baseline_reach_the_calibration(messages, tmp_path):
    """A binned region of a larger sensor gives the depth of the image as it comes."""
    for topic, kind, _, message in messages:
        if kind == CAMERA_INFO:
            message.binning_x = message.binning_y = 2
            message.width, message.height = 600, 500
            roi = message.roi
            roi.x_offset, roi.y_offset = 40, 30
            roi.width, roi.height = 2 * made_world.WIDTH, 2 * made_world.HEIGHT
            whole = 2 * message.p.reshape(3, 4)
            whole[2] /= 2
            whole[:2, 2] += 40, 30
            if topic.startswith("/right"):
                whole[0, 3] = 0  # the driver forgets it
            message.p = whole.reshape(-1)
            message.k = whole[:, :3].reshape(-1)
    path = write(tmp_path / "bag", messages)
    frame = read(path)[0][0]
    with pytest.raises(ValueError, match=r"P\[3\] of the right camera is 0.*--baseline"):
        frame.calibration()
    found = read(path, baseline=made_world.BASELINE)[0][0].calibration()
    expected = made_world.wall(1)[0].calibration()
    assert vars(found) == pytest.approx(vars(expected))


def pose_message(kind: str, stamp: int, pose: np.ndarray):
    made = MADE.pose(MADE.header(stamp, "world"), pose)
    header, at, turn = made.header, made.pose.position, made.pose.orientation
    types = MADE.type
    covariance = np.zeros(36)
    with_covariance = types["geometry_msgs/msg/PoseWithCovariance"](made.pose, covariance)
    if kind == POSE:
        return made
    if kind.endswith("PoseWithCovarianceStamped"):
        return types[kind](header, with_covariance)
    if kind.endswith("TransformStamped"):
        vector = types["geometry_msgs/msg/Vector3"](at.x, at.y, at.z)
        return types[kind](header, "camera", types["geometry_msgs/msg/Transform"](vector, turn))
    zero = types["geometry_msgs/msg/Vector3"](0.0, 0.0, 0.0)
    twist = types["geometry_msgs/msg/Twist"](zero, zero)
    twist = types["geometry_msgs/msg/TwistWithCovariance"](twist, covariance)
    return types[kind](header, "camera", with_covariance, twist)


@pytest.mark.parametrize("kind", POSES)
def test_poses_of_every_type_come_at_their_own_rate(messages, tmp_path, kind):
    frames = made_world.wall(COUNT)
    step = frames[1].pose[:3, 3] - frames[0].pose[:3, 3]
    images = [m for m in messages if m[1] not in (POSE, DISPARITY)]
    poses = []
    for i in range(-1, 12):  # every 30 ms, never at the time of an image
        time = frames[0].stamp + 7_000_000 + i * 30_000_000
        pose = np.eye(4)
        pose[:3, 3] = step * (time - frames[0].stamp) / INTERVAL
        poses.append(("/odom", kind, time, pose_message(kind, time, pose)))
    found, _ = read(write(tmp_path / "bag", images + poses))
    for frame, expected in zip(found, frames, strict=True):
        np.testing.assert_allclose(frame.pose, expected.pose, atol=1e-9)


def test_poses_of_a_body_are_turned_to_the_camera(messages, tmp_path):
    frames = made_world.wall(COUNT)
    images = [m for m in messages if m[1] == IMAGE]
    body = np.linalg.inv(BODY_FROM_OPTICAL)
    poses = [("/p", POSE, f.stamp, pose_message(POSE, f.stamp, f.pose @ body)) for f in frames]
    found, _ = read(write(tmp_path / "bag", images + poses), pose_axes="body")
    np.testing.assert_allclose([f.pose for f in found], [f.pose for f in frames], atol=1e-9)


def test_poses_are_interpolated_within_a_limit():
    turns = Rotation.from_euler("y", [0, 40], degrees=True).as_matrix()
    poses = {}
    for stamp, turn, x in zip((0, 100_000_000), turns, (0.0, 1.0), strict=True):
        poses[stamp] = np.eye(4)
        poses[stamp][:3, :3], poses[stamp][0, 3] = turn, x
    found = Poses(poses).at(25_000_000)
    assert found[0, 3] == pytest.approx(0.25)
    turn = Rotation.from_matrix(found[:3, :3]).as_euler("yxz", degrees=True)
    np.testing.assert_allclose(turn, [10, 0, 0], atol=1e-9)
    np.testing.assert_array_equal(Poses(poses).at(103_000_000), poses[100_000_000])
    assert Poses(poses).at(110_000_000) is None and Poses(poses).at(-50_000_000) is None
    assert Poses({}).at(5) is None
    far = {stamp * 3: pose for stamp, pose in poses.items()}
    assert Poses(far).at(150_000_000) is None and Poses(far).at(299_000_000) is not None


def test_the_options_are_given_on_the_command_line(messages, tmp_path, capsys):
    shift(messages, 2 * 10**9)
    path = write(tmp_path / "bag", messages)
    command = ["evaluate", "odometry", str(path), "--methods", "orb", "--out", str(tmp_path / "o")]
    assert main(command) == 1
    assert "give --offset 2" in capsys.readouterr().err
    assert main([*command, "--offset", "2", "--baseline", "0.12", "--pose-axes", "optical"]) == 0
    for bad in (["--offset", "nan"], ["--baseline", "0"], ["--pose-axes", "x"]):
        with pytest.raises(SystemExit):
            main([*command, *bad])


def test_a_frame_keeps_its_baseline_when_rectified():
    frame = replace(made_world.wall(1)[0], raw=True, baseline=0.3)
    assert frame.rectified().calibration().baseline == 0.3


def test_reasons_that_repeat_share_a_line():
    reasons = [f"{i}.000000000: without depth: why" for i in range(5)] + ["else: 1.0: x"]
    first = "0.000000000; 1.000000000; 2.000000000; 2 more: without depth: why"
    assert grouped(reasons) == [first, "else: 1.0: x"]
    assert listed(["a", "b"]) == "a; b" and listed([]) == ""
