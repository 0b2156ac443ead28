"""The ROS 2 node: pairs the images of a stereo camera and publishes their features.

It is a managed node: `configure` loads and warms up the engine, `activate` starts the stream. The
executor's thread pairs and decodes messages and puts the newest pair into a queue of length one.
A worker thread takes it from there, computes and publishes. A newer pair replaces a waiting one,
which is counted. So latency stays bounded if images arrive too fast, and the next pair is decoded
while the current one is computed.
"""

from __future__ import annotations

import gc
import sys
import time

from diagnostic_msgs.msg import DiagnosticArray
from kp_msgs.msg import StereoFeatures as StereoFeaturesMsg
from rclpy.clock import Clock, ClockType
from rclpy.lifecycle import LifecycleState, TransitionCallbackReturn

from kp_frontend.encodings import GreyConverter
from kp_frontend.frontend import StereoFrontend
from kp_frontend.health import HealthMonitor
from kp_frontend.ros.camera_infos import CameraInfos
from kp_frontend.ros.diagnostics import SILENCE, Diagnosis, Figures, Health, LevelLog
from kp_frontend.ros.engine import SupervisedEngine
from kp_frontend.ros.image_counters import ImageCounters
from kp_frontend.ros.log_handler import RosLogHandler
from kp_frontend.ros.messages import ImageMessage
from kp_frontend.ros.pair_worker import Pair, PairWorker
from kp_frontend.ros.parameters import Parameters
from kp_frontend.ros.rclpy_private import (
    SafeLifecycleNode,
)
from kp_frontend.ros.run_node import run_node
from kp_frontend.ros.stereo_input import SIDES, StereoInput
from kp_frontend.ros.visualisation import VisualisationPublishers


class StereoNode(SafeLifecycleNode):
    """Subscribes to a stereo camera, publishes `~/features` and `/diagnostics`.

    Raises:
        ValueError, rclpy.exceptions.ParameterException: a parameter is invalid.
    """

    def __init__(self) -> None:
        super().__init__("kp_frontend")
        self.parameters = Parameters(self, self._parameters_changed)
        self.problem = ""  # reason if the node could not be configured
        config = self.parameters.node
        self.grey = GreyConverter(config.bit_depth, self.get_logger().info)
        self.infos = CameraInfos(config.input == "raw", config.baseline)
        self.counters = ImageCounters(lambda: self.input.waiting() if self.input else 0)
        self.figures = Figures()
        self.diagnosis = Diagnosis(self.get_fully_qualified_name(), LevelLog(self.get_logger()))
        self.health = HealthMonitor()
        self.engine: SupervisedEngine | None = None
        self.input: StereoInput | None = None
        self.worker: PairWorker | None = None
        self.visualisation: VisualisationPublishers | None = None
        self._log_handler = RosLogHandler(self.get_logger())
        self._log_handler.install()
        self._was_active = False
        self._activated = self._last_pair = time.monotonic()
        self._epoch = 0
        self._last_bad = ""
        self.diagnostics_publisher = self.create_publisher(DiagnosticArray, "/diagnostics", 5)
        # A steady clock, so that diagnostics continue in a paused simulation.
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
        # Exclude the objects of torch from garbage collection. A collection during the stream or
        # at the end would take tenths of a second.
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
        """Subscribe to the images and publish features."""
        if self.engine is None:
            return TransitionCallbackReturn.FAILURE
        self._was_active = True
        self.engine.frontend.reset()
        self.figures.clear()
        topics = [self.resolve_topic_name(f"{side}/image") for side in SIDES]
        self.health = HealthMonitor(topics, self.grey)
        self.visualisation = VisualisationPublishers(self, lambda: self.parameters.node, self._warn)
        self.worker = PairWorker(
            self.engine,
            self.parameters,
            self.infos,
            self.counters,
            self.figures,
            self.health,
            self.features_publisher,
            self.visualisation,
            self._warn,
            self._on_bad,
        )
        self._activated = self._last_pair = time.monotonic()
        self.input = StereoInput(
            self,
            self.parameters.node,
            self.counters,
            self.infos,
            self._on_pair,
            self._on_jump,
            self._on_bad,
        )
        return TransitionCallbackReturn.SUCCESS

    def on_deactivate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Stop the stream and keep the engine."""
        self._stop_stream()
        return TransitionCallbackReturn.SUCCESS

    def on_cleanup(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Release the engine."""
        self._drop_engine()
        return TransitionCallbackReturn.SUCCESS

    def on_shutdown(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Stop the stream and release the engine."""
        self._stop_stream()
        self._drop_engine()
        return TransitionCallbackReturn.SUCCESS

    def on_error(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Return to the unconfigured state after an error in a transition."""
        return self.on_shutdown(state)

    def _stop_stream(self) -> None:
        if self.input is not None:
            self.input.close()
        if self.worker is not None:
            self.worker.stop()
            self.worker = None
        self.input = None
        if self.visualisation is not None:
            self.visualisation.close()
            self.visualisation = None

    def _drop_engine(self) -> None:
        if self.engine is not None:
            self.destroy_publisher(self.features_publisher)
            self.engine = None

    def stop(self) -> None:
        """End the stream and, if there was one, print the image counters."""
        self._stop_stream()
        self._log_handler.close()
        if not self._was_active:
            return
        counts = self.counters.snapshot()
        print("images: " + ", ".join(f"{k} {v}" for k, v in counts.items()), file=sys.stderr)

    # Input, in the executor's thread

    def _on_pair(self, left: ImageMessage, right: ImageMessage) -> None:
        self._last_pair = time.monotonic()
        try:
            first, second = self.grey.images((left, right), SIDES)
        except ValueError as error:
            self.counters.dropped("bad")
            self._on_bad(f"pair dropped: {error}")
            return
        came, decoded = self._last_pair, time.monotonic()
        if self.worker is not None:
            self.worker.put(Pair((left, right), (first, second), came, decoded, self._epoch))

    def _on_jump(self, words: str) -> None:
        self._epoch += 1
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
        status = self.diagnosis.status(now, self.counters.snapshot(), self.figures.values(), health)
        message = DiagnosticArray(status=[status])
        message.header.stamp = self.get_clock().now().to_msg()
        self.diagnostics_publisher.publish(message)


def main(args: list[str] | None = None) -> int:
    """Run the node until it is interrupted; exit status 1 if it cannot start."""
    return run_node("kp_frontend", StereoNode, StereoNode.stop, args, _autostart)


def _autostart(node: StereoNode) -> None:
    if not node.parameters.node.autostart:
        return
    for step in (node.trigger_configure, node.trigger_activate):
        if step() != TransitionCallbackReturn.SUCCESS:
            raise ValueError(node.problem or "the log tells the error")


if __name__ == "__main__":
    sys.exit(main())
