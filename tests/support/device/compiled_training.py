"""Program: compare losses and gradients of a compiled network with the plain one's for several prompt lengths; JSON on standard output.

Run apart from the tests, whose shape checks torch.compile cannot look through.
"""

import copy
import json
import sys
from dataclasses import replace

import torch
from small_pi0 import BOTH, network, observation, question
from torch import nn
from torch._dynamo.utils import counters

from pi0fm.models.config import LoraConfig
from pi0fm.train.components import Adaptation
from pi0fm.train.start.adaptation import adapt

LENGTHS = (8, 5, 7, 4)


def main(name: str, checkpointing: str, rank: str) -> None:
    """The largest differences of each length, and how many graphs had been compiled by then. rank: of adapters, 0 for none."""
    plain, compiled = (
        adapt(network(BOTH[name]), Adaptation("full", LoraConfig(int(rank)), False, checkpointing, word), torch.float32).train()
        for word in (False, True)
    )
    random = torch.Generator().manual_seed(5)
    for key, value in plain.named_parameters():
        if ".lora_" in key:  # B is 0 at the start, which would hide A's gradient
            nn.init.normal_(value, std=0.2, generator=random)
    compiled.load_state_dict(plain.state_dict())
    noise, t = question(3)[:2]
    rows = []
    for length in LENGTHS:
        seen = observation(3, prompts=(length,) * 3)
        seen = replace(seen, prompt_tokens=seen.prompt_tokens[:, :length], prompt_mask=seen.prompt_mask[:, :length])
        found = []
        for model in (plain, compiled):
            model.zero_grad()
            velocity = model(seen, noise, t)
            velocity.square().mean().backward()
            trained = {key: value.grad for key, value in model.named_parameters() if value.requires_grad}
            found.append((velocity.detach(), trained))
        (expected, gradients), (ours, given) = found
        worst = max(float((given[key] - value).norm() / (value.norm() + 1e-12)) for key, value in gradients.items())
        rows.append(
            {"velocity": float((ours - expected).abs().max()), "gradient": worst, "graphs": int(counters["stats"]["unique_graphs"])}
        )
    judged = copy.deepcopy(compiled).eval()  # as validation does, which takes likelihoods under torch.func
    with torch.no_grad():
        pushed = torch.func.jvp(lambda x: judged(seen, x, t), (noise,), (torch.ones_like(noise),))[1]
        assert torch.isfinite(pushed).all()
    sys.stdout.write(json.dumps(rows) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:4])
