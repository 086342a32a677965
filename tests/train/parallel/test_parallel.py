"""Tests of process groups that are closed and created again with other workers, and of their gradients."""

import torch
from forked_workers import workers
from torch import nn
from torch.distributed import FileStore

from pi0fm.train.parallel.accelerate import Parallel
from pi0fm.train.parallel.context import Context


def gradient(parallel: Parallel, network: nn.Module, value: float) -> float:
    """Of the mean of `value * weight` over the workers."""
    wrapped, _ = parallel.prepare(network, torch.optim.SGD(network.parameters(), lr=1.0))
    network.zero_grad()
    parallel.accelerator.backward(wrapped(torch.full((1, 1), value)).sum())
    return float(network.weight.grad)


def test_two_of_three_workers_go_on_without_the_third(tmp_path):
    def body(context: Context) -> list[float]:
        parallel, network = Parallel(context, allow_cuda=False), nn.Linear(1, 1, bias=False)
        rank = torch.tensor(float(context.rank))
        found = [float(parallel.sum(rank)), gradient(parallel, network, 1.0 + context.rank)]
        parallel.close()
        if context.rank == 1:
            return found
        parallel.open(Context(context.rank // 2, 2, shown=False), FileStore(str(tmp_path / "store"), 2))
        parallel.barrier()
        checked = torch.ones(1)
        torch.distributed.all_reduce(checked, group=parallel.host_group("checkpoint"))
        return [*found, float(parallel.sum(rank)), gradient(parallel, network, 1.0 + context.rank), float(checked)]

    first, lost, last = workers(3, tmp_path, body)
    assert lost == [3.0, 2.0]
    assert first == last == [3.0, 2.0, 2.0, 2.0, 2.0]


def test_alone_nothing_is_shared():
    parallel = Parallel(Context(shown=False), allow_cuda=False)
    value = torch.tensor(3.0)
    assert parallel.host_group("stop") is None
    assert parallel.sum(value) == 3.0
    assert parallel.sum(value) is not value
