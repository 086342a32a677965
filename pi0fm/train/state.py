"""Everything that training changes, as one object: network, optimiser, average, step.

Owns: the order in which it is built, its tensors by name, the weights of the bundle. Does not know: files, data, when it is saved.

    layout on meta -> adapt -> shard -> weights -> optimiser -> average -> restore -> prepare

    model/NAME                  weights and buffers
    moments/NAME/exp_avg(_sq)   AdamW's, by parameter name, independent of order
    moments/step                AdamW's step count, one for all parameters
    average/NAME                the moving average, where one is kept

A sharded state (parallel/sharding.py) has the same names; each worker holds its rows of every tensor except the count.
"""

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import cast, final

import torch
from torch import Tensor, nn

from pi0fm.models.config import Pi0Config
from pi0fm.models.pi0 import Pi0, parameter_count
from pi0fm.train.components import NONE, Adaptation, OptimizerConfig, ParallelConfig
from pi0fm.train.ema import Ema
from pi0fm.train.optim import learning_rate, make_optimizer, set_learning_rate
from pi0fm.train.parallel.accelerate import Parallel
from pi0fm.train.parallel.sharding import Gathered, Sharded, is_sharded, shard
from pi0fm.train.start.adaptation import adapt, plain_weights
from pi0fm.train.start.network import starting_network
from pi0fm.train.start.pretrained import Pretrained


@dataclass(frozen=True)
class StateConfig:
    """Options of a state, apart from the network's sizes. parallel: how it is sharded, with `auto` resolved."""

    seed: int = 0
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    adaptation: Adaptation = field(default_factory=Adaptation)
    ema_decay: float | None = None
    parallel: ParallelConfig = field(default_factory=lambda: ParallelConfig(NONE))


@final
class TrainState:
    """The state after `step` steps.

    network: the plain module, adapters included; trained, optimizer: the network and AdamW as wrapped by accelerate in `prepare`, for
    `train_step`; average: of the trainable weights.
    """

    def __init__(self, network: Pi0, config: StateConfig) -> None:
        self.network, self.config, self.step = network, config, 0
        self._adamw = make_optimizer(config.optimizer, network)
        self.average = Ema(network, config.ema_decay)
        self.trained: Pi0 = network
        self.optimizer: torch.optim.Optimizer = self._adamw

    @classmethod
    def build(cls, network: Pi0Config, config: StateConfig, pretrained: Pretrained | None, parallel: Parallel) -> "TrainState":
        """Build the state before the first step, on the worker's device. Raises ConfigError and BundleError."""

        def cut(model: Pi0) -> None:
            if config.parallel.cuts:
                shard(model, parallel.mesh(config.parallel), config.parallel, parallel.compute_dtype)

        model = starting_network(network, config.adaptation, config.seed, pretrained, parallel.compute_dtype, parallel.device, cut)
        return cls(model, config)

    def prepare(self, parallel: Parallel) -> None:
        """Wrap network and optimiser for training; call it again after `parallel` was opened for other workers."""
        # autocast casts every matrix once per micro batch: 6 ms of a GPU for pi0. With one micro batch a step that is once, and no copy
        # outlives the update; on a CPU, casting small matrices costs less than keeping their copies (docs/LOG.md)
        accumulates = parallel.accelerator.gradient_accumulation_steps > 1
        self.network.cast_once(accumulates and not self.is_sharded and parallel.device.type == "cuda")
        self.network.train()
        wrapped = Sharded(self.network, self.config.parallel.accumulate_whole) if self.is_sharded else self.network
        prepared, self.optimizer = parallel.prepare(wrapped, self._adamw)
        self.trained = cast(Pi0, prepared)

    def schedule(self, steps: int) -> float:
        """Set and return the learning rate of the next step in a run of `steps` steps."""
        rate = learning_rate(self.config.optimizer, self.step, steps)
        set_learning_rate(self.optimizer, rate)
        return rate

    def advance(self) -> None:
        """Count one step, and average in its weights."""
        self.average.update(self.step)
        self.step += 1

    def tensors(self) -> dict[str, Tensor]:
        """Return every tensor by name, live rather than copied; moments exist before the first step."""
        self._adamw.allocate_moments()
        names = {id(parameter): name for name, parameter in self.network.named_parameters()}
        found = {f"model/{name}": value for name, value in self.network.state_dict().items()}
        for parameter, held in self._adamw.state.items():
            name = names[id(parameter)]
            found |= {f"moments/{name}/{moment}": held[moment] for moment in ("exp_avg", "exp_avg_sq")}
            found["moments/step"] = held["step"]
        return found | {f"average/{name}": value for name, value in self.average.average.items()}

    @property
    def is_sharded(self) -> bool:
        """Whether workers hold one state together, so that all must take part in gathering its weights."""
        return is_sharded(self.network)

    def bundle_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the averaged weights of a plain network, adapters merged; of a sharded state gathered, so every worker must iterate."""
        return plain_weights(Gathered(self.network.state_dict() | self.average.weights()), self.config.adaptation)

    def averaged_network(self) -> Pi0:
        """Return the network in evaluation mode with the averaged weights, whose memory it shares, so that it follows their changes.

        Of a sharded state: a network on meta, which has its weights inside `gathered`.
        Avoids `.to(device)`, which would copy: with several workers on CPUs the device is cpu:0, but that of a tensor is cpu.
        """
        if self.is_sharded:
            with torch.device("meta"):
                how = self.config.adaptation
                return adapt(Pi0(self.network.config), Adaptation(how.train_only, how.lora), torch.float32).requires_grad_(False).eval()
        weights = self.average.weights()
        shared = {
            id(parameter): nn.Parameter(weights.get(name, parameter.detach()), requires_grad=False)
            for name, parameter in self.network.named_parameters()
        }
        # the same modules, adapters included, around the given parameters instead of copies
        return copy.deepcopy(self.network, shared).eval()

    @contextmanager
    def gathered(self, averaged: Pi0) -> Iterator[None]:
        """Gather the weights of a sharded state into `averaged_network`'s network for the block; entered by every worker."""
        if not self.is_sharded:
            yield
            return
        averaged.load_state_dict(dict(Gathered(self.network.state_dict() | self.average.weights())), assign=True)
        averaged.requires_grad_(False)
        yield
        averaged.to_empty(device="meta")

    def size(self) -> str:
        """Format the number of trainable parameters, and of all if that differs."""
        total, trained = parameter_count(self.network), _count(self._adamw)
        return f"{trained / 1e6:.2f} M parameters" if trained == total else f"{trained / 1e6:.2f} M of {total / 1e6:.2f} M parameters"


def _count(optimizer: torch.optim.Optimizer) -> int:
    groups: Iterable[Iterable[Tensor]] = (group["params"] for group in optimizer.param_groups)
    return sum(parameter.numel() for group in groups for parameter in group)
