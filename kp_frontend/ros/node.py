"""The ROS 2 node: pairs the images of a stereo camera and publishes their features.

A managed node. `configure` loads and warms up the engine, `activate` starts the stream. The
executor's thread pairs and decodes messages and leaves the newest pair in a slot; one worker thread
takes it from there, computes and publishes. A pair that is still in the slot when a newer one comes
is replaced and counted, so latency stays bounded when images come faster than they can be
processed, and decoding of the next pair overlaps with computing of the present one.
"""

from __future__ import annotations

import gc
import signal
import sys
import time

import rclpy
from diagnostic_msgs.msg import DiagnosticArray
from kp_msgs.msg import StereoFeatures as StereoFeaturesMsg
from rclpy.clock import Clock, ClockType
from rclpy.exceptions import ParameterException
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
from rclpy.lifecycle import LifecycleState, TransitionCallbackReturn

from kp_frontend.encodings import GreyConverter
from kp_frontend.frontend import StereoFrontend
from kp_frontend.health import HealthMonitor
from kp_frontend.ros.accounts import Accounts
from kp_frontend.ros.camera_infos import CameraInfos
from kp_frontend.ros.diagnostics import SILENCE, Diagnosis, Figures, Health, LevelLog
from kp_frontend.ros.engine import SupervisedEngine
from kp_frontend.ros.extras import Extras
from kp_frontend.ros.messages import ImageMessage
from kp_frontend.ros.pair_worker import Pair, PairWorker
from kp_frontend.ros.parameters import Parameters
from kp_frontend.ros.rclpy_private import (
    RCLError,
    SafeLifecycleNode,
    UnknownROSArgsError,
)
from kp_frontend.ros.stereo_input import SIDES, StereoInput

CANNOT_START = (
    ValueError,
    ParameterException,
    RCLError,
    UnknownROSArgsError,
)


