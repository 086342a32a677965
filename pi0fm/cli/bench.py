"""`pi0fm bench NAME`: measurements of pi0fm, and of its peers beside it.

Owns: the list of measurements; each is a module `bench_NAME` beside this one. Does not know: what any of them measures.
"""

HELP = "measure pi0fm, and its peers beside it, on this machine"
SUBCOMMANDS = {"learning": "one task, the same data and processor time: pi0fm against LeRobot's own PI0"}
