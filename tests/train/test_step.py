"""Tests of a step: loss and gradient of the global batch for every split; padded entries have no effect."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import tiny_dataset
import torch
from forked_workers import workers

from pi0fm.data.loading.loader import Batch
from pi0fm.data.order.split import micro_steps, split
from pi0fm.flow.config import FlowConfig
from pi0fm.flow.matching import FlowMatching
from pi0fm.models.observation import ModelObservation
from pi0fm.models.pi0 import Pi0
from pi0fm.train.parallel.accelerate import Parallel, make_accelerator
from pi0fm.train.parallel.context import Context
from pi0fm.train.step import train_step
from pi0fm_client.errors import ConfigError

FLOW = FlowMatching.from_config(FlowConfig())


def batch(draws: int = 1) -> Batch:
    """Eight samples of 4 steps and 5 dimensions, of which 3 are real; sample k has 1 + k % 4 valid steps, and `draws` flow draws."""
    random = torch.Generator().manual_seed(0)
    observation = ModelObservation(
        images=torch.randint(0, 256, (8, 1, 32, 32, 3), dtype=torch.uint8, generator=random),
        image_mask=torch.ones(8, 1, dtype=torch.bool),
        prompt_tokens=torch.randint(3, 200, (8, 8), generator=random),
        prompt_mask=torch.ones(8, 8, dtype=torch.bool),
        state=torch.randn(8, 6, generator=random),
    )
    real = torch.arange(5) < 3
    mask = (torch.arange(4) <= torch.arange(8)[:, None] % 4)[:, :, None] & real
    actions = torch.randn(8, 4, 5, generator=random) * real
    noise = torch.randn(8, draws, 4, 5, generator=random) * real
    return Batch(observation, actions, mask, noise, torch.rand(8, draws, generator=random))


def one_draw(whole: Batch, number: int) -> Batch:
    """The batch with draw `number` alone."""
    return replace(whole, noise=whole.noise[:, number : number + 1], uniform=whole.uniform[:, number : number + 1])


def cut(whole: Batch, start: int, count: int) -> Batch:
    """Samples start .. start + count - 1."""

    def part(value: torch.Tensor) -> torch.Tensor:
        return value[start : start + count]

    seen = ModelObservation(**{name: part(value) for name, value in vars(whole.observation).items()})
    arrays = {name: part(getattr(whole, name)) for name in ("actions", "action_mask", "noise", "uniform")}
    return Batch(seen, **arrays, delays=None if whole.delays is None else part(whole.delays))


def parts(whole: Batch, size: int) -> Iterator[Batch]:
    for start in range(0, 8, size):
        yield cut(whole, start, size)


def model() -> Pi0:
    torch.manual_seed(0)
    return Pi0(tiny_dataset.network())


def step(whole: Batch, micro: int) -> tuple[float, float, dict[str, torch.Tensor]]:
    """(loss, norm, gradients): with a rate of 1 and no clipping, plain descent moves each weight by its gradient."""
    network, accelerator = model(), make_accelerator("float32", 8 // micro, allow_cuda=False)
    before = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
    wrapped, optimizer = accelerator.prepare(network, torch.optim.SGD(network.parameters(), lr=1.0))
    loss, norm = train_step(wrapped, FLOW, optimizer, accelerator, parts(whole, micro), valid_elements(whole), 1e9)
    return float(loss), float(norm), {name: before[name] - parameter.detach() for name, parameter in network.named_parameters()}


def valid_elements(whole: Batch) -> int:
    return int(counted(whole).sum())


def counted(whole: Batch) -> torch.Tensor:
    """[B, K, H, A], the entries that the loss counts."""
    delays = torch.zeros_like(whole.uniform) if whole.delays is None else whole.delays
    return whole.action_mask[:, None] & (torch.arange(4) >= delays[..., None])[..., None]


def by_hand(whole: Batch) -> tuple[torch.Tensor, Pi0]:
    """The mean over the valid elements and the draws of the whole batch; a separate pass for each draw, held rows at t = 1."""
    network = model()
    delays = torch.zeros_like(whole.uniform) if whole.delays is None else whole.delays
    errors = []
    for noise, uniform, delay, real in zip(*(each.unbind(1) for each in (whole.noise, whole.uniform, delays, counted(whole))), strict=True):
        t = torch.where(torch.arange(4) < delay[:, None], 1.0, FLOW.times(uniform)[:, None])
        x_t = (1 - t)[..., None] * noise + t[..., None] * whole.actions
        times = FLOW.times(uniform) if whole.delays is None else t
        errors.append(((network(whole.observation, x_t, times) - (whole.actions - noise)) ** 2)[real])
    return torch.cat(errors).mean(), network


DELAYS = torch.tensor([[0, 1, 2, 3, 1, 0, 2, 1], [3, 0, 0, 1, 0, 2, 1, 0], [0, 0, 1, 2, 0, 1, 0, 3]]).T


@pytest.mark.parametrize(("micro", "draws", "held"), [(8, 1, 0), (4, 1, 0), (1, 1, 0), (8, 3, 0), (2, 3, 0), (8, 1, 1), (2, 3, 1)])
def test_loss_and_gradient_are_those_of_the_whole_batch(micro, draws, held):
    """However it is cut, and with K draws on one encoding as with K separate passes; of a policy for real-time chunking too."""
    whole = replace(batch(draws), delays=DELAYS[:, :draws]) if held else batch(draws)
    loss, norm, gradients = step(whole, micro)
    expected, network = by_hand(whole)
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    total = torch.sqrt(sum(parameter.grad.square().sum() for parameter in network.parameters()))
    assert norm == pytest.approx(float(total), rel=1e-4)
    for name, parameter in network.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert float((gradients[name] - parameter.grad).abs().max()) < 2e-5 * max(1.0, float(parameter.grad.abs().max())), name


def test_the_gradient_of_several_draws_is_the_mean_of_theirs():
    whole = batch(3)
    loss, _, gradients = step(whole, 8)
    alone = [step(one_draw(whole, number), 8) for number in range(3)]
    assert len({round(one[0], 6) for one in alone}) == 3, "each draw has a loss of its own"
    assert loss == pytest.approx(sum(one[0] for one in alone) / 3, rel=1e-5)
    for name, found in gradients.items():
        mean = sum(one[2][name] for one in alone) / 3
        assert float((found - mean).abs().max()) < 2e-5 * max(1.0, float(mean.abs().max())), name


@pytest.mark.usefixtures("shapes_unchecked")  # DistributedDataParallel is no Pi0
@pytest.mark.parametrize("micro", [None, 2])
def test_workers_with_unequal_shares_make_the_gradient_of_one(tmp_path, micro):
    """Eight samples over three workers: 2, 3 and 3."""
    whole = batch(2)

    def body(context: Context) -> tuple[float, float, dict[str, np.ndarray]]:
        steps = micro_steps(8, 3, micro)
        network, parallel = model(), Parallel(context, "float32", steps, allow_cuda=False)
        before = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
        wrapped, optimizer = parallel.prepare(network, torch.optim.SGD(network.parameters(), lr=1.0))
        mine = (cut(whole, start, count) for start, count in split(8, context.rank, 3, micro))
        part, norm = train_step(wrapped, FLOW, optimizer, parallel.accelerator, mine, valid_elements(whole), 1e9)
        found = {name: (before[name] - parameter.detach()).numpy() for name, parameter in network.named_parameters()}
        return float(parallel.sum(part)), float(norm), found

    loss, norm, gradients = step(whole, 8)
    for theirs in workers(3, tmp_path, body):
        assert theirs[0] == pytest.approx(loss, rel=1e-5)
        assert theirs[1] == pytest.approx(norm, rel=1e-4)
        for name, found in theirs[2].items():
            assert np.abs(found - gradients[name].numpy()).max() < 2e-5 * max(1.0, float(gradients[name].abs().max())), name


def test_padded_dimensions_teach_nothing():
    _, _, gradients = step(batch(), 8)
    assert not gradients["action_out.weight"][3:].any()
    assert not gradients["action_out.bias"][3:].any()
    assert gradients["action_out.weight"][:3].any()
    assert not gradients["action_in.weight"][:, 3:].any()


def test_what_is_aimed_at_in_padded_entries_is_not_read():
    """With the network's inputs held, other targets behind the mask give the same loss and gradient."""
    whole = batch()
    t = FLOW.times(whole.uniform[:, 0])
    pair = FLOW.training_pair(whole.actions, t, whole.noise[:, 0])
    found = []
    for wild in (0.0, 1e6, float("nan")):
        network = model()
        target = torch.where(whole.action_mask, pair.target, torch.full_like(pair.target, wild))
        total, count = FLOW.loss(network(whole.observation, pair.x_t, t), target, whole.action_mask, t)
        (total / count).backward()
        found.append([(total / count).item(), *(parameter.grad for parameter in network.parameters())])
    for other in found[1:]:
        assert other[0] == found[0][0]
        assert all(torch.equal(a, b) for a, b in zip(found[0][1:], other[1:], strict=True))


