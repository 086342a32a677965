"""Tests of the checks of a cluster's nodes: versions and code by node, and the shared storage."""

import runpy
import subprocess
import sys
from pathlib import Path

import ray

from pi0fm.cluster.nodes import node_facts
from pi0fm.cluster.nodes.node_facts import CODE, code_of
from pi0fm.cluster.nodes.preflight import check_storage, version_differences

HERE = {"host": "a", "interpreter": "/a/python", "python": "3.12.3", "torch": "2.11.0", CODE: "0123456789ab"}


def test_a_node_that_is_the_same_is_not_told_of_whatever_its_name():
    assert version_differences(HERE, {"b": HERE | {"host": "b", "interpreter": "/b/python"}}) == []


def test_each_difference_is_told_with_its_node_and_what_is_here():
    older, bare = (
        HERE | {"torch": "2.10.0", CODE: "ba9876543210"},
        HERE | {"interpreter": "/bin/python3", "torch": "missing", CODE: "missing"},
    )
    failed = RuntimeError("Traceback\n  many lines\nray.exceptions.NodeDiedError: gone\n")
    assert version_differences(HERE, {"b (10.0.0.2)": older, "c": bare, "d": failed}) == [
        f"on b (10.0.0.2): torch 2.10.0 (here 2.11.0), {CODE} ba9876543210 (here 0123456789ab)",
        "on c: no pi0fm for /bin/python3, torch missing (here 2.11.0)",
        "on d: ray.exceptions.NodeDiedError: gone",
    ]


def test_the_facts_of_this_process_are_whole():
    facts = node_facts.node_facts()
    assert facts["interpreter"] == sys.executable and facts["ray"] == ray.__version__
    assert "missing" not in facts.values() and len(facts[CODE]) == 12


def test_code_is_another_when_a_module_is(tmp_path, monkeypatch):
    package = tmp_path / "some_package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    assert code_of("no_such_package") == "missing"
    first = code_of("some_package")
    (package / "more.py").write_text("x = 1\n")
    second = code_of("some_package")
    (package / "more.py").write_text("x = 2\n")
    assert len({first, second, code_of("some_package")}) == 3


def test_the_questions_need_nothing_of_pi0fm_on_a_node():
    """Sent by value: what is called there is the standard library's."""
    sent = ray.cloudpickle.dumps(runpy.run_path(node_facts.__file__)["node_facts"])
    program = (
        f"import sys, pickle; sys.modules.update(pi0fm=None, pi0fm_client=None)\nprint(pickle.loads(sys.stdin.buffer.read())()[{CODE!r}])"
    )
    done = subprocess.run([sys.executable, "-c", program], input=sent, capture_output=True, check=False)
    assert done.stdout.decode().strip() == "missing", done.stderr.decode()


def test_a_folder_of_that_name_on_another_disk_is_told(tmp_path):
    run, record = tmp_path / "run", b'{"steps": 1}'
    assert "must be on a disk that all nodes share" in check_storage(run, record, run / "checkpoints")
    run.mkdir()
    (run / "run.json").write_bytes(b'{"steps": 2}')
    assert "must be on a disk that all nodes share" in check_storage(run, record, run / "checkpoints")
    (run / "run.json").write_bytes(record)
    assert check_storage(run, record, run / "checkpoints") is None
    assert check_storage(run, record, str(tmp_path / "other")) is None
    assert sorted(path.name for path in run.iterdir()) == ["run.json"] and list((tmp_path / "other").iterdir()) == []


def test_a_place_that_takes_no_file_is_told(tmp_path, unwritable):
    run: Path = tmp_path / "run"
    run.mkdir()
    (run / "run.json").write_bytes(b"{}")
    assert " must be " in check_storage(run, b"{}", str(unwritable / "checkpoints"))
