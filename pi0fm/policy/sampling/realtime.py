"""Real-time chunking: a new chunk continues the previous one, while that one is still executed.

Owns: the checks of a remainder, the target and weights of the flow. Does not know: the network, control steps, transport.

    action prefix [n, A], absolute, robot units -> chain, against the new observation's state -> target [H, A], normalised
    n, inference_delay                          -> weights [H, A]: firm while the old chunk is executed, then falling, 0 from row n on
    of a policy that was trained for it         -> held rows [H], those before inference_delay: they are kept, the rest is free

Beyond the delay that it was trained for as many rows are held as it knows: the chunk still goes on from the old one, and may turn from it
before the robot takes it up. A refusal instead left robots standing still for half of their steps (docs/LOG.md, 2026-11-27).
The remainder is normalised again: the numbers of the old chunk were relative to another state.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from pi0fm.data.chain import Chain, Sample
from pi0fm.flow.committed import held_rows
from pi0fm.flow.guidance import hold_weights
from pi0fm.options import nearest
from pi0fm.policy.load_options import GUIDANCE, GUIDED, HARD_PREFIX
from pi0fm_client.errors import ConfigError, ObservationError
from pi0fm_client.types import ActionPrefix, Observation


def refuse_guidance_mode(guidance: str, max_delay: int) -> None:
    """Raise ConfigError for an unknown word, or one that a policy with this rtc_max_delay was not trained for."""
    if guidance not in GUIDANCE:
        raise ConfigError(f"guidance must be {', '.join(GUIDANCE)}, found {guidance!r}: {nearest(guidance, GUIDANCE)}")
    if guidance == HARD_PREFIX and not max_delay:
        raise ConfigError(
            f"guidance {HARD_PREFIX} needs a policy that was trained to go on from given rows, found one without; train it with "
            f"--rtc.max_delay N, or take guidance {GUIDED}"
        )


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
            f"an inference delay must be within its action prefix of {len(actions)} rows, found {prefix.inference_delay}; "
            "leave the prefix out where the old chunk ends before"
        )


def guidance_targets(
    chain: Chain, observations: Sequence[Observation], prefixes: Sequence[ActionPrefix | None], horizon: int
) -> tuple[Tensor, Tensor]:
    """(target, weights), [B, H, network's action dim], of `GuidedVelocity`; an observation without a prefix has no weight."""
    target, robot_dim = _targets(chain, observations, prefixes, horizon), chain.embodiment.dims()[1]
    weights = torch.zeros_like(target)
    for number, prefix in enumerate(prefixes):
        if prefix is not None:
            weights[number, :, :robot_dim] = hold_weights(horizon, prefix.inference_delay, horizon - len(prefix.actions))[:, None]
    return target, weights


def held_actions(
    chain: Chain, observations: Sequence[Observation], prefixes: Sequence[ActionPrefix | None], horizon: int, max_delay: int
) -> tuple[Tensor, Tensor]:
    """(actions [B, H, network's action dim], held rows [B, H]) of `CommittedVelocity`; of an observation without a prefix none is held."""
    counts = torch.tensor([0 if prefix is None else held_count(prefix, max_delay) for prefix in prefixes])
    return _targets(chain, observations, prefixes, horizon), held_rows(counts, horizon)


def held_count(prefix: ActionPrefix, max_delay: int) -> int:
    """How many of its rows a policy holds that was trained for `max_delay`."""
    return min(prefix.inference_delay, max_delay)


def _targets(chain: Chain, observations: Sequence[Observation], prefixes: Sequence[ActionPrefix | None], horizon: int) -> Tensor:
    """The remainders, normalised again, made whole chunks by their last row; zeros where there is none. `check_prefix` judged them."""
    robot_dim = chain.embodiment.dims()[1]
    rows = np.zeros((len(prefixes), horizon, robot_dim), np.float32)
    for number, prefix in enumerate(prefixes):
        if prefix is not None:
            rows[number] = prefix.actions[np.minimum(np.arange(horizon), len(prefix.actions) - 1)]
    state = np.stack([np.asarray(observation.state, np.float32) for observation in observations])
    normal = chain.forward(Sample(state, rows)).actions
    assert normal is not None
    return torch.from_numpy(np.ascontiguousarray(normal, dtype=np.float32))
