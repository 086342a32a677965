"""Tests of batches as pure functions of the position in the stream, and of the thread that prepares them."""

import dataclasses
import threading
import tracemalloc

import numpy as np
import pytest
import torch

from pi0fm.data.chain import Sample
from pi0fm.data.config import AugmentConfig, LoaderConfig
from pi0fm.data.loading.loader import Batch, Collator, action_chunks, micro_batches
from pi0fm.data.order.counter import slots
from pi0fm_client.errors import ConfigError

GLOBAL_BATCH, STEPS = 8, 5


def joined(batches: list[Batch]) -> dict[str, torch.Tensor]:
    """All rows; prompts are padded to a common length first, since each batch trims its own."""
    names = [field.name for field in dataclasses.fields(Batch) if getattr(batches[0], field.name) is not None]
    columns = {name: [getattr(batch, name) for batch in batches] for name in names}
    seen = columns.pop("observation")
    for field in dataclasses.fields(seen[0]):
        columns[field.name] = [getattr(one, field.name) for one in seen]
    for name in ("prompt_tokens", "prompt_mask"):
        columns[name] = [torch.nn.functional.pad(rows, (0, 32 - rows.shape[1])) for rows in columns[name]]
    return {name: torch.cat(rows) for name, rows in columns.items()}


def stream(collator, world_size: int, micro: int) -> dict[str, torch.Tensor]:
    """All ranks' micro batches, laid back into the order of the stream."""
    parts = [
        list(micro_batches(collator, 0, STEPS, GLOBAL_BATCH, rank, world_size, micro)) for rank in range(world_size)
    ]  # [rank][step * micros + micro]
    micros = GLOBAL_BATCH // world_size // micro
    return joined([parts[rank][step * micros + part] for step in range(STEPS) for rank in range(world_size) for part in range(micros)])


@pytest.mark.parametrize(("world_size", "micro"), [(1, 4), (1, 2), (1, 1), (2, 4), (2, 1), (4, 2), (8, 1)])
def test_the_union_is_the_same_for_any_ranks_and_micro_batches(collator, world_size, micro):
    expected, found = stream(collator, 1, GLOBAL_BATCH), stream(collator, world_size, micro)
    assert found.keys() == expected.keys()
    for name, rows in expected.items():
        assert torch.equal(found[name], rows), name


def test_ranks_see_different_samples_and_noise(collator):
    first, second = (next(micro_batches(collator, 0, 1, GLOBAL_BATCH, rank, 2, 4)) for rank in range(2))
    samples = [set(batch.observation.images[:, 0, 0, 0, 0].tolist()) for batch in (first, second)]
    assert not samples[0] & samples[1]
    assert not torch.isin(first.noise[first.noise != 0], second.noise).any()
    assert not torch.isin(first.uniform, second.uniform).any()


def test_a_restart_goes_on_where_it_was(collator):
    whole = list(micro_batches(collator, 0, STEPS, GLOBAL_BATCH, 0, 1, 4))
    rest = list(micro_batches(collator, 3, STEPS, GLOBAL_BATCH, 0, 1, 4))
    for ours, theirs in zip(joined(rest).values(), joined(whole[6:]).values(), strict=True):
        assert torch.equal(ours, theirs)


def test_the_same_sample_has_other_noise_in_the_next_epoch(collator):
    size = len(collator.source.frames)
    noise = []
    for epoch in range(2):
        at = slots(collator.seed, size, epoch * size, size)
        noise.append(collator(epoch * size + int(np.flatnonzero(at.index == 5)[0]), 1).noise)
    assert not torch.isin(noise[0][noise[0] != 0], noise[1]).any()


def test_a_batch_holds_what_its_samples_are(collator):
    source = collator.source
    batch = collator(0, 17)
    frames = batch.observation.images[:, 0, 0, 0, 0].numpy()
    assert sorted(frames) == list(range(17))
    assert batch.observation.image_mask.all()
    for row, frame in enumerate(frames):
        steps = np.minimum(np.arange(frame, frame + 4), source.end[frame] - 1)
        actions = collator.chain.inverse(Sample(batch.observation.state[row : row + 1].numpy(), batch.actions[row : row + 1].numpy()))
        np.testing.assert_allclose(actions.actions[0], source.action[steps], atol=1e-4)
        np.testing.assert_allclose(actions.state[0], source.state[frame], atol=1e-5)
        tokens, mask = batch.observation.prompt_tokens[row], batch.observation.prompt_mask[row]
        assert bytes((tokens[mask] - 3).tolist()).decode() == source.tasks[source.task[frame]] + "\n"


