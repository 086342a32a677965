"""Tests that a compiled policy has few shapes, warm-up covers them all, and padding changes no chunk."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from small_pi0 import LIKE_PI0, LIKE_PI05

from pi0fm.models.config import PI0, PI05
from pi0fm.policy.sampling.buckets import Buckets
from pi0fm.policy.sampling.sampler import Sampler

SEEDS = [1, 2, 3, 4]


def recorded(policy):
    """The policy with graphs whose recording only counts; and the count."""
    calls = []

    def record(call):
        calls.append(call)
        return call

    policy.sampler = Sampler(policy.model, policy.flow, policy.device, policy.dtype, "graph", record)
    return policy, calls


def test_lengths_are_few_and_end_with_the_networks_own():
    assert Buckets(PI0, 3, static=True).prompt_lengths == (16, 24, 40, 48)
    assert Buckets(PI05, 3, static=True).prompt_lengths == (56, 104, 152, 200)
    assert Buckets(LIKE_PI0, 2, static=True).prompt_lengths == (8,)
    assert Buckets(replace(LIKE_PI05, max_prompt_tokens=5), 2, static=True).prompt_lengths == (5,)


def test_after_the_warm_up_no_batch_prompt_or_camera_meets_a_new_shape(small_policy, observations):
    policy, calls = recorded(small_policy.in_memory())
    shapes = policy.warm_up(5)
    warmed = len(calls)
    assert shapes == 4 * 2 * len(policy._buckets.prompt_lengths) and warmed == shapes // 2  # a CPU looks at the mask itself
    prompts = ["x" * length for length in range(1, 24)]
    for batch in range(1, 6):
        for start in range(0, len(prompts) - batch, 3):
            given = [replace(observations[place % 4], prompt=prompts[start + place]) for place in range(batch)]
            policy.infer_batch(given, SEEDS[:1] * batch)
    assert len(calls) == warmed


def test_a_padded_batch_gives_the_same_chunks(small_policy, observations):
    """Three rows stand in four, one of two cameras is missing from all, and prompts are shorter than their bucket."""
    plain = small_policy.in_memory()
    static, _ = recorded(small_policy.in_memory())
    for given in (observations[:3], observations[1:2], observations[2:3], observations):
        expected, found = (policy.infer_batch(given, SEEDS[: len(given)]) for policy in (plain, static))
        for one, other in zip(expected, found, strict=True):
            np.testing.assert_allclose(other.actions, one.actions, rtol=0, atol=1e-4)
    seen = plain.chain.observe(observations[1:2])
    assert seen.images.shape[1] == 1 and static._buckets.padded(seen).images.shape[1] == 2


@pytest.mark.parametrize("rows", [2, 3])
def test_padding_is_undone_by_trimming(small_policy, observations, rows):
    seen = small_policy.in_memory().chain.observe(observations[:rows])
    padded = seen.padded(4, 3, 24)
    assert (padded.images.shape[:2], padded.prompt_tokens.shape) == ((4, 3), (4, 24))
    for name, value in vars(padded.trimmed()).items():
        assert torch.equal(value[:rows], getattr(seen, name)), name
    assert (
        not padded.is_whole()
        and replace(seen, prompt_mask=torch.ones_like(seen.prompt_mask), image_mask=torch.ones_like(seen.image_mask)).is_whole()
    )


def test_best_of_several_is_recorded_for_itself(small_policy, observations):
    plain = small_policy.in_memory()
    static, calls = recorded(small_policy.in_memory())
    static.warm_up(1)
    warmed = len(calls)
    expected, found = (policy.infer_best(observations[:1], noise_seeds=[3])[0] for policy in (plain, static))
    np.testing.assert_allclose(found.actions, expected.actions, rtol=0, atol=1e-4)
    assert found.scores == pytest.approx(expected.scores, rel=1e-3)
    assert len(calls) == warmed + 1


def test_what_is_not_compiled_has_no_shapes_to_make(small_policy):
    assert small_policy.in_memory().warm_up(8) == 0
