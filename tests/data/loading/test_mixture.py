"""Tests of several data sets in one stream: their shares, their orders, one batch for one network."""

from dataclasses import replace

import numpy as np
import pytest
import tiny_dataset
import torch

from pi0fm.data.chain import make_chain
from pi0fm.data.columns.embodiment import Embodiment
from pi0fm.data.columns.lerobot_source import open_source
from pi0fm.data.columns.norm_stats import compute_norm_stats
from pi0fm.data.config import AugmentConfig, MixtureEntry
from pi0fm.data.loading.loader import micro_batches
from pi0fm.data.loading.mixture import MixtureCollator, part_seed, sample_order
from pi0fm.data.order.orders import deal, weighted
from pi0fm.data.pictures.frame_cache import FrameCache
from pi0fm_client.errors import ConfigError, DatasetError


@pytest.fixture
def other(collator):
    """Another robot: one action dimension, two cameras, pictures 100 + frame and 200 + frame."""
    source = replace(
        collator.source,
        embodiment=Embodiment(cameras={"wrist": "w", "base": "b"}, state_dim=2, robot_action_dim=1),
        state=collator.source.state[:, :2] * 50,
        action=collator.source.action[:, :1] * 10,
        tasks=("go", "a much longer instruction"),
    )
    pictures = collator.cache.cameras[0]
    chain = make_chain(
        source.embodiment,
        compute_norm_stats(source.state, source.action, source.end, (), 4),
        collator.chain.tokenizer,
        normalization="z_score",
        floor=1e-3,
        image_size=8,
        padded_state_dim=4,
        padded_action_dim=5,
    )
    return replace(collator, source=source, chain=chain, cache=FrameCache((pictures + 100, pictures + 200)), seed=part_seed(7, 1))


@pytest.fixture
def mixture(collator, other) -> MixtureCollator:
    return MixtureCollator((collator, other), (3.0, 1.0))


@pytest.mark.parametrize("weights", [(1.0,), (1.0, 1.0), (4.0, 2.0, 1.0), (0.1, 5.0, 0.7, 2.2)])
def test_every_prefix_has_each_data_sets_share(weights):
    which, own = deal(weights, np.arange(5000))
    shares = np.array(weights) / sum(weights)
    for part, share in enumerate(shares):
        taken = np.cumsum(which == part)
        assert np.abs(taken - share * np.arange(1, 5001)).max() <= len(weights)
        assert own[which == part].tolist() == list(range(taken[-1]))  # its own stream: complete and in order


def test_a_position_means_the_same_whoever_asks():
    which, own = deal((4.0, 2.0, 1.0), np.arange(3000))
    late = np.array([2900, 17, 1500])
    assert np.array_equal(deal((4.0, 2.0, 1.0), late)[0], which[late])
    assert np.array_equal(deal((4.0, 2.0, 1.0), late)[1], own[late])


def test_weights_too_far_apart_are_refused():
    with pytest.raises(ConfigError, match="within a factor of a million"):
        deal((1e-7, 1.0), np.arange(3))


def test_a_batch_holds_each_parts_own_samples(mixture, collator, other):
    batch = mixture(5, 12)
    which, own = deal(mixture.weights, np.arange(5, 17))
    assert mixture.cameras == ("base", "wrist")
    for row, (part, position) in enumerate(zip(which, own, strict=True)):
        alone = (collator, other)[part](int(position), 1)
        for name in ("actions", "action_mask", "noise", "uniform"):
            assert torch.equal(getattr(batch, name)[row], getattr(alone, name)[0]), name
        assert torch.equal(batch.observation.state[row], alone.observation.state[0])
        tokens = alone.observation.prompt_tokens[0][alone.observation.prompt_mask[0]]
        assert torch.equal(batch.observation.prompt_tokens[row][batch.observation.prompt_mask[row]], tokens)
        assert batch.observation.image_mask[row].tolist() == [[True, False], [True, True]][part]
        slots = [[0], [1, 0]][part]
        assert torch.equal(batch.observation.images[row, slots], alone.observation.images[0])
    assert not batch.observation.images[np.flatnonzero(which == 0), 1].any()


def test_the_union_over_workers_and_the_count_of_valid_entries(mixture):
    whole = list(micro_batches(mixture, 0, 3, 8, 0, 1, 8))
    parts = [list(micro_batches(mixture, 0, 3, 8, rank, 2, 4)) for rank in range(2)]
    for step, batch in enumerate(whole):
        assert torch.equal(batch.actions, torch.cat([parts[rank][step].actions for rank in range(2)]))
        assert mixture.valid_elements(step * 8, 8) == int(batch.action_mask.sum())


