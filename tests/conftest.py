"""Settings of all tests: shape checks on, one thread, no network, journeys last.

The environment is set before any library that reads it once is imported; nothing here imports torch, so that a test of the
command line or of deploy/ starts at once.
"""

import gc
import os
from collections.abc import Iterator
from pathlib import Path

# Two torch threads in every process on two cores are several times slower than one. Child processes inherit all of these.
for name, value in {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "MPLBACKEND": "agg",
    # Ray: start workers without `uv run`, notice failures fast, and send no usage statistics.
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.3",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "15",
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",
    "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "5",
}.items():
    os.environ.setdefault(name, value)

import jaxtyping
import pytest
import runtime_checks
from small_disks import small_disk, unwritable

__all__ = ["small_disk", "unwritable"]
runtime_checks.install()

ROOT = Path(__file__).resolve().parent.parent
JOURNEYS = ROOT / "tests" / "journeys"
JOURNEY_TIMEOUT_SECONDS = 420


@pytest.fixture(scope="session")
def repository() -> Path:
    """The folder that holds pyproject.toml."""
    return ROOT


@pytest.fixture
def shapes_unchecked() -> Iterator[None]:
    """As in production: for thousands of small steps, where the looking is most of the time, and for what the library checks itself."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def pytest_collection_finish() -> None:
    """A million objects of imported libraries stay to the end: no collection of garbage need look at them again."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests in tests/journeys, give them a longer time limit, and run them after the unit tests."""
    for item in items:
        if item.path.is_relative_to(JOURNEYS) and item.get_closest_marker("journey") is None:
            item.add_marker(pytest.mark.journey)
        if item.get_closest_marker("journey") is not None and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(JOURNEY_TIMEOUT_SECONDS))
    items.sort(key=lambda item: item.get_closest_marker("journey") is not None)
