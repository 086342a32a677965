"""Tests of real-time chunking: a chunk that continues the rest of the previous one."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from pi0fm.data.chain import Sample
from pi0fm.flow.config import FlowConfig
from pi0fm.policy.load_options import HARD_PREFIX, WITHOUT_JACOBIAN
from pi0fm.policy.sampling.realtime import check_prefix, guidance_targets
from pi0fm.policy.saved import bundle
from pi0fm_client.errors import ConfigError, ObservationError, Pi0fmError
from pi0fm_client.types import ActionPrefix

H, A = 4, 3


@pytest.fixture(scope="module")
def policy(small_policy):
    return small_policy.in_memory()


def stacked(chunks):
    return np.stack([chunk.actions for chunk in chunks])


def test_no_prefix_is_the_same_call(policy, observations):
    plain = stacked(policy.infer_batch(observations, [1, 2, 3, 4]))
    np.testing.assert_array_equal(stacked(policy.infer_batch(observations, [1, 2, 3, 4], prefixes=[None] * 4)), plain)


def test_a_robot_without_a_prefix_is_not_touched_by_a_neighbour_with_one(policy, observations):
    plain = stacked(policy.infer_batch(observations, [1, 2, 3, 4]))
    prefix = ActionPrefix(plain[0] + 1, 2)
    led = stacked(policy.infer_batch(observations, [1, 2, 3, 4], prefixes=[prefix, None, None, None]))
    np.testing.assert_allclose(led[1:], plain[1:], atol=1e-4)
    assert np.abs(led[0] - plain[0]).max() > 1e-2


@pytest.mark.parametrize("guidance", ["guided", WITHOUT_JACOBIAN])
def test_a_chunk_is_led_to_the_rows_that_are_executed_meanwhile(small_policy, observations, guidance):
    policy = small_policy.in_memory()
    policy.guidance = guidance
    plain = policy.infer_batch(observations[:1], [1])[0].actions
    deviation = np.asarray(small_policy.stats.action.std)
    prefix = ActionPrefix((plain + deviation * [[0.5], [0.6], [0.7], [0.8]]).astype(np.float32)[:3], 2)
    led = policy.infer_batch(observations[:1], [1], prefixes=[prefix])[0].actions
    before, after = (np.abs(chunk[:2] - prefix.actions[:2]) / deviation for chunk in (plain, led))
    assert after.mean() < 0.4 * before.mean()


def test_flow_times_are_made_once_for_plain_and_led_chunks(small_policy, observations, monkeypatch):
    """A guided chunk takes a derivative through what a plain one kept, which was made inside inference mode."""
    policy, made = small_policy.in_memory(), []
    flow_time = type(policy.model).flow_time
    monkeypatch.setattr(type(policy.model), "flow_time", lambda model, t: made.append(t) or flow_time(model, t))
    plain = policy.infer_batch(observations[:1], [1])[0].actions
    times = list(made)
    first, again = (policy.infer_batch(observations[:1], [1], prefixes=[ActionPrefix(plain + 1, 2)])[0].actions for _ in range(2))
    assert len(times) == len(set(times)) > 0 and made == times
    np.testing.assert_array_equal(first, again)


def test_the_target_is_the_absolute_rows_against_the_new_state(policy, observations):
    """Dimension 0 is trained as a difference to the state: the same rows are other numbers against another state."""
    prefix = ActionPrefix(np.arange(6, dtype=np.float32).reshape(2, A), 1)
    target, weights = guidance_targets(policy.chain, observations[:2], [prefix, prefix], H)
    states = np.stack([observation.state for observation in observations[:2]])
    padded = policy.chain.forward(Sample(states, None)).state
    back = policy.chain.inverse(Sample(padded, target.numpy())).actions
    np.testing.assert_allclose(back[:, :2], np.stack([prefix.actions] * 2), atol=1e-4)
    assert not torch.allclose(target[0, :2, 0], target[1, :2, 0])
    torch.testing.assert_close(target[0, :2, 1:A], target[1, :2, 1:A])
    # row 0 firm, row 1 falling, the rest free; dimensions that the robot lacks are never held
    assert weights[0, 0, :A].eq(1).all() and 0 < weights[0, 1, 0] < 1
    assert not weights[:, 2:].any() and not weights[..., A:].any()


@pytest.mark.parametrize(
    ("actions", "delay", "line"),
    [
        (np.zeros((2, 4)), 1, r"found float64 \[2, 4\]"),
        (np.zeros((0, 3)), 0, r"found float64 \[0, 3\]"),
        (np.zeros((5, 3)), 1, r"found float64 \[5, 3\]"),
        (np.zeros(3), 1, r"found float64 \[3\]"),
        (np.array([["a", "b", "c"]]), 1, "must be numbers"),
        (np.full((2, 3), np.nan), 1, "must be finite"),
        (np.zeros((2, 3)), 3, "prefix of 2 rows, found 3"),
        (np.zeros((2, 3)), -1, "found -1"),
        (np.full((2, 3), 1e30), 1, r"near the data set's actions, found 1e\+30 in row 0"),
        (np.full((2, 3), 1e300), 1, "near the data set's actions, found 1e.300"),
    ],
)
def test_a_prefix_that_cannot_be_is_refused(policy, actions, delay, line):
    with pytest.raises(ObservationError, match=line):
        check_prefix(ActionPrefix(actions, delay), H, policy.chain)


def test_what_cannot_be_led_is_refused(small_policy, policy, observations):
    prefix = ActionPrefix(np.zeros((2, A), np.float32), 1)
    with pytest.raises(ObservationError, match="expected 1, found 2"):
        policy.infer_batch(observations[:1], prefixes=[prefix, None])
    with pytest.raises(ConfigError, match="not led"):
        policy.infer_batch(observations[:1], scores=True, prefixes=[prefix])
    other = small_policy.in_memory()
    other.flow = type(other.flow).from_config(FlowConfig(path="vp"))
    with pytest.raises(Pi0fmError, match="cond_ot"):
        other.refuse_prefixes()
    with pytest.raises(ConfigError, match="guidance must be guided, guided_no_jacobian, hard_prefix"):
        type(policy)(policy.model, policy.flow, policy.chain, {}, policy.device, policy.dtype, guidance="guide")


@pytest.fixture(scope="module", params=["off", "kernels"])
def trained(small_policy, request):
    """As if it were trained to go on from up to two rows. kernels: without the compiler, whose shapes and paddings it has."""
    policy = small_policy.in_memory()
    network = (policy.model, policy.flow, policy.chain, {}, policy.device, policy.dtype)
    made = type(policy)(*network, guidance=HARD_PREFIX, max_delay=2)
    if request.param == "kernels":
        made.sampler.compile = "kernels"
    return made


@pytest.mark.usefixtures("shapes_unchecked")
def test_held_rows_come_back_exactly_and_the_others_depend_on_them(trained, policy, observations):
    seeds, plain = [1, 2, 3, 4], stacked(policy.infer_batch(observations, [1, 2, 3, 4]))
    rows = np.random.default_rng(0).normal(-1, 3, (3, A)).astype(np.float32)
    prefixes = [ActionPrefix(rows, 2), None, ActionPrefix(rows, 1), ActionPrefix(rows, 0)]
    found = stacked(trained.infer_batch(observations, seeds, prefixes=prefixes))
    assert np.array_equal(found[0, :2], rows[:2]) and np.array_equal(found[2, :1], rows[:1])
    # where no row is held, a prefix changes nothing; behind held rows the chunk is another one
    np.testing.assert_allclose(found[[1, 3]], plain[[1, 3]], atol=1e-4)
    assert min(np.abs(found[number, 2:] - plain[number, 2:]).max() for number in (0, 2)) > 1e-3
    np.testing.assert_allclose(stacked(trained.infer_batch(observations, seeds)), plain, atol=1e-4)
    # a held row is of the new observation's own numbers: what it is normalised to, the network was shown
    other = stacked(trained.infer_batch(observations[:1], [1], prefixes=[ActionPrefix(rows[:2], 2)]))
    np.testing.assert_allclose(other[0], found[0], atol=1e-4)


@pytest.mark.usefixtures("shapes_unchecked")
def test_of_a_delay_beyond_training_as_many_rows_are_held_as_were_trained_and_it_is_said_once(trained, observations, caplog):
    rows = np.random.default_rng(0).normal(-1, 3, (3, A)).astype(np.float32)
    long, most = (trained.infer_batch(observations[:1], [1], prefixes=[ActionPrefix(rows, delay)])[0].actions for delay in (3, 2))
    np.testing.assert_array_equal(long, most)
    trained.infer_batch(observations[:1], [1], prefixes=[ActionPrefix(rows, 3)])
    assert caplog.text.count("an inference delay of 3 rows, but the policy was trained to go on from 2: that many are held") == 1


def test_a_policy_that_was_not_trained_for_it_is_refused(small_policy, saved, observations):
    prefix = ActionPrefix(np.zeros((3, A), np.float32), 3)
    with pytest.raises(ConfigError, match=r"hard_prefix needs a policy that was trained .* --rtc.max_delay N, or take guidance guided"):
        bundle.load(saved, guidance=HARD_PREFIX)
    late = small_policy.in_memory()
    late.guidance = HARD_PREFIX
    with pytest.raises(ConfigError, match="hard_prefix needs a policy"):
        late.infer_batch(observations[:1], prefixes=[prefix])


def test_a_bundle_says_for_how_long_a_delay_it_was_trained(small_policy, tmp_path, observations):
    config = replace(small_policy.config, rtc_max_delay=3)
    bundle.save(tmp_path / "bundle", small_policy.weights, config, small_policy.stats)
    policy = bundle.load(tmp_path / "bundle", device="cpu", guidance=HARD_PREFIX)
    assert policy.metadata["rtc_max_delay"] == 3
    rows = np.ones((3, A), np.float32)
    assert np.array_equal(policy.infer_batch(observations[:1], [1], prefixes=[ActionPrefix(rows, 3)])[0].actions[:3], rows)