def test_delays_of_every_part_are_its_own(collator, other):
    parts = tuple(replace(part, max_delay=2) for part in (collator, other))
    batch, counted = MixtureCollator(parts, (1.0, 1.0))(0, 8), MixtureCollator(parts, (1.0, 1.0)).valid_elements(0, 8)
    which, numbers = deal((1.0, 1.0), np.arange(8))
    for row, (part, number) in enumerate(zip(which.tolist(), numbers.tolist(), strict=True)):
        assert torch.equal(batch.delays[row], parts[part](number, 1).delays[0])
    free = torch.arange(batch.actions.shape[1]) >= batch.delays
    assert counted == int((batch.action_mask & free[..., None]).sum())
    with pytest.raises(ConfigError, match="one network"):
        MixtureCollator((parts[0], other), (1.0, 1.0))


def test_augmentation_of_one_part_leaves_the_other_as_it_is(collator, other):
    half = MixtureCollator((collator, replace(other, augmentation=AugmentConfig())), (1.0, 1.0))
    batch = half(0, 8)
    changed = (batch.augmented().observation.images != batch.observation.images).flatten(2).any(-1)
    which, _ = deal((1.0, 1.0), np.arange(8))
    assert not changed[which == 0].any() and changed[which == 1].all()


def test_parts_need_seeds_of_their_own_and_one_network(collator, other):
    for parts, weights in (((collator, replace(other, seed=7)), (1.0, 1.0)), ((collator, replace(other, action_horizon=3)), (1.0, 1.0))):
        with pytest.raises(ConfigError, match="different seeds"):
            MixtureCollator(parts, weights)
    with pytest.raises(ConfigError, match="one weight per data set"):
        MixtureCollator((collator,), (1.0, 1.0))
    assert len({part_seed(7, part) for part in range(50)}) == 50


def test_filters_of_episodes(tiny_config):
    """Lengths 12, 9, 7; the second episode has a different prompt."""

    def kept(**filters) -> list[int]:
        source = open_source(tiny_config, Embodiment(), MixtureEntry(**filters).selection())
        assert len(source.frames) == len(source.state)
        return np.unique(source.episode).tolist()

    assert kept() == [0, 1, 2]
    assert kept(exclude_episodes=(1,)) == [0, 2]
    assert kept(tasks=(tiny_dataset.PROMPTS[1],)) == [1]
    assert kept(min_frames=8) == [0, 1]
    for filters, text in (
        ({"exclude_episodes": (7,)}, r"must lie in 0\.\.2, found \[7\]"),
        ({"tasks": ("press the buttn",)}, "has no instruction 'press the buttn': .*press the button"),
        ({"min_frames": 19}, "leave no episode"),
    ):
        with pytest.raises(ConfigError, match=text):
            kept(**filters)


def test_weights_of_tasks_and_of_a_column(tiny_source):
    prompt = tiny_dataset.PROMPTS[1]
    by_task = sample_order(tiny_source, MixtureEntry(task_weights={prompt: 3.0}))
    expected = np.where(tiny_source.task == tiny_source.tasks.index(prompt), 3.0, 1.0)
    np.testing.assert_allclose(np.diff(by_task.cumulative, prepend=0), expected)
    by_column = sample_order(tiny_source, MixtureEntry(weight_column="seed"))
    np.testing.assert_allclose(np.diff(by_column.cumulative, prepend=0), 100 + tiny_source.episode)
    assert sample_order(tiny_source, MixtureEntry()) is None
    with pytest.raises(DatasetError, match=r"has no column 'sead' to weigh samples by: .*seed"):
        sample_order(tiny_source, MixtureEntry(weight_column="sead"))


def test_weights_of_samples_need_the_cache(collator):
    class Streamed(FrameCache):
        look_ahead = 8

    with pytest.raises(ConfigError, match="sample weights need every picture at hand"):
        replace(collator, cache=Streamed(collator.cache.cameras), order=weighted(np.ones(17)))


def test_a_weighted_collator_draws_by_weight_with_other_noise_each_time(collator):
    weights = np.zeros(17)
    weights[4] = 1.0
    batch = replace(collator, order=weighted(weights))(0, 17)
    assert (batch.observation.images == 4).all()
    assert len(batch.noise[..., :2].unique()) == 17 * 4 * 2
