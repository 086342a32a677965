"""Real-time chunking: a new chunk goes on from what is left of the one before, while that one is still executed.

Owns: what a remainder must be, and what of it the flow is led to. Does not know: the network, control steps, how it came here.

    action prefix [n, A], absolute, robot units -> chain, against the new observation's state -> target [H, A], normalised
    n, inference_delay                          -> weights [H, A]: firm while the old chunk is executed, then falling, 0 from row n on

The remainder is normalised anew: the numbers of the old chunk were relative to another state.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from pi0fm.data.chain import Chain, Sample
from pi0fm.flow.guidance import hold_weights
from pi0fm_client.errors import ObservationError
from pi0fm_client.types import ActionPrefix, Observation


def check_prefix(prefix: ActionPrefix, horizon: int, chain: Chain) -> None:
    """Raise ObservationError for a prefix of another shape, one that is not finite or out of range, or a delay that is longer than it."""
    actions, robot_action_dim = np.asarray(prefix.actions), chain.embodiment.dims()[1]
    if actions.ndim != 2 or actions.shape[1] != robot_action_dim or not 1 <= len(actions) <= horizon or actions.dtype.kind not in "fiu":
        raise ObservationError(
            f"an action prefix must be numbers [1 to {horizon}, {robot_action_dim}], found {actions.dtype} {list(actions.shape)}; "
            "send the rows of the old chunk that are still to come"
        )
    if not np.isfinite(actions).all():
        raise ObservationError("an action prefix must be finite, found NaN or infinity in it; leave it out")
    chain.check_actions(actions, "an action prefix")
    if not 0 <= prefix.inference_delay <= len(actions):
        raise ObservationError(
            f"an inference delay must lie within its action prefix of {len(actions)} rows, found {prefix.inference_delay}; "
            "leave the prefix out where the old chunk ends before"
        )


def led_to(
    chain: Chain, observations: Sequence[Observation], prefixes: Sequence[ActionPrefix | None], horizon: int
) -> tuple[Tensor, Tensor]:
    """(target, weights), [B, H, network's action dim], of `GuidedVelocity`; an observation without a prefix has no weight.

    Raises ObservationError as `check_prefix` does.
    """
    robot_dim = chain.embodiment.dims()[1]
    rows = np.zeros((len(prefixes), horizon, robot_dim), np.float32)
    held = torch.zeros(len(prefixes), horizon)
    for number, prefix in enumerate(prefixes):
        if prefix is None:
            continue
        check_prefix(prefix, horizon, chain)
        count = len(prefix.actions)
        rows[number] = prefix.actions[np.minimum(np.arange(horizon), count - 1)]
        held[number] = hold_weights(horizon, prefix.inference_delay, horizon - count)
    state = np.stack([np.asarray(observation.state, np.float32) for observation in observations])
    normal = chain.forward(Sample(state, rows)).actions
    assert normal is not None
    target = torch.from_numpy(np.ascontiguousarray(normal, dtype=np.float32))
    weights = held[..., None].repeat(1, 1, target.shape[-1])
    weights[..., robot_dim:] = 0
    return target, weights
