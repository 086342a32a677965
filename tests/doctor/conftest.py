"""The fixtures of support/fake_server.py."""

from fake_server import leaving, start_server

__all__ = ["leaving", "start_server"]
