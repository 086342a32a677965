"""The processor time that a program and all its helpers have used: the unit in which two trainers are given the same chance.

Owns: the count over the process tree. Does not know: what was computed. Other tenants of the machine change wall time, not this.

    this process          time.process_time
    |- live child         its own time + that of its ended children
    |  `- live grandchild the same
    `- ended children     kept by the kernel once they have been waited for
"""

import os
import time

import psutil


def cpu_seconds_of_tree() -> float:
    """User and system seconds of this process and its descendants, live or ended. Only differences mean something.

    A child that ends between two calls and has not been waited for is missing until it has been.
    """
    ended = os.times()
    total = time.process_time() + ended.children_user + ended.children_system
    for child in psutil.Process().children(recursive=True):
        try:
            times = child.cpu_times()
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue  # it ended after the list was made; the kernel counts it among the ended children
        total += times.user + times.system + times.children_user + times.children_system
    return total
