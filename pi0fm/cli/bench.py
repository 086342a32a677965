"""`pi0fm bench NAME`: measurements of pi0fm, and of its peers beside it.

Owns: the list of measurements; each is a module `bench_NAME` beside this one. Does not know: what any of them measures.
"""

HELP = "measure pi0fm, and its peers beside it, on this machine"
SUBCOMMANDS = {
    "loading": "samples a processor second: frame cache and stream beside LeRobot's loader, copying and decoding",
    "learning": "one task, the same data and processor time: pi0fm against LeRobot's own PI0",
    "inference": "ten Euler steps for one observation: LeRobot's own PI0 against ours",
    "training": "one optimiser step on the same batch: LeRobot's own PI0 against ours",
    "checkpoint": "steps with an asynchronous checkpoint beside steps without",
    "card": "one GPU in eight minutes: whether it computes right, inference and training at full size",
    "density": "a chunk's log-likelihood beside its sampling, with the same evaluations",
}
