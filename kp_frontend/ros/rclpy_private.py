"""The private names of rclpy that the node needs. `test_rclpy_private.py` checks each of them.

`RCLError`, `UnknownROSArgsError`: rclpy exports them only from its compiled module. Publishing
raises `RCLError` after the context has ended. `rclpy.init` raises both for command-line arguments
that it cannot parse.

`Node._parameter_overrides`: rclpy has no public way to list the parameters that a node was given.

`LifecycleNode.__change_state`, `._state_machine`: rclpy has no public way to refuse a transition.
`.__register_callback`: nor to log an exception of its callback.
"""

from __future__ import annotations

import functools
import traceback
from collections.abc import Callable

from rclpy._rclpy_pybind11 import RCLError, UnknownROSArgsError
from rclpy.lifecycle import LifecycleNode, LifecycleState, TransitionCallbackReturn
from rclpy.node import Node

__all__ = ["RCLError", "SafeLifecycleNode", "UnknownROSArgsError", "given_parameters"]

Transition = Callable[[LifecycleState], TransitionCallbackReturn]

# As Python mangles the names.
_CHANGE_STATE = "_LifecycleNodeMixin__change_state"
_REGISTER_CALLBACK = "_LifecycleNodeMixin__register_callback"


def given_parameters(node: Node) -> list[str]:
    """Names of the parameters that a node was given at start, declared or not."""
    return list(node._parameter_overrides)


class SafeLifecycleNode(LifecycleNode):
    """A managed node that refuses a transition its present state does not have, and logs errors.

    rclpy's own `__change_state` raises in this case. The exception leaves the service callback and
    ends the node. Exceptions in the callbacks of transitions are lost in rclpy.
    """

    def _LifecycleNodeMixin__register_callback(self, state_id: int, callback: Transition) -> bool:
        @functools.wraps(callback)
        def logged(state: LifecycleState) -> TransitionCallbackReturn:
            try:
                return callback(state)
            except Exception:
                self.get_logger().error(traceback.format_exc())
                raise

        return getattr(super(), _REGISTER_CALLBACK)(state_id, logged)

    def _LifecycleNodeMixin__change_state(self, transition_id: int) -> TransitionCallbackReturn:
        if transition_id not in [known[0] for known in self._state_machine.available_transitions]:
            state = self._state_machine.current_state[1]
            self.get_logger().error(f"transition {transition_id} is not possible while {state}")
            return TransitionCallbackReturn.FAILURE
        return getattr(super(), _CHANGE_STATE)(transition_id)
