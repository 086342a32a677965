"""Batches as pure functions of their place in the stream, whoever asks; and the thread that prepares them."""

import dataclasses
import threading

import numpy as np
import pytest
import torch

from pi0fm.data.loader import Batch, action_chunks, micro_batches
from pi0fm.data.sampler import slots
from pi0fm.data.transforms import Sample

GLOBAL_BATCH, STEPS = 8, 5


def joined(batches: list[Batch]) -> dict[str, torch.Tensor]:
    """All rows; prompts are padded to a common length first, since each batch trims its own."""
    columns = {field.name: [getattr(batch, field.name) for batch in batches] for field in dataclasses.fields(Batch)}
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
    return [thread for thread in threading.enumerate() if thread.name == "pi0fm-loader"]


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
