"""What a run takes on a number of cards before any is rented: seconds of a step, memory, money, and what stops scaling.

Owns: the model of a step. Does not know: how it is shown, the numbers of a card (cards.yaml) and how they were measured.

    a pass      samples x operations / (product rate x efficiency)  +  numbers that train x pass_bytes / copy rate
                + samples x numbers in and out of adapted layers x adapter_bytes / copy rate
    a step      [ forward | backward ] x micro batches, the optimiser, and what of the network shows:

      none        -                      gradients averaged, from the last layer's to the first's, during the last backward pass
      gradients   weights gathered       gradients scattered, every backward pass; under accumulate_whole the last one
      full        weights gathered       weights gathered again, gradients scattered
      replicas                           + rows averaged over the replicas, in the last backward pass

    shown       of a collective that a pass is long enough to hide, all but `overlap`; one unit's part has nothing to run beside

The optimiser reads and writes 32 bytes for each number that trains, 12 more with an average. What is left out: loading, validation,
checkpoints, `compile`, and prompts shorter than their longest.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from typing import Any

import torch
import yaml

from pi0fm.options import nearest
from pi0fm.train.components import AUTO, FULL, GRADIENTS, NONE
from pi0fm.train.config import TrainConfig
from pi0fm.train.plan.flops import training_work
from pi0fm.train.plan.memory import DDP, GIB, SPARE, count_of
from pi0fm.train.plan.network import Network
from pi0fm_client.errors import ConfigError

UPDATE_BYTES, AVERAGE_BYTES, BUCKET_BYTES = 32, 12, 25 * 2**20
PARTS = ("products", "adapters", "weights", "network", "optimizer")
STOPPED_BY = {
    "products": "nothing",
    "adapters": "the adapters",
    "weights": "small micro batches",
    "network": "the network",
    "optimizer": "the optimiser",
}


@dataclass(frozen=True)
class Card:
    """A device as cards.yaml describes it."""

    memory_gib: float
    flops_per_second: float
    bytes_per_second: float
    forward_efficiency: float
    backward_efficiency: float
    adapter_bytes: float
    pass_bytes: float
    update_share: float
    inside: float
    latency: float
    overlap: float
    price: float
    measured: bool = False


@dataclass(frozen=True)
class Plan:
    """One step of a run on `workers` cards. parts: its seconds by PARTS; hours, cost: of all its steps."""

    workers: int
    shard: str
    replicas: int
    micro_batch: int
    micro_steps: int
    global_batch: int
    parts: Mapping[str, float]
    memory_gib: float
    fits: bool
    hours: float
    cost: float

    @property
    def seconds(self) -> float:
        """Of a step."""
        return sum(self.parts.values())

    @property
    def samples_per_second(self) -> float:
        """Of all workers."""
        return self.global_batch / self.seconds

    @property
    def stopped_by(self) -> str:
        """What takes most of the time beside the products; `nothing` where those take most."""
        return STOPPED_BY[max(self.parts, key=lambda part: self.parts[part])]

    def json(self) -> dict[str, Any]:
        """For the last line."""
        shares = {part: seconds / self.seconds for part, seconds in self.parts.items()}
        rates = {"step_seconds": self.seconds, "samples_per_second": self.samples_per_second, "shares": shares}
        names = ("workers", "shard", "replicas", "micro_batch", "micro_steps", "memory_gib", "fits", "hours", "cost", "stopped_by")
        return {name: getattr(self, name) for name in names} | rates


def known_cards() -> dict[str, Card]:
    """The cards of cards.yaml by name."""
    text = (resources.files(__package__) / "cards.yaml").read_text()
    return {name: Card(**values) for name, values in yaml.safe_load(text).items()}


def card_named(name: str) -> Card:
    """One of `known_cards`. Raises ConfigError that names the nearest."""
    cards = known_cards()
    if name not in cards:
        raise ConfigError(f"unknown gpu {name!r}: {nearest(name, list(cards))}")
    return cards[name]


def plan(config: TrainConfig, card: Card, network: Network, workers: int, cameras: int, device: str = "cuda") -> Plan:
    """The step of `config`, whose sharding is decided. Raises ConfigError for a batch or replicas that so many workers cannot share."""
    how, shard = config.adaptation(), config.parallel
    shard.refuse_for(workers)
    computes = torch.float32 if config.precision == "float32" else torch.bfloat16
    of_network = config.network()
    count = count_of(replace(of_network, action_horizon=1, max_prompt_tokens=1), how, computes)  # lengths change no module
    work = training_work(of_network, how, cameras, config.flow_draws_per_observation)
    samples, steps = config.largest_micro_batch(workers), config.micro_steps(workers)
    one_forward = work.forward / (card.flops_per_second * card.forward_efficiency)
    one_backward = (work.backward + work.recomputed) / (card.flops_per_second * card.backward_efficiency)
    adapters = samples * work.adapted * card.adapter_bytes / card.bytes_per_second
    trained, each = count.trained // 4, shard.workers_of_a_state(workers)
    weights = trained * card.pass_bytes / card.bytes_per_second
    forward = samples * one_forward + (adapters + weights) / 3
    backward = samples * one_backward + 2 * (adapters + weights) / 3

    def shown(collective: float, beside: float, units: int) -> float:
        hidden = min(collective * (1 - 1 / units), beside) * card.overlap
        return collective - hidden

    units = len(count.units)
    group, gathered, gradients = network.group(workers, shard.replicas if shard.cuts else 1), count.units, float(count.trained)
    if shard.cuts:
        gather = network.gather(group, sum(unit.gathered for unit in gathered.values()), units)
        scatter = network.scatter(group, gradients, units)
        averaged = network.reduce(network.across(workers, shard.replicas), gradients / each, units)
        again = gather if shard.shard == FULL else 0.0
        last = shown(again + scatter + averaged, backward, units)
        earlier = shown(again + scatter * (not shard.accumulate_whole), backward, units)
        communicated = steps * shown(gather, forward, units) + (steps - 1) * earlier + last
    else:
        buckets = max(1, round(gradients / BUCKET_BYTES))
        communicated = shown(network.reduce(group, gradients, buckets), backward, buckets)
    update = UPDATE_BYTES + AVERAGE_BYTES * (config.ema_decay is not None)
    parts = {
        "products": steps * samples * (one_forward + one_backward),
        "adapters": steps * adapters,
        "weights": steps * weights,
        "network": communicated,
        "optimizer": trained / each * update / (card.bytes_per_second * card.update_share),
    }
    needed = config.memory(cameras, workers, torch.device(device)).total / GIB
    hours = config.steps * sum(parts.values()) / 3600
    name, fits = (shard.shard if shard.cuts else NONE), needed <= (1 - SPARE) * card.memory_gib
    batch = config.global_batch_size
    return Plan(workers, name, shard.replicas, samples, steps, batch, parts, needed, fits, hours, hours * workers * card.price)


def ways(config: TrainConfig, workers: int, per_machine: int) -> Iterator[TrainConfig]:
    """`config` with every sharding that so many workers can have; the one that it asks for, where that is not `auto`."""
    if config.parallel.shard != AUTO or workers == 1:
        yield config if config.parallel.shard != AUTO else replace(config, parallel=DDP)
        return
    yield replace(config, parallel=DDP)
    whole = [replace(config.parallel, shard=shard) for shard in (GRADIENTS, FULL)]
    machines = workers // per_machine
    if machines > 1 and workers % per_machine == 0 and config.parallel.replicas == 1:  # a state for each machine
        whole += [replace(shard, replicas=machines) for shard in whole]
    for shard in whole:
        if workers % shard.replicas == 0 and workers > shard.replicas:
            yield replace(config, parallel=shard)


def best(plans: Sequence[Plan]) -> Plan:
    """The fastest that fits, but DDP where it is as fast within 3 %; where none fits, the one that needs least memory."""
    fitting = [each for each in plans if each.fits]
    if not fitting:
        return min(plans, key=lambda each: each.memory_gib)
    fastest = min(fitting, key=lambda each: each.seconds)
    return next((each for each in fitting if each.shard == NONE and each.seconds <= 1.03 * fastest.seconds), fastest)


def plans_of(config: TrainConfig, card: Card, network: Network, workers: int, cameras: int) -> list[Plan]:
    """Of every sharding that may be chosen for so many workers. Raises what `plan` raises."""
    return [plan(each, card, network, workers, cameras) for each in ways(config, workers, network.per_machine)]


def full_speed(config: TrainConfig, cameras: int, workers: int, device: torch.device) -> float | None:
    """Samples a second at which `workers` cards like this one would multiply at their highest rate; None for one that is not known."""
    if device.type != "cuda" or config.precision == "float32":
        return None
    found = torch.cuda.get_device_name(device).lower().replace(" ", "")
    card = next((card for name, card in known_cards().items() if name in found), None)
    work = training_work(config.network(), config.adaptation(), cameras, config.flow_draws_per_observation)
    return None if card is None else workers * card.flops_per_second / (work.forward + work.backward)


def counts(most: int) -> list[int]:
    """1, 2, 4 and so on up to `most`, and `most`."""
    return sorted({2**power for power in range(most.bit_length())} | {most})
