"""The fixtures of support/fake_server.py."""

from fake_server import fake_policy, leaving, start_server

__all__ = ["fake_policy", "leaving", "start_server"]
