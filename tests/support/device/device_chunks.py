"""Program: compare chunks of compiled and recorded samplers with plain ones on a device; JSON on the last line.

python device_chunks.py pi0 wide cuda bfloat16 kernels graph
"""

import json
import sys

import torch
from device_cases import configuration, observe
from small_pi0 import network
from smooth_network import smooth_in_time

from pi0fm.flow.config import FlowConfig
from pi0fm.flow.matching import FlowMatching
from pi0fm.policy.sampling.sampler import Sampler

CASES = {
    "batch 3": {"batch": 3},
    "batch 1": {"batch": 1},
    "batch 8": {"batch": 8},
    "missing camera": {"batch": 3, "missing": True},
    "short prompt": {"batch": 3, "prompt": 3},
    "held rows": {"batch": 3},
}


def main(name: str, size: str, kind: str, precision: str, words: list[str]) -> None:
    """The largest difference over the largest way that an action is moved from its noise."""
    config, device, dtype = configuration(name, size), torch.device(kind), getattr(torch, precision)
    flow = FlowMatching.from_config(FlowConfig(num_flow_steps=4))
    model = network(config)
    smooth_in_time(model)
    plain = Sampler(model, flow, device, dtype)
    rows = []
    for word in words:
        sampler = Sampler(model, flow, device, dtype, word)
        for case, given in CASES.items():
            for seed in (0, 1):  # the second call of a shape replays what the first recorded
                seen = observe(config, cameras=2, seed=seed, **given)
                noise = torch.randn(len(seen), config.action_horizon, config.action_dim, generator=torch.Generator().manual_seed(seed))
                mask = torch.ones_like(noise, dtype=torch.bool)
                held = torch.arange(config.action_horizon) < torch.tensor([seed, 1, 2])[:, None]
                given_rows = {"committed": (noise.flip(1), held)} if case == "held rows" else {}
                expected = plain(seen, noise, mask, **given_rows).cpu()
                difference = (sampler(seen, noise, mask, **given_rows).cpu() - expected).abs().max() / (expected - noise).abs().max()
                rows.append({"word": word, "case": case, "difference": float(difference)})
    sys.stdout.write(json.dumps(rows) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:5], sys.argv[5:])