def test_mask_ends_with_the_episode_and_with_the_robots_dimensions(collator):
    batch = collator(0, 17)
    frames = batch.observation.images[:, 0, 0, 0, 0].numpy()
    for row, frame in enumerate(frames):
        valid = min(4, collator.source.end[frame] - frame)
        expected = np.zeros((4, 5), dtype=bool)
        expected[:valid, :2] = True
        assert np.array_equal(batch.action_mask[row], expected)
    assert not batch.actions[..., 2:].any()
    assert not batch.noise[..., 2:].any()  # the padded dimensions are 0 at every flow time, in training as in sampling
    assert batch.noise[..., :2].all()


def test_every_flow_draw_is_another_and_the_first_ones_do_not_depend_on_their_number(collator):
    """K draws: K x B noises and times that are all different; the rest of the batch is that of one draw."""
    one, three = (dataclasses.replace(collator, flow_draws=draws)(5, 6) for draws in (1, 3))
    assert three.noise.shape == (6, 3, 4, 5) and three.uniform.shape == (6, 3)
    assert len(three.noise[..., :2].unique()) == 6 * 3 * 4 * 2
    assert len(three.uniform.unique()) == 6 * 3
    assert torch.equal(three.noise[:, :1], one.noise) and torch.equal(three.uniform[:, :1], one.uniform)
    assert torch.equal(three.actions, one.actions) and torch.equal(three.action_mask, one.action_mask)
    assert torch.equal(three.observation.images, one.observation.images)


def test_flow_draws_are_the_same_for_any_ranks_and_micro_batches(collator):
    several = dataclasses.replace(collator, flow_draws=3)
    expected, found = stream(several, 1, GLOBAL_BATCH), stream(several, 2, 2)
    for name, rows in expected.items():
        assert torch.equal(found[name], rows), name


@pytest.mark.parametrize(("first", "count"), [(0, 8), (5, 20), (13, 40)])
def test_valid_elements_counts_the_mask(collator, first, count):
    assert collator.valid_elements(first, count) == int(collator(first, count).action_mask.sum())


def test_delays_are_a_function_of_the_sample_and_spread_evenly(collator):
    """The same for any split; the count of valid entries is without the rows that they hold; without them there are none."""
    held = dataclasses.replace(collator, flow_draws=2, max_delay=3)
    expected, found = stream(held, 1, GLOBAL_BATCH), stream(held, 2, 2)
    for name, rows in expected.items():
        assert torch.equal(found[name], rows), name
    batch = held(0, 400)
    assert batch.delays.shape == (400, 2) and collator(0, 2).delays is None
    shares = torch.bincount(batch.delays.flatten()) / 800
    assert len(shares) == 4 and (shares - 0.25).abs().max() < 0.06
    free = torch.arange(batch.actions.shape[1]) >= batch.delays[:, :, None]
    counted = int((batch.action_mask[:, None] & free[..., None]).sum())
    assert held.valid_elements(0, 400) == counted < 2 * int(batch.action_mask.sum())
    # noise and flow times are what they are without
    assert torch.equal(batch.noise, dataclasses.replace(collator, flow_draws=2)(0, 400).noise)


def test_chunks_by_hand():
    action = np.arange(6, dtype=np.float32)[:, None]
    end = np.array([4, 4, 4, 4, 6, 6])
    found, inside = action_chunks(action, end, np.array([0, 2, 5]), 3)
    assert found[..., 0].tolist() == [[0, 1, 2], [2, 3, 3], [5, 5, 5]]
    assert inside.tolist() == [[True] * 3, [True, True, False], [True, False, False]]


