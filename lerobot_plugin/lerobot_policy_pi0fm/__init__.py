"""A pi0fm bundle as a LeRobot policy. LeRobot imports this package by its name, and finds the three modules by theirs."""

from lerobot_policy_pi0fm.configuration_pi0fm import Pi0fmConfig

__all__ = ["Pi0fmConfig"]
