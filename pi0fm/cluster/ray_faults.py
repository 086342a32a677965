"""Classification of Ray's errors: faults that the user can fix, failures of Ray, and faults that end a run without a restart.

Owns: `EndAtFaults`, the fault inside one of Ray's errors. Does not know: training.
"""

import json
from pathlib import Path
from typing import Any

from ray.exceptions import RayActorError, RayError
from ray.train import TrainingFailedError, UserCallback

from pi0fm_client.errors import ClusterError, Pi0fmError


class EndAtFaults(UserCallback):  # type: ignore[misc]
    """Callback in Ray Train's controller that ends a run for a fault that no restart can fix.

    Such a fault is a worker's Pi0fmError, or more than `most` failures without a step between them: the loss of a node every hour does not
    end a run.
    """

    def __init__(self, output_dir: Path, most: int) -> None:
        self._output_dir, self._most = output_dir, most
        self._failures, self._reached = 0, -1

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Handle the errors of one poll of the workers, and raise the fault that ends the run."""
        del run_context
        for error in worker_exceptions.values():
            if (fault := _fault_in(error)) is not None:
                raise fault
        if any(isinstance(error, RayActorError) and error.preempted for error in worker_exceptions.values()):
            return
        reached = _last_step(self._output_dir / "metrics.jsonl")
        self._failures = self._failures + 1 if reached <= self._reached else 1
        self._reached = max(reached, self._reached)
        if self._failures > self._most:
            rank, error = min(worker_exceptions.items())
            if not isinstance(error, RayError):
                raise error  # a bug, with its traceback
            raise ClusterError(
                f"workers must complete a step between failures, found {self._failures} failures at step {self._reached} (worker {rank}: "
                f"{_short(error)}); fix the cause, then type the same command with --resume true, or raise --max_failures"
            )


def underlying_fault(error: BaseException) -> BaseException:
    """Find the Pi0fmError inside an error of `fit`; build a ClusterError for a failure of Ray; else return the error, which is a bug."""
    failures = list((getattr(error, "worker_failures", None) or {}).values())
    for candidate in (getattr(error, "controller_failure", None), *failures, error):
        if candidate is not None and (fault := _fault_in(candidate)) is not None:
            return fault
    if (bug := getattr(error, "controller_failure", None)) is not None and getattr(bug, "__notes__", None):
        return bug  # type: ignore[no-any-return]
    ray_failed = [each for each in (*failures, error) if isinstance(each, RayError | ConnectionError)]
    if ray_failed and (not isinstance(error, TrainingFailedError) or len(ray_failed) == len(failures)):
        why = f"{type(ray_failed[0]).__name__}: {_short(ray_failed[0])}"
        return ClusterError(f"Ray must live as long as the run, found it failing ({why}); type the same command with --resume true")
    return error


def _last_step(metrics: Path) -> int:
    """Step of the last complete line; read here, since metrics.py imports TensorBoard, which Ray's controller does not need."""
    try:
        whole = metrics.read_bytes()[-4096:].rpartition(b"\n")[0].rpartition(b"\n")[2]
        return int(json.loads(whole)["step"])
    except (OSError, ValueError, KeyError):
        return 0


def _short(error: BaseException) -> str:
    return f"{' '.join(str(error).split()) or type(error).__name__:.160}"


def _fault_in(error: BaseException | None) -> Pi0fmError | None:
    """Find a worker's Pi0fmError, which Ray keeps as `cause` or `_base_exc`, sometimes wrapped twice."""
    for _ in range(5):
        if error is None or isinstance(error, Pi0fmError):
            return error
        error = getattr(error, "cause", None) or getattr(error, "_base_exc", None) or error.__cause__
    return None
