"""The private names of rclpy that the node needs. `test_rclpy_private.py` checks each of them.

`RCLError`, `UnknownROSArgsError`: rclpy exports them only from its compiled module. Publishing
raises `RCLError` after the context has ended. `rclpy.init` raises both for command-line arguments
that it cannot parse.

`LifecycleNode.__change_state`, `._state_machine`: rclpy has no public way to refuse a transition.
"""

from __future__ import annotations

from rclpy._rclpy_pybind11 import RCLError, UnknownROSArgsError
from rclpy.lifecycle import LifecycleNode, TransitionCallbackReturn

__all__ = ["RCLError", "SafeLifecycleNode", "UnknownROSArgsError"]

_CHANGE_STATE = "_LifecycleNodeMixin__change_state"  # as Python mangles the name


class SafeLifecycleNode(LifecycleNode):
    """A managed node that refuses a transition its present state does not have.

    rclpy's own `__change_state` raises in this case. The exception leaves the service callback and
    ends the node.
    """

    def _LifecycleNodeMixin__change_state(self, transition_id: int) -> TransitionCallbackReturn:
        if transition_id not in [known[0] for known in self._state_machine.available_transitions]:
            state = self._state_machine.current_state[1]
            self.get_logger().error(f"transition {transition_id} is not possible while {state}")
            return TransitionCallbackReturn.FAILURE
        return getattr(super(), _CHANGE_STATE)(transition_id)
