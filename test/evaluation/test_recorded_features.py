"""Features that were recorded: read back from messages, and evaluated."""

from __future__ import annotations

import numpy as np
import pytest
from made_bags import evaluate, messages_of, recorded_messages, write
from rosbags.rosbag2 import StoragePlugin, Writer
from rosbags.typesys.store import Typestore

from kp_frontend.ros.messages import stereo_features
from kp_training.evaluation.bags import reader
from kp_training.evaluation.bags.topics import StereoTopics


def test_a_message_gives_back_the_features(frames):
    messages, results = recorded_messages(frames[:1])
    store = reader.typestore()
    back = stereo_features(store.deserialize_cdr(messages[0][3], reader.FEATURES))
    for side in ("left", "right"):
        for name, value in vars(getattr(results[0], side)).items():
            found = getattr(getattr(back, side), name)
            np.testing.assert_array_equal(value, found, name)
            assert value.dtype == found.dtype
    for name in ("left_index", "disparity", "disparity_sigma", "similarity", "points"):
        np.testing.assert_array_equal(getattr(results[0], name), getattr(back, name), name)
    assert back.calibration == results[0].calibration
    assert back.stage_ms == pytest.approx(results[0].stage_ms)
    broken = store.deserialize_cdr(messages[0][3], reader.FEATURES)
    broken.left_index = broken.left_index + np.uint32(10_000)
    with pytest.raises(ValueError, match="do not fit"):
        stereo_features(broken)


def test_recorded_features_are_measured_like_computed_ones(frames, bag_path, tmp_path):
    offline = evaluate(bag_path, tmp_path)["methods"]["tiny"]
    messages, _ = recorded_messages(frames)
    with_images = write(tmp_path / "with", messages_of(frames) + messages)
    recorded = evaluate(with_images, tmp_path, StereoTopics(features="/f"))["methods"]["recorded"]
    alone = evaluate(write(tmp_path / "alone", messages), tmp_path)["methods"]["recorded"]
    for name in offline.keys() - {"latency_ms"}:
        assert recorded[name]["per_scene"] == offline[name]["per_scene"], name
    assert alone["track_survival"] == offline["track_survival"]
    assert "stereo_accuracy" not in alone and "temporal_repeatability" not in alone


def test_features_of_an_older_version_are_read(frames, tmp_path):
    """A bag whose definition and messages have no sigma, track_length and confidence."""
    new = reader.typestore()
    old, kinds = Typestore(), ("kp_msgs/msg/StereoFeatures", "kp_msgs/msg/Features")
    later = ("sigma", "track_length", "confidence")
    types = dict(new.fielddefs)
    for kind in kinds:
        constants, fields = types[kind]
        types[kind] = constants, [f for f in fields if f[0] not in later]
    old.register(types)
    whole, _ = recorded_messages(frames[:2])
    messages = []
    for topic, kind, time, raw in whole:
        message = new.deserialize_cdr(raw, kind)
        older = old.types[kind](
            **{
                name: old.types[kinds[1]](**{n: getattr(value, n) for n, _ in types[kinds[1]][1]})
                if name in ("left", "right")
                else value
                for name, _ in types[kind][1]
                for value in [getattr(message, name)]
            }
        )
        messages.append((topic, kind, time, bytes(old.serialize_cdr(older, kind))))
    path = tmp_path / "bag"
    with Writer(path, version=9, storage_plugin=StoragePlugin.MCAP) as writing:
        connection = writing.add_connection("/f", kinds[0], typestore=old)
        for _, _, time, raw in messages:
            writing.write(connection, time, raw)
    found = evaluate(path, tmp_path)
    assert len(found["scenes"]) == 2 and found["pairs"]["skipped"] == []
