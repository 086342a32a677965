"""Program: compare velocities of models/fused.py with the plain ones; JSON on the last line.

TRITON_INTERPRET=1 python fused_layers.py pi0 cpu        python fused_layers.py pi05 cuda
"""

import json
import sys

import torch
from small_pi0 import both, observation, resized
from torch import nn

from pi0fm.models import fused as fused_layers
from pi0fm.models.config import Pi0Config
from pi0fm.models.layers import AdaptiveRMSNorm
from pi0fm.models.pi0 import Pi0
from pi0fm.policy.sampling.sampler import halve_matrices


def small(name: str, horizon: int) -> Pi0Config:
    """Two layers in whole tiles; keys outnumber a slice of the attention."""
    decoder = {"depth": 2, "head_dim": 32, "backbone": {"width": 96, "mlp_width": 160}, "action_expert": {"width": 64, "mlp_width": 128}}
    vision = {"width": 48, "depth": 2, "num_heads": 4, "mlp_width": 96, "patch_size": 8, "image_size": 16}
    sizes = {"vocab_size": 64, "max_prompt_tokens": 9, "action_dim": 16, "state_dim": 5, "action_horizon": horizon}
    return both(resized(vision=vision, decoder=decoder, **sizes))[name]


def rows_of(name: str, device: torch.device, batch: int, horizon: int, dtype: torch.dtype) -> dict[str, float]:
    """The largest difference of three velocities, over the largest velocity."""
    torch.manual_seed(0)
    model = Pi0(small(name, horizon)).to(device).eval().requires_grad_(False)
    for module in model.modules():
        if isinstance(module, AdaptiveRMSNorm):
            nn.init.normal_(module.modulation.weight, std=0.1)
    if dtype != torch.float32:
        halve_matrices(model, dtype)
    fused = fused_layers.with_fused_layers(model)
    assert fused is not None
    seen = observation(batch, 2, (6, *[9] * (batch - 1)), model.config)
    seen.image_mask[-1, 1] = batch == 1
    seen = seen.to(device)
    x_t, each = torch.randn(batch, horizon, 16).to(device), torch.rand(batch).to(device)
    with torch.inference_mode(), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        plain, ours = model.cached_velocity(seen), fused.cached_velocity(seen)
        pairs = [(plain.at(x_t, t), ours.at(x_t, t)) for t in (0.1, 0.7)] + [(plain(x_t, each), ours(x_t, each))]
        held = torch.arange(horizon, device=device) < torch.arange(2, batch + 2, device=device)[:, None]
        pairs += [(plain.at_rows(x_t, 0.4, held), ours.at_rows(x_t, 0.4, held))]
        by_row = torch.rand(batch, horizon, device=device)
        pairs += [(plain(x_t, by_row), ours(x_t, by_row))]
        several = torch.cat((x_t, -x_t), dim=1).view(-1, *x_t.shape[1:])  # two chunks of each observation, which share its prefix
        plain, ours = (network.cached_velocity(seen, 2) for network in (model, fused))
        pairs += [(plain.at(several, t), ours.at(several, t)) for t in (0.1, 0.7)]  # the state rides along with the first
    worst = max(float((expected - found).abs().max() / expected.abs().max()) for expected, found in pairs)
    return {"rows": batch * horizon, "difference": worst, "bound": 1e-5 if dtype == torch.float32 else 3e-2}


def main(name: str, kind: str) -> None:
    """One tile of rows; on a GPU several too, and in bfloat16. The interpreter takes seconds a kernel."""
    fused_layers.KEYS, fused_layers.ASKING = 16, 16
    cases = [(1, 5, torch.float32)]
    if kind == "cuda":
        cases += [(8, 9, torch.float32), (1, 5, torch.bfloat16), (8, 9, torch.bfloat16)]
    found = [rows_of(name, torch.device(kind), *case) for case in cases]
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    torch.set_float32_matmul_precision("highest")
    main(sys.argv[1], sys.argv[2])
