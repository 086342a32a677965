"""Faults inside Ray's wrapping: which are the user's to mend, which are Ray's, and that no restart is tried for the first kind.

Owns: `EndAtFaults`, the fault behind one of Ray's errors. Does not know: training.
"""

from typing import Any

from ray.exceptions import RayError
from ray.train import TrainingFailedError, UserCallback

from pi0fm_client.errors import ClusterError, Pi0fmError


class EndAtFaults(UserCallback):  # type: ignore[misc]
    """In Ray Train's controller: raise a worker's Pi0fmError there, which ends the run instead of starting its workers again."""

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Called with the errors of one look at the workers."""
        del run_context
        for error in worker_exceptions.values():
            if (fault := _fault_in(error)) is not None:
                raise fault


def explained(error: BaseException) -> BaseException:
    """The fault of ours inside an error of `fit`, a line for a failure of Ray itself, else the error, which is a bug's."""
    failures = list((getattr(error, "worker_failures", None) or {}).values())
    for candidate in (getattr(error, "controller_failure", None), *failures, error):
        if candidate is not None and (fault := _fault_in(candidate)) is not None:
            return fault
    ray_failed = [each for each in (*failures, error) if isinstance(each, RayError | ConnectionError)]
    if ray_failed and (not isinstance(error, TrainingFailedError) or len(ray_failed) == len(failures)):
        why = f"{type(ray_failed[0]).__name__}: {' '.join(str(ray_failed[0]).split()):.160}"
        return ClusterError(f"Ray must live as long as the run, found it failing ({why}); type the same command with --resume true")
    return error


def _fault_in(error: BaseException | None) -> Pi0fmError | None:
    """The worker's error, which Ray keeps as `cause` or `_base_exc`, sometimes wrapped twice."""
    for _ in range(5):
        if error is None or isinstance(error, Pi0fmError):
            return error
        error = getattr(error, "cause", None) or getattr(error, "_base_exc", None) or error.__cause__
    return None
