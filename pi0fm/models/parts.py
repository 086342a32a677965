"""Part of the network that a parameter belongs to, by its name.

Owns: the four parts. Does not know: which of them a run trains.

    vision          SigLIP's tower                                  0.41 B of pi0's 3.1 B parameters
    backbone        projector, words, its stream of every layer     2.40 B
    action_expert   its stream of every layer, final norm           0.31 B
    projections     state, actions and time in, actions out         0.003 B
"""

from typing import Literal, get_args

Part = Literal["vision", "backbone", "action_expert", "projections"]
PARTS: tuple[Part, ...] = get_args(Part)


def part_of(name: str) -> Part:
    """Part of the parameter or module `name`. Raises ValueError for a name in no part: a new module must be added here."""
    words = name.split(".")
    if words[0] == "vision":
        return "backbone" if words[1] == "projector" else "vision"
    if words[0] == "prompt_embedding":
        return "backbone"
    if words[0] == "decoder":
        return "backbone" if words[1] == "layers" and words[3] == "backbone" else "action_expert"
    if words[0] in ("action_in", "action_out", "state_in", "time_mlp_in", "time_mlp_out"):
        return "projections"
    raise ValueError(f"{name} belongs to no part of the network; give it one in models/parts.py")
