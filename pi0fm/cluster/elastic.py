"""Ray Train's controller, told what a run of pi0fm needs when workers come and go.

Owns: `Foresight`, which asks the workers for a checkpoint before Ray stops them; how quickly Ray looks; how often it may start them again.
Does not know: training, how the workers save (train/watch/guard.py), who starts the controller (training.py).

    more room in the cluster    Ray decides -> SAVE, waits for the checkpoint -> stops the workers, starts as many as fit
    a node is announced to go   Ray's watcher -> MOVE, the workers save and leave -> started again on the other nodes
    a worker or node is lost    nothing can be asked: the newest checkpoint; as many as fit are started, or Ray waits for room
"""

import os
import time
from pathlib import Path
from typing import Any

from ray.exceptions import RayActorError
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback

from pi0fm.train.watch.requests import Request, ask

SECONDS_FOR_A_CHECKPOINT, SECONDS_BETWEEN_LOOKS = 300.0, 0.2
# Ray reads these where `fit` is called; each is left as it is where it is set. Ray's own are 2 s, 60 s and 5 s: a run that lost a node
# waits the second one for a placement on that node, until the cluster knows that it is gone.
QUICK = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "5",
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",
}
# On the one machine where this process started Ray, without a dashboard: nothing drains that node or scrapes those metrics, and each
# look takes time from the workers on the same cores.
ALONE = {"RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0", "RAY_TRAIN_METRICS_ENABLED": "0", "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1"}


def look_quickly(alone: bool) -> None:
    """Set what `fit` hands to its controller and workers. alone: this process started Ray, on this machine."""
    for name, value in (QUICK | ALONE if alone else QUICK).items():
        os.environ.setdefault(name, value)


def preempted(reason: str) -> RayActorError:
    """What a worker raises that leaves a node before it goes: Ray starts it elsewhere, and counts no failure."""
    return RayActorError(error_msg=reason, preempted=True)


class Foresight(ControllerCallback, WorkerGroupCallback):  # type: ignore[misc]
    """In Ray Train's controller, whose thread waits while it saves; the workers are other processes."""

    def __init__(self, output_dir: Path) -> None:
        self._output_dir, self._trains, self._told = output_dir, False, False

    def after_worker_group_training_start(self, worker_group: Any) -> None:
        """Called when the workers have begun."""
        self._trains, self._told = True, False

    def after_worker_group_shutdown(self, worker_group_context: Any) -> None:
        """Called when they are gone."""
        self._trains = False

    def before_controller_execute_failure_decision(self, failure_decision: Any) -> None:
        """Called when one of them has failed: no worker is left to ask."""
        self._trains = False

    def after_worker_group_poll_status(self, worker_group_status: Any) -> None:
        """Called after each look at the workers."""
        if not self._told and self._trains and worker_group_status.get_preemption_info() is not None:
            self._told = True
            ask(self._output_dir, Request.MOVE)

    def before_controller_execute_resize_decision(self, resize_decision: Any) -> None:
        """Called before Ray stops the workers that there are, if any, to start another number of them."""
        if not self._trains:
            return
        asked, deadline = ask(self._output_dir, Request.SAVE), time.monotonic() + SECONDS_FOR_A_CHECKPOINT
        while asked.exists() and time.monotonic() < deadline:
            time.sleep(SECONDS_BETWEEN_LOOKS)
        asked.unlink(missing_ok=True)
