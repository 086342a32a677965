"""Tests of LeRobot's PI0 and PI05 and ours with the same weights: the same loss, velocity, samples and gradients, in float32."""

from dataclasses import dataclass
from functools import cache

import pytest
import torch
from lerobot.policies.pi0.modeling_pi0 import PI0Policy
from lerobot.policies.pi05.modeling_pi05 import PI05Policy
from parity_pair import CONFIG, KINDS, Answers, Batch, Pair, difference, gradient_difference, make_batch, make_pair, unused
from shrunk_pi05 import make_config

from pi0fm.bench.harness.peer import RobotFeatures
from pi0fm.models.config import PI0, PI05
from pi0fm.models.pi0 import Pi0, parameter_count

TOLERANCE = 1e-5
LONGEST = CONFIG.max_prompt_tokens
BOTH, FIRST = [True, True], [True, False]
# image masks and prompt lengths of a batch
CASES = {
    "all there": ([BOTH], [LONGEST]),
    "a camera missing": ([FIRST], [LONGEST]),
    "padded prompts": ([BOTH], [20]),
    "mixed lengths": ([BOTH, BOTH], [20, 5]),
    "cameras and lengths mixed": ([BOTH, FIRST, [False, True]], [20, LONGEST, 5]),
}


@cache
def networks(kind: str) -> Pair:
    return make_pair(kind, CONFIG)


@dataclass(frozen=True)
class Asked:
    """Both networks, one batch as the chain hands it over to ours, both answers."""

    pair: Pair
    batch: Batch
    theirs: Answers
    ours: Answers


@pytest.fixture(scope="module", params=[(kind, case) for kind in KINDS for case in CASES], ids=" ".join)
def asked(request) -> Asked:
    kind, case = request.param
    pair = networks(kind)
    batch = make_batch(pair.config, *CASES[case], seed=1)
    return Asked(pair, batch, pair.their_answers(batch), pair.our_answers(batch))


@pytest.mark.parametrize("what", ["loss", "velocity", "sample"])
def test_answers(asked, what):
    """The training loss entry by entry, the velocity at random times, ten steps from given noise."""
    assert difference(getattr(asked.ours, what), getattr(asked.theirs, what)) < TOLERANCE


def test_gradients(asked):
    """Of every parameter that the two share: all of ours."""
    worst, name = gradient_difference(asked.ours.gradients, asked.theirs.gradients)
    assert worst < TOLERANCE, name


def test_with_all_tokens_that_are_masked(asked):
    """What is masked may also be there: the chain leaves out what no row has, a row's own gaps stay."""
    ours = asked.pair.our_answers(asked.batch, trimmed=False, gradients=False)
    assert difference(ours.velocity, asked.theirs.velocity) < TOLERANCE
    assert difference(ours.sample, asked.theirs.sample) < TOLERANCE


def test_the_cached_prefix_gives_the_velocity_of_the_joint_pass(asked):
    batch = asked.batch
    observation, time = batch.observation.trimmed(), batch.time[:, None, None]
    x_t = time * batch.noise + (1 - time) * batch.actions
    with torch.no_grad():
        found = asked.pair.ours.velocity(asked.pair.ours.encode_prefix(observation), observation.state, x_t, 1 - batch.time)
    assert difference(found, asked.theirs.velocity) < TOLERANCE


@pytest.mark.parametrize("kind", KINDS)
def test_masks_are_not_passed_over(kind):
    """Else all of the above would hold of networks that see what is masked."""
    pair, names = networks(kind), list(CASES)[:3]
    whole, *masked = (pair.our_answers(make_batch(pair.config, *CASES[name], seed=1), gradients=False).sample for name in names)
    assert all(difference(sample, whole) > 100 * TOLERANCE for sample in masked)


@pytest.mark.parametrize("kind", KINDS)
def test_parameter_count_of_the_released_size_is_lerobots_but_for_what_is_dead(kind):
    """LeRobot's own constructor, on the meta device, less the two lm_heads and what no output depends on."""
    released = {"pi0": PI0, "pi05": PI05}[kind]
    config = make_config(kind, PI0, RobotFeatures(("base",), 32, 32), device="meta")
    with torch.device("meta"):
        theirs, ours = {"pi0": PI0Policy, "pi05": PI05Policy}[kind](config), Pi0(released)
    left_out = set(unused(released.decoder.depth))
    counted = {name: parameter.numel() for name, parameter in theirs.named_parameters(remove_duplicate=False)}
    assert left_out <= counted.keys()
    assert parameter_count(ours) == sum(count for name, count in counted.items() if name not in left_out)
