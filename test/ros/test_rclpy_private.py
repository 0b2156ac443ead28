"""The private names of rclpy that kp_frontend relies on. Fails when a new rclpy changes them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import rclpy
from conftest import OTHER_DOMAIN
from lifecycle_msgs.msg import Transition
from rclpy.context import Context
from rclpy.lifecycle import LifecycleNode, TransitionCallbackReturn
from std_msgs.msg import Header

from kp_frontend.ros.rclpy_private import (
    RCLError,
    SafeLifecycleNode,
    UnknownROSArgsError,
    given_parameters,
)


@pytest.fixture
def context() -> Iterator[Context]:
    context = Context()
    rclpy.init(context=context, domain_id=OTHER_DOMAIN)
    yield context
    context.try_shutdown()


def test_publishing_after_the_context_has_ended_raises_rcl_error(context):
    node = rclpy.create_node("ended", context=context)
    publisher = node.create_publisher(Header, "topic", 1)
    context.shutdown()
    with pytest.raises(RCLError):
        publisher.publish(Header())


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--ros-args", "-p", "no_value"], RCLError),
        (["--ros-args", "no_such_option"], UnknownROSArgsError),
    ],
)
def test_bad_arguments_raise_the_named_errors(arguments, error):
    with pytest.raises(error):
        rclpy.init(args=["program", *arguments], context=Context())


def test_the_given_parameters_of_a_node_are_listed(context):
    overrides = ["--ros-args", "-p", "a.b:=1", "-p", "c:=x"]
    node = rclpy.create_node("given", context=context, cli_args=overrides)
    node.declare_parameter("c", "y")
    assert sorted(given_parameters(node)) == ["a.b", "c"]


def test_an_impossible_transition_is_refused_and_others_are_made(context):
    plain = LifecycleNode("plain", context=context)
    with pytest.raises(RCLError):  # why the override exists
        plain.trigger_activate()

    class Configured(SafeLifecycleNode):
        def on_configure(self, state):
            return TransitionCallbackReturn.SUCCESS

    node = Configured("safe", context=context)
    assert node.trigger_activate() == TransitionCallbackReturn.FAILURE
    assert node.trigger_configure() == TransitionCallbackReturn.SUCCESS
    offered = [known[0] for known in node._state_machine.available_transitions]
    assert Transition.TRANSITION_ACTIVATE in offered
    assert node.trigger_activate() == TransitionCallbackReturn.SUCCESS


def test_an_error_in_a_transition_is_logged(context, capfd):
    class Broken(SafeLifecycleNode):
        def on_configure(self, state):
            raise TypeError("out of luck")

    node = Broken("broken", context=context)
    assert node.trigger_configure() == TransitionCallbackReturn.ERROR
    assert "TypeError: out of luck" in capfd.readouterr().err
