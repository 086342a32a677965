"""Arrays from worker processes: the same, in order, through shared memory. What is killed, and real batches, are in tests/journeys."""

import dataclasses
import pickle
import signal
from itertools import count

import numpy as np
import pytest
from numbered_arrays import Numbered

from pi0fm.data.loading import processes as loader_processes
from pi0fm.data.loading.loader import LoaderConfig, micro_batches
from pi0fm.data.loading.processes import in_processes
from pi0fm.data.pictures.frame_cache import open_cache
from pi0fm.data.pictures.streaming import FrameStream
from pi0fm_client.errors import ConfigError, DatasetError, Pi0fmError

TABLE = np.random.default_rng(0).normal(size=(50, 40)).astype(np.float32)
SLOTS = 3


def test_arrays_come_in_order_bit_by_bit_until_one_fails(tmp_path, monkeypatch):
    """One worker: its slots grow and are filled again, no more tasks are under way than was said, its fault keeps its class and place.

    It imports no torch that its task does not need, and nothing from the folder where the user happens to be.
    """
    (tmp_path / "json.py").write_text("raise SystemExit('the wrong json')")
    monkeypatch.chdir(tmp_path)
    make, asked, taken = Numbered(TABLE, fault_at=9), count(), 0
    tasks = ((first, 1 + 10 * first) for first in asked)
    with pytest.raises(DatasetError, match=r"^an episode is cut$"):
        for found in in_processes(make, tasks, processes=1, slots=SLOTS):
            expected = make(taken, 1 + 10 * taken)
            assert list(found) == list(expected)
            assert expected.pop("torch") and not found["torch"]
            for name, array in expected.items():
                assert found[name].dtype == array.dtype and found[name].shape == array.shape
                assert np.array_equal(found[name], array)
            taken += 1
            assert repr(asked) == f"count({taken + SLOTS - 1})"
    assert taken == 9


@pytest.mark.parametrize(("deed", "words"), [("os.kill(os.getpid(), 9)", "was killed by SIGKILL"), ("sys.exit(3)", "ended with code 3")])
def test_a_worker_that_dies_is_named_in_one_line(tmp_path, monkeypatch, deed, words):
    (tmp_path / "short_lived.py").write_text(f"import os, sys\n{deed}\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(loader_processes, "MODULE", "short_lived")
    with pytest.raises(Pi0fmError, match=rf"^loader process 1 of 1 \(pid \d+\) {words}.*loader\.processes[^\n]*$"):
        next(in_processes(Numbered(TABLE), iter([(0, 1)]), 1, 1))


def test_signals_are_blocked_only_for_who_is_born_meanwhile():
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    with loader_processes._signals_held():
        assert {signal.SIGINT, signal.SIGTERM} <= signal.pthread_sigmask(signal.SIG_BLOCK, ())
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before


def test_a_fault_that_is_not_ours_says_where_it_was():
    try:
        Numbered(TABLE)("no number", 1)
    except TypeError as error:
        answer = loader_processes._described(error)
    with pytest.raises(Pi0fmError, match=r"^A failed \(TypeError: .*, numbered_arrays\.py:\d+\); type --loader\.processes 0"):
        loader_processes._arrays(answer | {"by": "A"}, loader_processes._Memory.new())


def test_a_pickled_cache_names_its_folder_and_holds_no_picture(tiny_source, tiny_config):
    cache = open_cache(tiny_source, tiny_config, 64)
    content = pickle.dumps(cache)
    frames = np.arange(28)
    assert len(content) < 2000 < cache.gather(frames).nbytes
    again = pickle.loads(content)
    assert np.array_equal(again.gather(frames), cache.gather(frames))
    in_memory = dataclasses.replace(cache, cameras=tuple(np.asarray(camera) for camera in cache.cameras), folder=None)
    assert np.array_equal(pickle.loads(pickle.dumps(in_memory)).gather(frames), cache.gather(frames))


def test_a_pickled_collator_makes_the_same_batch(collator):
    again = pickle.loads(pickle.dumps(collator))
    expected, found = collator(3, 9).named(), again(3, 9).named()
    assert list(found) == list(expected)
    assert all(found[name].equal(tensor) for name, tensor in expected.items())
    assert again.valid_elements(3, 9) == collator.valid_elements(3, 9)


def test_a_stream_is_refused_before_anything_is_started(collator):
    streamed = dataclasses.replace(collator, cache=object.__new__(FrameStream))
    with pytest.raises(ConfigError, match="this data set is streamed, and each process would decode all of it"):
        micro_batches(streamed, 0, 1, 8, 0, 1, 8, LoaderConfig(processes=1))


@pytest.mark.parametrize(
    ("options", "words"),
    [({"processes": -1}, "loader.processes must be >= 0"), ({"processes": 2, "threads": 2}, "by threads or by processes, found")],
)
def test_processes_out_of_range_and_beside_threads_are_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        LoaderConfig(**options)