def test_every_valid_element_weighs_the_same():
    """A sample with one valid step counts a quarter of one with four: not the mean of the samples' means."""
    whole = batch()
    errors = []
    with torch.no_grad():
        for one in parts(whole, 1):
            errors.append((by_hand(one)[0].item(), int(one.action_mask.sum())))
    weighted = sum(error * count for error, count in errors) / sum(count for _, count in errors)
    assert step(whole, 8)[0] == pytest.approx(weighted, rel=1e-5)
    assert abs(weighted - float(np.mean([error for error, _ in errors]))) > 1e-4


def test_clipping_bounds_the_step():
    whole, network, accelerator = batch(), model(), make_accelerator("float32", 1, allow_cuda=False)
    before = [parameter.detach().clone() for parameter in network.parameters()]
    wrapped, optimizer = accelerator.prepare(network, torch.optim.SGD(network.parameters(), lr=1.0))
    _, norm = train_step(wrapped, FLOW, optimizer, accelerator, iter([whole]), valid_elements(whole), 0.01)
    moved = torch.sqrt(sum((a - b).square().sum() for a, b in zip(before, network.parameters(), strict=True)))
    assert float(norm) > 0.01, "the norm is that before clipping"
    assert moved.item() == pytest.approx(0.01, rel=1e-3)


def test_a_second_precision_in_one_process_is_refused_in_one_line():
    make_accelerator("float32", 1, allow_cuda=False)
    with pytest.raises(ConfigError) as caught:
        make_accelerator("bfloat16", 1, allow_cuda=False)
    assert str(caught.value) == (
        "all runs of a process share precision and device: the first had float32 on cpu, found bfloat16 on cpu; start another process"
    )
    make_accelerator("float32", 2, allow_cuda=False)


def test_a_batch_without_one_camera_trains():
    whole = batch()
    blind = replace(whole, observation=replace(whole.observation, image_mask=torch.zeros(8, 1, dtype=torch.bool)))
    loss, _, gradients = step(blind, 8)
    assert np.isfinite(loss)
    assert not gradients["vision.projector.weight"].any()
