"""Bags: written, read, paired, evaluated offline and through the running node."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import cv2
import made_world
import numpy as np
import pytest
import yaml
from made_bags import COUNT, evaluate, messages_of, write
from made_world import HEIGHT, INTERVAL, WIDTH

from kp_frontend.cli import main
from kp_training.evaluation.bags import reader, writer
from kp_training.evaluation.bags.reader import Bag
from kp_training.evaluation.bags.report import live_lines
from kp_training.evaluation.bags.runs import Run, agreement
from kp_training.evaluation.bags.stamps import pair_stamps, stamp_text
from kp_training.evaluation.bags.stereo import Reading, StereoBag
from kp_training.evaluation.bags.topics import StereoTopics, choose_topics

DATA = Path(__file__).parents[3] / "shared/data"
ARGUMENTS = ["--backend", "torch", "--threads", "1", "--max-keypoints", "256"]


@pytest.mark.parametrize("name", ["wall.mcap", "wall.db3", "wall"])
def test_a_bag_comes_back_as_it_was_written(frames, tmp_path, name):
    path = tmp_path / name
    counts = writer.write_bag(made_world.sequence(frames), path)
    assert set(counts.values()) == {COUNT} and len(counts) == 6
    metadata = yaml.safe_load((path / "metadata.yaml").read_text())["rosbag2_bagfile_information"]
    assert metadata["storage_identifier"] == ("sqlite3" if name.endswith("db3") else "mcap")
    offered = metadata["topics_with_message_count"][0]["topic_metadata"]["offered_qos_profiles"]
    assert offered[0]["reliability"] == "reliable"
    files = [file for file in path.iterdir() if file.suffix in (".mcap", ".db3")]
    for opened in (path, *files):  # the folder, and the file alone
        with Bag(opened) as bag:
            assert bag.count == 6 * COUNT
            assert bag.duration == pytest.approx((COUNT - 1) * INTERVAL / 1e9)
            assert bag.topics["/left/image_rect"].count == COUNT
            camera = StereoBag(bag, choose_topics(bag, StereoTopics()))
            found = list(camera.frames())
        assert camera.skipped == [] and camera.unpaired == {"left": [], "right": []}
        for ours, theirs in zip(frames, found, strict=True):
            assert ours.stamp == theirs.stamp and theirs.camera == "left_optical"
            for part in ("left", "right", "disparity", "pose"):
                np.testing.assert_array_equal(getattr(ours, part), getattr(theirs, part), part)
            assert ours.calibration() == theirs.calibration()


def test_an_earlier_bag_is_replaced_but_nothing_else(frames, tmp_path):
    path = tmp_path / "wall.mcap"
    writer.write_bag(made_world.sequence(frames), path)
    writer.write_bag(made_world.sequence(frames[:2]), path)
    with Bag(path) as bag:
        assert bag.topics["/left/image_rect"].count == 2
    (tmp_path / "mine").mkdir()
    with pytest.raises(ValueError, match="is no bag's folder"):
        writer.write_bag(made_world.sequence(frames), tmp_path / "mine")

    def broken():
        yield frames[0]
        raise ValueError("no more")

    sequence = made_world.sequence(frames)
    sequence.frames = broken()
    with pytest.raises(ValueError, match="no more"):
        writer.write_bag(sequence, tmp_path / "half.mcap")
    assert not (tmp_path / "half.mcap").exists()


def test_pairs_are_each_others_nearest_stamps():
    left, right = np.array([0, 100, 200, 300]), np.array([101, 203, 290, 900])
    assert pair_stamps(left, right) == []
    assert pair_stamps(left, right, 3) == [(1, 0), (2, 1)]
    assert pair_stamps(left, right, 10) == [(1, 0), (2, 1), (3, 2)]
    assert pair_stamps(left, left[::-1]) == [(0, 3), (1, 2), (2, 1), (3, 0)]
    assert pair_stamps(np.array([5, 5]), np.array([5, 5])) == [(0, 0)]  # each image once
    assert pair_stamps(left, np.zeros(0, np.int64)) == []


def test_a_made_wall_is_measured_right(bag_path, tmp_path):
    result = evaluate(bag_path, tmp_path)
    metrics = {name: value["mean"] for name, value in result["methods"]["tiny"].items()}
    assert metrics["stereo_accuracy"] > 0.97 and metrics["stereo_error_px"] < 0.1
    assert metrics["disparity_accuracy"] > 0.9 and metrics["epipolar_error_px"] < 0.3
    assert metrics["disparity_roughness_px"] < 0.1 and metrics["track_survival"] > 0.6
    assert metrics["track_flow_accuracy"] > 0.95 and metrics["temporal_repeatability"] > 0.8
    assert result["methods"]["tiny"]["stereo_accuracy"]["count"] == COUNT
    assert result["methods"]["tiny"]["track_survival"]["count"] == COUNT - 1
    assert result["pairs"]["paired"] == COUNT and result["pairs"]["skipped"] == []


def test_the_axes_of_true_poses_can_be_given(bag_path, tmp_path, capsys):
    accuracy = {}
    for axes in ("optical", "body"):
        out = tmp_path / axes
        command = ["evaluate", "bag", str(bag_path), "--out", str(out), "--pose-axes", axes]
        assert main([*command, "--backend", "torch", "--max-keypoints", "200"]) == 0
        assert f"true poses: /ground_truth/pose, {axes} axes" in capsys.readouterr().out
        found = json.loads((out / "metrics.json").read_text())["methods"]["tiny"]
        accuracy[axes] = found["track_accuracy"]["mean"]
    assert accuracy["optical"] > 0.9 and accuracy["body"] < 0.5


def test_worse_pairs_are_measured_worse(frames, tmp_path):
    low = [replace(f, right=np.roll(f.right, 5, axis=0)) for f in frames[:2]]
    false = [replace(f, disparity=f.disparity + 8) for f in frames[:2]]
    found = {}
    for name, changed in (("low", low), ("false", false)):
        path = write(tmp_path / name, messages_of(changed))
        methods = evaluate(path, tmp_path)["methods"]["tiny"]
        found[name] = {n: v["mean"] for n, v in methods.items()}
    # Rows off by 5 px: nothing that the front end may match, and the offset is told.
    assert found["low"]["row_offset_px"] == pytest.approx(5, abs=0.3)
    assert found["low"]["matching_accuracy"] < 0.1 and found["low"]["matched_share"] < 0.3
    assert found["false"]["stereo_accuracy"] < 0.1 and found["false"]["matching_accuracy"] > 0.9


def test_results_that_are_worth_nothing_are_warned_of(frames, bag_path, tmp_path, capsys):
    assert evaluate(bag_path, tmp_path)["health"] == {"tiny": []}
    swapped = [replace(f, left=f.right, right=f.left) for f in frames]
    path = tmp_path / "swapped.mcap"
    writer.write_bag(made_world.sequence(swapped), path)
    assert main(["evaluate", "bag", str(path), "--out", str(tmp_path / "out"), *ARGUMENTS]) == 0
    result = json.loads((tmp_path / "out" / "metrics.json").read_text())
    (found,) = result["health"]["tiny"]
    assert (found["cause"], found["share"]) == ("swapped", 1.0)
    assert "left and right are swapped" in capsys.readouterr().out


def test_bits_in_use_are_found_or_given(frames, tmp_path):
    wide = messages_of(frames)
    for topic, _, _, message in wide:
        if "image" in topic:
            pixels = np.frombuffer(message.data, np.uint8).astype("<u2") * 4
            message.data, message.step = pixels.view(np.uint8), 2 * message.step
            message.encoding = "mono16" if "left" in topic else "16UC1"
    with Bag(write(tmp_path / "bag", wide)) as bag:
        topics = choose_topics(bag, StereoTopics())
        images = [
            (f.left, f.right) for f in StereoBag(bag, topics, Reading(bit_depth="10")).frames()
        ]
        assert len(images) == COUNT
        for pair, frame in zip(images, frames, strict=True):
            for got, sent in zip(pair, (frame.left, frame.right), strict=True):
                assert np.abs(got.astype(int) - sent).max() <= 1
        camera = StereoBag(bag, topics)
        assert not list(camera.frames())
        assert "16UC1 is usually depth" in camera.skipped[0]


def test_what_cannot_be_used_is_counted_and_named(frames, tmp_path):
    messages = messages_of(frames)
    stamps = [f.stamp for f in frames]
    by = {(topic, time): i for i, (topic, _, time, _) in enumerate(messages)}
    small = messages[by["/ground_truth/disparity", stamps[1]]][3]
    made = writer._Messages()
    small.image = made.image(small.header, np.ones((20, 30), np.float32), "32FC1")
    bad = messages[by["/left/image_rect", stamps[2]]][3]
    bad.encoding = "nonsense"
    del messages[by["/right/image_rect", stamps[3]]]
    messages += [("/left/image_rect", reader.IMAGE, stamps[3] + 1, b"\0\1\0\0")]
    result = evaluate(write(tmp_path / "bag", messages), tmp_path)
    pairs = result["pairs"]
    assert "/left/image_rect, recorded at" in pairs["skipped"].pop(0)
    assert pairs["images"] == {"left": 4, "right": 3} and pairs["paired"] == 3
    assert pairs["unpaired"] == {"left": [stamp_text(stamps[3])], "right": []}
    assert pairs["processed"] == {"tiny": 2}
    assert len(pairs["skipped"]) == 2
    assert (
        "without ground truth: the disparity map is 30x20, the image 192x144" in pairs["skipped"][0]
    )
    assert "nonsense" in pairs["skipped"][1]
    assert result["methods"]["tiny"]["stereo_accuracy"]["count"] == 1


def test_compressed_images_are_read(frames, tmp_path):
    made, messages = writer._Messages(), []
    for frame in frames[:2]:
        for side in ("left", "right"):
            data = cv2.imencode(".png", getattr(frame, side))[1].reshape(-1)
            message = made.type[reader.COMPRESSED](made.header(frame.stamp, side), "png", data)
            messages.append(
                (f"/{side}/image_rect/compressed", reader.COMPRESSED, frame.stamp, message)
            )
            info = made.camera_info(made.header(frame.stamp, side), frame.cameras[side == "right"])
            messages.append(
                (f"/{side}/image_rect/camera_info", reader.CAMERA_INFO, frame.stamp, info)
            )
    infos = {"left_info": "/left/image_rect/camera_info",
             "right_info": "/right/image_rect/camera_info"}  # fmt: skip
    with Bag(write(tmp_path / "bag", messages)) as bag:
        topics = choose_topics(bag, StereoTopics(**infos))
        assert topics.left == "/left/image_rect/compressed"
        found = list(StereoBag(bag, topics).frames())
    np.testing.assert_array_equal(found[1].left, frames[1].left)
    assert found[1].calibration() == frames[1].calibration()


def test_raw_images_are_refused_unless_said_to_be_raw(frames, tmp_path):
    lens = [replace(c, d=np.array([-0.2, 0.05, 0, 0, 0])) for c in frames[0].cameras]
    size = (WIDTH, HEIGHT)
    maps = cv2.initInverseRectificationMap(
        lens[0].k, lens[0].d, np.eye(3), lens[0].k, size, cv2.CV_32FC1
    )
    bent = [
        replace(
            f,
            cameras=tuple(lens),
            **{s: cv2.remap(getattr(f, s), *maps, cv2.INTER_LINEAR) for s in ("left", "right")},
        )
        for f in frames[:2]
    ]
    path = write(tmp_path / "bag", messages_of(bent, "image_raw"))
    with pytest.raises(ValueError, match=r"/left/image_raw is not rectified.*--raw"):
        evaluate(path, tmp_path)
    metrics = evaluate(path, tmp_path, raw=True)["methods"]["tiny"]
    assert metrics["stereo_accuracy"]["mean"] > 0.9
    assert metrics["stereo_error_px"]["mean"] < 0.3
    assert 0 < metrics["sigma_ratio"]["mean"] < 1 and metrics["sigma_within_2"]["mean"] > 0.85
    assert metrics["confidence_error"]["mean"] < 0.1
    odd = [replace(f, cameras=tuple(replace(c, model="odd") for c in f.cameras)) for f in bent]
    path = write(tmp_path / "odd", messages_of(odd, "image_raw"))
    with pytest.raises(ValueError, match=r"no pair .* usable: .*not rectified: .*'odd'"):
        evaluate(path, tmp_path, raw=True)


def test_runs_that_differ_are_told(bag_path):
    one = Run(rows={1: {"a": 1.0, "track_survival": 0.5, "latency_ms": 3.0}}, previous={1: 0})
    same = Run(rows={1: {"a": 1.0, "track_survival": 0.5, "latency_ms": 9.0}}, previous={1: 0})
    assert agreement(one, same) == {"pairs": 1, "values": 2, "differing": []}
    other = Run(rows={1: {"a": 1.0 + 1e-16 + 2e-16, "track_survival": 0.4}, 2: {"a": 0}})
    told = agreement(one, other)  # another pair before: its temporal metrics are not comparable
    assert told["values"] == 1
    assert told["differing"] == [[stamp_text(1), "a", 1.0, 1.0000000000000002]]
    live = {"agreement": told, "dropped": ["7.0"], "rate": 1.0, "processed": 1, "node": {},
            "of_other_pairs": []}  # fmt: skip
    assert any("differ in 1 of 1" in line for line in live_lines(live))
    assert any("1 pairs dropped: 7.0" in line for line in live_lines(live))


def test_live_and_offline_agree_to_the_last_digit(frames, tmp_path, capsys):
    other = [
        replace(f, left=f.left[:120, :160], right=f.right[:120, :160], disparity=None,
                cameras=None, stamp=f.stamp + 2 * 10**9, camera="other")
        for f in frames[:1]
    ]  # fmt: skip
    messages = messages_of(frames[:3]) + messages_of(other)
    del messages[[m[:3:2] for m in messages].index(("/right/image_rect", frames[1].stamp))]
    path = write(tmp_path / "bag.mcap", messages)
    out = tmp_path / "out"
    status = main(
        ["evaluate", "bag", str(path), "--live", "--rate", "0.5", "--out", str(out), *ARGUMENTS]
    )
    words = capsys.readouterr()
    assert status == 0, words.err
    result = json.loads((out / "metrics.json").read_text())
    live = result["live"]
    assert live["agreement"]["differing"] == []
    assert live["agreement"]["pairs"] == 3 == live["processed"]
    assert live["dropped"] == live["of_other_pairs"] == []
    assert live["agreement"]["values"] > 3 * 12
    assert result["pairs"]["unpaired"]["left"] == [stamp_text(frames[1].stamp)]
    assert live["node"]["received"] == "7" and live["node"]["processed"] == "6"
    offline, played = result["methods"].values()
    assert offline["stereo_accuracy"] == played["stereo_accuracy"]
    assert all(ms > 0 for ms in played["latency_ms"]["per_scene"].values())
    report = (out / "report.html").read_text()
    assert "agree to the last digit" in report and "data:image" in report


def lines_of(capsys) -> list[str]:
    words = capsys.readouterr().err.strip().splitlines()
    return [line for line in words if line]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "does not exist"),
        (
            ("--left", "/nowhere", "--right", "/right/image_rect"),
            "has no topic /nowhere; it has /gr",
        ),
        (
            ("--left", "/left/camera_info", "--right", "/right/image_rect"),
            "is sensor_msgs/msg/Camer",
        ),
        (("--left", "/left/image_rect"), "give both image topics"),
        (("--gt", "/ground_truth/pose"), "not stereo_msgs/msg/DisparityImage"),
        (("--poses", "/left/image_rect"), "/left/image_rect is sensor_msgs/msg/Image, not"),
        (("--features", "/left/image_rect"), "not kp_msgs/msg/StereoFeatures"),
        (("--features", "/f", "--live"), "either --features or --live"),
        (("--model", "none_such"), "none_such"),
    ],
)
def test_wrong_input_ends_in_one_line(bag_path, tmp_path, capsys, arguments, words):
    path = bag_path if arguments else tmp_path / "none.mcap"
    command = ["evaluate", "bag", str(path), *arguments, "--out", str(tmp_path / "out")]
    assert main(command) == 1
    lines = lines_of(capsys)
    assert len(lines) == 1 and words in lines[0]


@pytest.mark.parametrize("kept", [0, 5, 3000])
@pytest.mark.parametrize("suffix", [".mcap", ".db3"])
def test_a_bag_of_which_nothing_is_left_ends_in_one_line(frames, tmp_path, capsys, kept, suffix):
    path = tmp_path / f"wall{suffix}"
    writer.write_bag(made_world.sequence(frames), path)
    file = next(file for file in path.iterdir() if file.suffix == suffix)
    file.write_bytes(file.read_bytes()[:kept])
    for opened in (path, file):
        assert main(["evaluate", "bag", str(opened), "--out", str(tmp_path / "out")]) == 1
        lines = lines_of(capsys)
        assert len(lines) == 1 and ("cannot be read as a bag" in lines[0] or "is cut" in lines[0])


def test_stamps_that_never_meet_are_told(frames, tmp_path):
    messages = messages_of(frames)
    for topic, _, _, message in messages:
        if topic == "/right/image_rect":
            message.header.stamp.nanosec += 2_000_000
    path = write(tmp_path / "bag", messages)
    with pytest.raises(ValueError, match=r"none of 4 images of /left.*--slop"):
        evaluate(path, tmp_path)
    assert evaluate(path, tmp_path, slop=0.005)["pairs"]["paired"] == COUNT


def test_info_says_what_is_inside(bag_path, tmp_path, capsys):
    assert main(["bag", "info", str(bag_path), "--json", str(tmp_path / "info.json")]) == 0
    shown = capsys.readouterr().out
    assert "/left/image_rect" in shown and "10.00" in shown
    report = json.loads((tmp_path / "info.json").read_text())
    assert report["messages"] == 6 * COUNT and report["topics"][0]["hz"] == pytest.approx(10)
    (tmp_path / "empty").mkdir()
    assert main(["bag", "info", str(tmp_path / "empty")]) == 1
    assert "has neither metadata.yaml nor a .mcap" in capsys.readouterr().err
