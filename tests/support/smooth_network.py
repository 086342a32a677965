"""A random network whose velocity is smooth in time, like a trained network's.

A wave of period 0.004 in the time embedding is noise to any solver with fewer than a thousand steps.
"""

import torch

from pi0fm.models.pi0 import Pi0


def smooth_in_time(model: Pi0) -> None:
    """Forget the quick waves of the time embedding, in place: what is left has periods of 1.6 and more."""
    width = model.action_in.out_features
    half = width // 2
    first = model.time_mlp_in.in_features - width  # pi0's actions come before the time
    quick = [first + side * half + k for side in (0, 1) for k in range(half - 3)]
    with torch.no_grad():
        model.time_mlp_in.weight[:, quick] = 0