class StereoNode(SafeLifecycleNode):
    """Subscribes to a stereo camera, publishes `~/features` and `/diagnostics`.

    Raises:
        ValueError, rclpy.exceptions.ParameterException: a parameter that cannot be used.
    """

    def __init__(self) -> None:
        super().__init__("kp_frontend")
        self.parameters = Parameters(self, self._parameters_changed)
        self.problem = ""  # why it could not be configured
        config = self.parameters.node
        self.grey = GreyConverter(config.bit_depth, self.get_logger().info)
        self.infos = CameraInfos(config.input == "raw", config.baseline)
        self.accounts = Accounts(lambda: self.input.waiting() if self.input else 0)
        self.figures = Figures()
        self.diagnosis = Diagnosis(self.get_fully_qualified_name(), LevelLog(self.get_logger()))
        self.health = HealthMonitor()
        self.engine: SupervisedEngine | None = None
        self.input: StereoInput | None = None
        self.worker: PairWorker | None = None
        self.extras: Extras | None = None
        self._was_active = False
        self._activated = self._last_pair = time.monotonic()
        self._era = 0
        self._last_bad = ""
        self.diagnostics_publisher = self.create_publisher(DiagnosticArray, "/diagnostics", 5)
        # Of a steady clock: a paused simulation needs its diagnostics too.
        clock = Clock(clock_type=ClockType.STEADY_TIME)
        self.create_timer(1.0, self._publish_diagnostics, clock=clock)

    # Life cycle, in the executor's thread

    def on_configure(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Load the weights, build the engine and run it once."""
        config, begin = self.parameters.node, time.perf_counter()
        try:
            frontend = StereoFrontend(self.parameters.frontend)
            frontend.warm_up(config.image_height, config.image_width, self.infos.raw)
        except ValueError as error:
            self.problem = str(error)
            if not config.autostart:
                self.get_logger().error(f"cannot be configured: {error}")
            return TransitionCallbackReturn.FAILURE
        # Collections during the stream, and the last one at the end, need not walk through all of
        # torch again: they would take tenths of a second.
        gc.collect()
        gc.freeze()
        self.engine = SupervisedEngine(frontend, self.get_logger().error)
        self.features_publisher = self.create_publisher(StereoFeaturesMsg, "~/features", 5)
        self.get_logger().info(
            f"{frontend.config.model} on {frontend.backend} is ready after "
            f"{time.perf_counter() - begin:.1f} s"
        )
        return TransitionCallbackReturn.SUCCESS

    def on_activate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Start the stream."""
        if self.engine is None:
            return TransitionCallbackReturn.FAILURE
        self._was_active = True
        self.engine.frontend.reset()
        self.figures.clear()
        topics = [self.resolve_topic_name(f"{side}/image") for side in SIDES]
        self.health = HealthMonitor(topics, self.grey)
        self.extras = Extras(self, lambda: self.parameters.node, self._warn)
        self.worker = PairWorker(
            self.engine,
            self.parameters,
            self.infos,
            self.accounts,
            self.figures,
            self.health,
            self.features_publisher,
            self.extras,
            self._warn,
            self._on_bad,
        )
        self._activated = self._last_pair = time.monotonic()
        self.input = StereoInput(
            self,
            self.parameters.node,
            self.accounts,
            self.infos,
            self._on_pair,
            self._on_jump,
            self._on_bad,
        )
        return TransitionCallbackReturn.SUCCESS

    def on_deactivate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Stop the stream; the engine stays."""
        self._stop_stream()
        return TransitionCallbackReturn.SUCCESS

    def on_cleanup(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Let the engine go."""
        self._drop_engine()
        return TransitionCallbackReturn.SUCCESS

    def on_shutdown(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Stop whatever runs."""
        self._stop_stream()
        self._drop_engine()
        return TransitionCallbackReturn.SUCCESS

    def on_error(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Back to unconfigured after an error in a transition."""
        return self.on_shutdown(state)

    def _stop_stream(self) -> None:
        if self.input is not None:
            self.input.close()
        if self.worker is not None:
            self.worker.stop()
            self.worker = None
        self.input = None
        if self.extras is not None:
            self.extras.close()
            self.extras = None

    def _drop_engine(self) -> None:
        if self.engine is not None:
            self.destroy_publisher(self.features_publisher)
            self.engine = None

    def stop(self) -> None:
        """End the stream and, if there was one, say where all images ended."""
        self._stop_stream()
        if not self._was_active:
            return
        counts = self.accounts.snapshot()
        print("images: " + ", ".join(f"{k} {v}" for k, v in counts.items()), file=sys.stderr)

    # Input, in the executor's thread

    def _on_pair(self, left: ImageMessage, right: ImageMessage) -> None:
        self._last_pair = time.monotonic()
        try:
            first, second = self.grey.images((left, right), SIDES)
        except ValueError as error:
            self.accounts.dropped("bad")
            self._on_bad(f"pair dropped: {error}")
            return
        came, decoded = self._last_pair, time.monotonic()
        if self.worker is not None:
            self.worker.put(Pair((left, right), (first, second), came, decoded, self._era))

    def _on_jump(self, words: str) -> None:
        self._era += 1
        self.get_logger().warning(words)

    def _on_bad(self, words: str) -> None:
        self._last_bad = words
        self._warn(words)

    def _warn(self, text: str) -> None:
        self.get_logger().warning(text, throttle_duration_sec=1.0)

    def _parameters_changed(self) -> None:
        if self.engine is not None and self.worker is None:
            self.engine.frontend.configure(self.parameters.frontend)

    # Diagnostics, in the executor's thread

    def _publish_diagnostics(self) -> None:
        now = time.monotonic()
        health = Health(active=self.input is not None)
        if self.engine is not None:
            health.backend = self.engine.frontend.backend
            health.asked_backend = self.engine.frontend.config.backend
            health.failures_in_a_row = self.engine.failures_in_a_row
            health.last_failure = self.engine.last_failure
        if self.input is not None:
            self.input.look_for_latched_infos()
            health.silent = now - self._last_pair
            if health.silent > SILENCE:
                health.why_silent = self.input.why_no_pairs()
            if now - self._activated > SILENCE:
                health.missing_infos = self.input.missing_infos()
            health.clock_problem = self.input.clock_problem()
            health.raw, health.last_bad = self.infos.raw, self._last_bad
            config = self.parameters.frontend
            self.health.depths = config.min_depth, config.max_depth
            health.findings = self.health.findings()
        if self.worker is not None:
            health.calibration_problem = self.worker.calibration_problem
        status = self.diagnosis.status(now, self.accounts.snapshot(), self.figures.values(), health)
        message = DiagnosticArray(status=[status])
        message.header.stamp = self.get_clock().now().to_msg()
        self.diagnostics_publisher.publish(message)


def main(args: list[str] | None = None) -> int:
    """Run the node until it is interrupted; exit status 1 if it cannot start."""
    # A terminated node ends as an interrupted one, also while it still builds its engine.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    node = None
    try:
        try:
            rclpy.init(args=args)
            node = StereoNode()
            if node.parameters.node.autostart:
                _autostart(node)
        except CANNOT_START as error:
            print(f"kp_frontend cannot start: {' '.join(str(error).split())}", file=sys.stderr)
            return 1
        executor = SingleThreadedExecutor()
        executor.add_node(node)
        executor.spin()
    except (KeyboardInterrupt, ExternalShutdownException):
        return 0
    except RCLError:
        if rclpy.ok():  # else it was interrupted in the middle of a callback
            raise
    finally:
        if node is not None:
            node.stop()
            node.destroy_node()
        rclpy.try_shutdown()
    return 0


def _autostart(node: StereoNode) -> None:
    for step in (node.trigger_configure, node.trigger_activate):
        if step() != TransitionCallbackReturn.SUCCESS:
            raise ValueError(node.problem or "an error in a transition")


if __name__ == "__main__":
    sys.exit(main())
