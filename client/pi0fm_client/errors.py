"""Errors that a user can correct.

Owns: one exception class for each kind of input that can be wrong. Does not know: who prints them.
Every message is one line that says the rule, what was found, and what to type instead; the command line
shows `str(error)` and exits with 1 (2 for a wrong option), so no traceback reaches a user. Each class takes one string, so that it
survives pickling between Ray workers.
"""


class Pi0fmError(Exception):
    """Base of the errors in a user's input; `str(error)` is the line that the user reads."""


class ConfigError(Pi0fmError):
    """An option, a configuration file or a combination of options that cannot be honoured."""


class DatasetError(Pi0fmError):
    """A data set that is missing, damaged, or does not hold what the configuration names."""


class BundleError(Pi0fmError):
    """A policy bundle with a missing, cut or mismatched file."""


class SimulationError(Pi0fmError):
    """An unknown task or camera, or a machine that cannot render."""


class OutputError(Pi0fmError):
    """An output folder whose content must not be overwritten."""


class ObservationError(Pi0fmError):
    """An observation that lacks a key, or holds an array of another shape, type or range."""


class ClusterError(Pi0fmError):
    """Ray, or one of its nodes, that does not start."""


class ServingError(Pi0fmError):
    """A server that cannot start, cannot be reached, or answered with an error."""
