"""Tests of the callbacks in Ray Train's controller: a checkpoint before workers are stopped, and faults that end a run."""

import json
import pickle
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
from ray.exceptions import RayActorError

from pi0fm import options, progress
from pi0fm.cluster import elastic, status_lines
from pi0fm.cluster.elastic import CheckpointRequester, preempted
from pi0fm.cluster.ray_faults import EndAtFaults, underlying_fault
from pi0fm.cluster.training_run import TrainingRun
from pi0fm.train.components import FULL, ParallelConfig
from pi0fm.train.watch.requests import RunRequest
from pi0fm_client.errors import ClusterError, ConfigError, DatasetError


def test_a_resize_waits_for_the_checkpoint_that_it_asked_for(tmp_path):
    told = CheckpointRequester(tmp_path)
    told.before_controller_execute_resize_decision(None)  # the first start: nobody is there to ask
    assert not list(tmp_path.iterdir())
    told.after_worker_group_training_start(None)
    asked, gone = tmp_path / RunRequest.SAVE.name, []

    def worker() -> None:
        while not asked.exists():
            time.sleep(0.01)
        time.sleep(0.3)
        gone.append(time.monotonic())
        asked.unlink()

    thread = threading.Thread(target=worker)
    thread.start()
    told.before_controller_execute_resize_decision(None)
    assert gone and time.monotonic() >= gone[0]
    thread.join()


def test_workers_that_died_or_do_not_answer_are_not_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(elastic, "SECONDS_FOR_A_CHECKPOINT", 0.3)
    told = CheckpointRequester(tmp_path)
    told.after_worker_group_training_start(None)
    told.before_controller_execute_resize_decision(None)
    assert not list(tmp_path.iterdir())  # taken back
    told.before_controller_execute_failure_decision(None)
    monkeypatch.setattr(elastic, "write_request", lambda *_: pytest.fail("nobody is there"))
    told.before_controller_execute_resize_decision(None)


def test_a_notice_is_passed_on_once_for_each_group_of_workers(tmp_path):
    told = CheckpointRequester(tmp_path)
    moved, notice = tmp_path / RunRequest.MOVE.name, SimpleNamespace(get_preemption_info=lambda: "node A goes")
    told.after_worker_group_training_start(None)
    told.after_worker_group_poll_status(SimpleNamespace(get_preemption_info=lambda: None))
    assert not moved.exists()
    told.after_worker_group_poll_status(notice)
    moved.unlink()
    told.after_worker_group_poll_status(notice)
    assert not moved.exists()
    told.after_worker_group_shutdown(None)
    told.after_worker_group_training_start(None)
    told.after_worker_group_poll_status(notice)
    assert moved.exists()


def test_the_error_of_a_worker_that_moves_is_one_that_ray_counts_apart():
    error = pickle.loads(pickle.dumps(preempted("left after step 3")))
    assert isinstance(error, RayActorError) and error.preempted and "left after step 3" in str(error)
    assert underlying_fault(error) is not error  # a line, should it ever end a run


@pytest.fixture
def failures(tmp_path):
    """`fail(step)`: a worker died when the metrics stood at `step`."""
    ends = EndAtFaults(tmp_path, 2)

    def fail(step: int, error: Exception | None = None) -> None:
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps({"step": n, "loss": 1.0}) + "\n" for n in range(1, step + 1)) + '{"st')
        ends.after_exception(None, {1: error or RayActorError(error_msg="The worker died\nunexpectedly")})

    return fail


def test_failures_with_progress_between_them_never_end_a_run(failures):
    for step in range(0, 40, 2):
        failures(step)


def test_failures_without_a_step_further_end_it_with_the_last_ones_cause(failures):
    failures(5)
    failures(3)  # it went on from a checkpoint, and got less far
    with pytest.raises(ClusterError, match=r"found 3 failures at step 5 \(worker 1: The worker died unexpectedly\).* --max_failures"):
        failures(5)


