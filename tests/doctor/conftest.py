"""The fixtures of support/fake_server.py, and a temporary folder for doctor's output without an option."""

import pytest
from fake_server import leaving, start_server

__all__ = ["leaving", "start_server"]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path_factory, monkeypatch):
    """outputs/doctor is in a folder of the test."""
    monkeypatch.chdir(tmp_path_factory.mktemp("here"))
