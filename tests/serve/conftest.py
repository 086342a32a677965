"""The fixtures of support/fake_server.py and support/small_policies.py."""

from fake_server import fake_policy, leaving, start_server
from small_policies import small_policy

__all__ = ["fake_policy", "leaving", "small_policy", "start_server"]