def test_a_fault_of_the_user_ends_it_at_once_a_bug_as_itself_and_a_move_never(failures):
    for _ in range(9):
        failures(5, preempted("left"))
    with pytest.raises(DatasetError, match="no such column"):
        failures(5, DatasetError("no such column"))
    failures(5, ValueError("shapes differ"))
    failures(5, ValueError("shapes differ"))
    with pytest.raises(ValueError, match="shapes differ"):
        failures(5, ValueError("shapes differ"))


@pytest.mark.parametrize(("given", "found"), [(0, (0, 0)), (1, (1, 1)), ("1", (1, 1)), ("1..8", (1, 8)), ("1..1", (1, 1))])
def test_workers_are_a_number_or_two(given, found):
    assert TrainingRun(num_workers=given).workers == found


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"num_workers": "many"}, "num_workers must be a number, or FEWEST..MOST, found 'many'; type 2 or 2..8"),
        ({"num_workers": "8..2"}, "FEWEST..MOST from 1 up, found '8..2'"),
        ({"num_workers": "0..2"}, "FEWEST..MOST from 1 up, found '0..2'"),
        ({"num_workers": -1}, "num_workers and max_failures must be >= 0"),
        ({"num_workers": "2..64", "global_batch_size": 32}, "global_batch_size must be at least the number of workers, found 32 for 33"),
        ({"num_workers": "2..4", "parallel": ParallelConfig(FULL, replicas=2)}, "found 2 for parallel.replicas 2"),
        ({"ray_address": "auto"}, "ray_address is for Ray workers, found num_workers 0; type --num_workers 2 --ray_address auto"),
        ({"num_workers": "1..2", "resize_seconds": 0.0}, "resize_seconds must be above 0"),
        ({"ship_code": True}, "ship_code is for the nodes of a running cluster, found no ray_address"),
        ({"hang_seconds": 0.0}, "hang_seconds must be above 0, found 0; leave it out for 900"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_starts(options, line):
    with pytest.raises(ConfigError) as caught:
        TrainingRun(**options)
    assert line in str(caught.value)


def test_the_controller_imports_no_torch():
    """It starts before the workers, and they wait for it."""
    program = "import sys, pi0fm.cluster.elastic, pi0fm.cluster.ray_faults; sys.exit(bool({'torch', 'tensorboard'} & {*sys.modules}))"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_ray_that_was_started_here_looks_less_often(monkeypatch):
    for name in {**elastic.SHORT_INTERVALS, **elastic.SINGLE_MACHINE}:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_TRAIN_METRICS_ENABLED", "1")  # a user's word stays
    with monkeypatch.context() as joined:
        joined.setattr(elastic.os, "environ", dict(elastic.os.environ))
        elastic.shorten_ray_intervals(alone=False)
        assert "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER" not in elastic.os.environ
    with monkeypatch.context() as alone:
        alone.setattr(elastic.os, "environ", dict(elastic.os.environ))
        elastic.shorten_ray_intervals(alone=True)
        assert elastic.os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] == "0"
        assert elastic.os.environ["RAY_TRAIN_METRICS_ENABLED"] == "1"


def test_what_the_first_worker_says_is_said_once_by_the_driver_in_whole_lines(tmp_path, capsys):
    path = tmp_path / "said.txt"
    path.write_text("of an earlier start\n")
    reader = status_lines.StatusReader(path)
    with status_lines.appended_to(path):
        progress.say("weights are random")
        progress.say("größer\nin two lines")
    capsys.readouterr()
    with path.open("a") as file:
        file.write("half a")
        file.flush()
        reader.print_new()
        reader.print_new()
        assert capsys.readouterr().err == "weights are random\ngrößer\nin two lines\n"
        file.write(" line\n")
    reader.print_new()
    assert capsys.readouterr().err == "half a line\n"
    path.unlink()
    reader.print_new()
    with status_lines.appended_to(tmp_path / "no folder" / "said.txt"):
        progress.say("heard here alone")
    assert capsys.readouterr().err == "heard here alone\n"


def test_a_worker_reads_a_run_of_more_workers_than_its_machine_has_cores(monkeypatch):
    """The driver refuses what its machine cannot hold; a node of a cluster holds a part of the workers."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    run = TrainingRun(num_workers=4, cpus_per_worker=1000, global_batch_size=8)
    assert options.decode(TrainingRun, options.encode(run)) == run
