"""Callbacks and settings of Ray Train's controller for workers that join and leave a run.

Owns: `CheckpointRequester`, which asks the workers for a checkpoint before Ray stops them; Ray's polling intervals.
Does not know: training, how the workers save (train/watch/guard.py), who starts the controller (training.py).

    more free resources         Ray decides -> SAVE, wait for the checkpoint -> Ray stops the workers and starts as many as fit
    a node will be preempted    Ray's watcher -> MOVE, the workers save and leave -> Ray starts them on the other nodes
    a worker or node is lost    no request is possible: Ray starts as many as fit from the newest checkpoint, or waits for resources
"""

import os
import time
from pathlib import Path
from typing import Any

from ray.exceptions import RayActorError
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback

from pi0fm.train.watch.requests import RunRequest, write_request

SECONDS_FOR_A_CHECKPOINT, SECONDS_BETWEEN_LOOKS = 300.0, 0.2
# Ray reads these when `fit` is called; those already set are kept. Ray's defaults are 2 s, 60 s and 5 s: a run that lost a node waits the
# second for a placement on that node, until the cluster has noticed the loss.
SHORT_INTERVALS = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "5",
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",
}
# Where this process started Ray, on this machine without a dashboard: nothing drains that node or scrapes those metrics, and each poll
# takes processor time from the workers.
SINGLE_MACHINE = {"RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0", "RAY_TRAIN_METRICS_ENABLED": "0", "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1"}


def shorten_ray_intervals(alone: bool) -> None:
    """Set the environment variables that `fit` passes to its controller and workers. alone: this process started Ray, on this machine."""
    for name, value in (SHORT_INTERVALS | SINGLE_MACHINE if alone else SHORT_INTERVALS).items():
        os.environ.setdefault(name, value)


def preempted(reason: str) -> RayActorError:
    """Build the error that a worker raises to leave a node before its end: Ray starts it elsewhere and counts no failure."""
    return RayActorError(error_msg=reason, preempted=True)


class CheckpointRequester(ControllerCallback, WorkerGroupCallback):  # type: ignore[misc]
    """Callback in Ray Train's controller that requests a checkpoint and blocks the controller's thread until the workers have saved."""

    def __init__(self, output_dir: Path) -> None:
        self._output_dir, self._training, self._move_requested = output_dir, False, False

    def after_worker_group_training_start(self, worker_group: Any) -> None:
        """Handle the start of the workers."""
        self._training, self._move_requested = True, False

    def after_worker_group_shutdown(self, worker_group_context: Any) -> None:
        """Handle the end of the workers."""
        self._training = False

    def before_controller_execute_failure_decision(self, failure_decision: Any) -> None:
        """Handle a failed worker: no worker is left to ask."""
        self._training = False

    def after_worker_group_poll_status(self, worker_group_status: Any) -> None:
        """Request MOVE when a poll of the workers reports a preemption."""
        if not self._move_requested and self._training and worker_group_status.get_preemption_info() is not None:
            self._move_requested = True
            write_request(self._output_dir, RunRequest.MOVE)

    def before_controller_execute_resize_decision(self, resize_decision: Any) -> None:
        """Request SAVE and wait for the checkpoint before Ray changes the number of workers."""
        if not self._training:
            return
        asked, deadline = write_request(self._output_dir, RunRequest.SAVE), time.monotonic() + SECONDS_FOR_A_CHECKPOINT
        while asked.exists() and time.monotonic() < deadline:
            time.sleep(SECONDS_BETWEEN_LOOKS)
        asked.unlink(missing_ok=True)
