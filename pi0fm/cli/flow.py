"""`pi0fm flow NAME`: the mathematics under the policies, seen and measured.

Owns: the list; each is a module `flow_NAME` beside this one. Does not know: what any of them does.
"""

HELP = "see and measure the flows that policies are made of"
SUBCOMMANDS = {
    "demo": "flow matching, CNF and diffusion on data in the plane: figures and a comparison",
    "steps": "the error of a policy's action chunks against evaluations, for every solver",
}