def test_an_error_in_the_thread_is_raised_where_the_batch_is_asked_for(broken_collator):
    batches = micro_batches(broken_collator, 0, STEPS, GLOBAL_BATCH, 0, 1, GLOBAL_BATCH)
    with pytest.raises(IndexError):
        list(batches)
    assert not loader_threads()


def loader_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("pi0fm-loader")]


def test_the_thread_ends_when_its_reader_stops_early(collator):
    batches = micro_batches(collator, 0, 1000, GLOBAL_BATCH, 0, 1, 2)
    next(batches)
    assert len(loader_threads()) == 1
    batches.close()
    assert not loader_threads()


def test_the_thread_ends_with_the_last_batch(collator):
    assert len(list(micro_batches(collator, 0, 2, GLOBAL_BATCH, 0, 1, GLOBAL_BATCH))) == 2
    assert not loader_threads()


def test_to_moves_every_tensor(collator):
    moved = collator(0, 2).to(torch.device("meta"))
    assert all(getattr(moved, name).is_meta for name in ("actions", "action_mask", "noise", "uniform"))
    assert moved.observation.images.is_meta


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_change_nothing_but_speed(collator, threads):
    expected = stream(collator, 1, GLOBAL_BATCH)
    config = LoaderConfig(threads=threads, ahead=3)
    found = joined(list(micro_batches(collator, 0, STEPS, GLOBAL_BATCH, 0, 1, 2, config)))
    for name, rows in expected.items():
        assert torch.equal(found[name], rows), name


def test_no_more_batches_exist_than_was_said(collator):
    made = []

    @dataclasses.dataclass(frozen=True)
    class Counting(Collator):
        def __call__(self, first: int, count: int) -> Batch:
            made.append(first)
            return super().__call__(first, count)

    values = {item.name: getattr(collator, item.name) for item in dataclasses.fields(Collator) if item.init}
    config = LoaderConfig(threads=2, ahead=3)
    batches = micro_batches(Counting(**values), 0, 1000, GLOBAL_BATCH, 0, 1, 2, config)
    for taken in range(1, 6):
        next(batches)
        assert len(made) <= taken + config.threads + config.ahead
    batches.close()


def test_counts_are_ready_when_the_step_asks(collator, monkeypatch):
    batches = micro_batches(collator, 0, 3, GLOBAL_BATCH, 0, 1, GLOBAL_BATCH)
    expected = [int(batch.action_mask.sum()) for batch in batches]
    monkeypatch.setattr(Collator, "count_valid", lambda *_: pytest.fail("looked up again"))
    assert [collator.valid_elements(step * GLOBAL_BATCH, GLOBAL_BATCH) for step in range(3)] == expected
    assert not collator._counts


def test_counts_that_nobody_asks_for_do_not_pile_up_and_another_source_has_its_own(collator):
    for step in range(200):
        collator.count_ahead(step, 1)
    assert len(collator._counts) <= 64
    assert not dataclasses.replace(collator)._counts


def test_memory_stays_flat(collator, shapes_unchecked):
    """What is allocated after 20 batches and after 100 differs by far less than the 80 batches between."""
    batches = micro_batches(collator, 0, 105, GLOBAL_BATCH, 0, 1, GLOBAL_BATCH)
    tracemalloc.start()
    try:
        held = []
        for number, batch in enumerate(batches):
            size = sum(tensor.nbytes for tensor in batch.tensors())
            if number in (20, 100):
                held.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
    assert held[1] - held[0] < 80 * size / 4


def test_augmentation_is_a_function_of_the_place_in_the_stream(collator):
    augmented = dataclasses.replace(collator, augmentation=AugmentConfig())
    whole = augmented(3, 6).augmented()
    parts = [augmented(first, 2).augmented() for first in (3, 5, 7)]
    assert torch.equal(whole.observation.images, torch.cat([part.observation.images for part in parts]))
    assert not torch.equal(whole.observation.images, collator(3, 6).observation.images)
    assert torch.equal(whole.actions, collator(3, 6).actions) and torch.equal(whole.noise, collator(3, 6).noise)
    assert collator(0, 1).augmented().augmentation is None


def test_options_of_the_loader_out_of_range():
    with pytest.raises(ConfigError, match=r"loader\.threads must be >= 1"):
        LoaderConfig(threads=0)
