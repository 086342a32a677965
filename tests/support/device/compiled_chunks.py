"""Program: compare chunks of a compiled sampler with plain ones for several batches and prompt lengths; JSON on standard output.

Run apart from the tests, whose shape checks torch.compile cannot look through.
"""

import json
import sys
from dataclasses import replace

import torch
from small_pi0 import BOTH, network, observation, question
from torch._dynamo.utils import counters

from pi0fm.flow.config import FlowConfig
from pi0fm.flow.matching import FlowMatching
from pi0fm.policy.sampling.sampler import Sampler

SHAPES = ((1, 8), (3, 8), (3, 5), (2, 7), (4, 4), (1, 6))  # batch, prompt tokens; a server warms up with the first two


def main(name: str) -> None:
    """Largest difference of each shape, and how many graphs had been compiled by then."""
    flow = FlowMatching.from_config(FlowConfig(num_flow_steps=4))
    plain, compiled = (Sampler(network(BOTH[name]), flow, torch.device("cpu"), torch.float32, word) for word in ("off", "kernels"))
    rows = []
    for batch, length in SHAPES:
        seen = observation(batch, prompts=(length,) * batch)
        seen = replace(seen, prompt_tokens=seen.prompt_tokens[:, :length], prompt_mask=seen.prompt_mask[:, :length])
        noise = question(batch)[0]
        mask = torch.ones_like(noise, dtype=torch.bool)
        difference = (compiled(seen, noise, mask) - plain(seen, noise, mask)).abs().max()
        rows.append({"difference": float(difference), "graphs": int(counters["stats"]["unique_graphs"])})
    held = noise.flip(1), torch.tensor([[True, False, False, False]])
    found, expected = (each(seen, noise, mask, committed=held) for each in (compiled, plain))
    sys.stdout.write(json.dumps({"shapes": rows, "held": float((found - expected).abs().max())}) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
