"""LeRobot's own PI0 and ours with the same weights, given the same inputs.

Owns: both networks of a case, the translation of weights and gradients, how far the answers differ.
Does not know: clocks, optimisers.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pi0fm.bench.lerobot_pi0 import RobotFeatures, ShrunkPI0, policy_config, same_size
from pi0fm.bench.peer_cases import Case
from pi0fm.convert.shapes import parts, sizes_of
from pi0fm.models.pi0 import Pi0, Pi0Config
from pi0fm_client.errors import Pi0fmError


@dataclass(frozen=True)
class PeerPair:
    """Two networks that answer alike."""

    case: Case
    theirs: ShrunkPI0
    ours: Pi0


def build_pair(case: Case, seed: int, device: torch.device) -> PeerPair:
    """LeRobot's policy with random weights, and ours with the same. The caller's random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        theirs = build_theirs(case)
        _spread(theirs)
        ours = Pi0(case.config)
    ours.load_state_dict(translated(theirs.model.state_dict(), case.config), strict=True)
    return PeerPair(case, theirs.to(device), ours.to(device))


def build_theirs(case: Case) -> ShrunkPI0:
    """LeRobot's policy at the case's size, all padded widths the robot's own."""
    cameras = tuple(f"camera_{number}" for number in range(len(case.present)))
    robot = RobotFeatures(cameras, case.config.state_dim, case.config.action_dim)
    size = same_size(case.config)
    return ShrunkPI0(policy_config(size, robot), size)


def translated(theirs: Mapping[str, Tensor], config: Pi0Config) -> dict[str, Tensor]:
    """Tensors under LeRobot's names (weights or gradients of its `model`) under ours, in our shapes."""
    found: dict[str, Tensor] = {}
    with torch.device("meta"):
        wanted = {name: value.shape for name, value in Pi0(config).state_dict().items()}
    for ours, group in parts("torch", "pi0", sizes_of(config)).items():
        found[ours] = torch.cat([part.rows(theirs[part.name], tuple(wanted[ours][1:])) for part in group])
    return found


def displacement_difference(ours: Tensor, theirs: Tensor, noise: Tensor) -> float:
    """The largest difference of two chunks over the largest way that the network moved an action from its noise.

    Stricter than over the chunk itself, of which the noise is the same on both sides whatever the network answers.
    """
    theirs, noise = theirs.float(), noise.float()
    return float((ours.float() - theirs).abs().max() / (theirs - noise).abs().max())


def gradient_difference(pair: PeerPair) -> float:
    """The largest difference of any shared parameter's gradient over its own largest entry (or 1 % of the largest of all)."""
    named = pair.theirs.model.named_parameters(remove_duplicate=False)
    theirs = {name: torch.zeros_like(value) if value.grad is None else value.grad for name, value in named}
    expected = translated(theirs, pair.case.config)
    largest = max(float(value.abs().max()) for value in expected.values())
    worst = 0.0
    for name, parameter in pair.ours.named_parameters():
        assert parameter.grad is not None, name
        scale = max(float(expected[name].abs().max()), 1e-2 * largest)
        worst = max(worst, float((parameter.grad - expected[name]).abs().max()) / scale)
    return worst


def check_alike(case: str, mode: str, what: str, difference: float, bound: float) -> None:
    """Raise Pi0fmError when the two sides do not compute the same: the times of different things say nothing."""
    if not difference <= bound:  # NaN too
        raise Pi0fmError(
            f"{what} of both sides must agree within {bound:g} before they are timed, found {difference:.3g} for {case} {mode}; "
            "no ratio is printed: type another --seed, and report it when that differs too"
        )


def _spread(policy: nn.Module) -> None:
    """Weights under which every token has a variance of about 1.

    LeRobot's constructors leave norms and biases at 0 and the rest so small that a network moves its noise by almost nothing: an error
    would not show.
    """
    for parameter in policy.parameters():
        nn.init.normal_(parameter, std=0.2 if parameter.ndim == 1 else parameter[0].numel() ** -0.5)
