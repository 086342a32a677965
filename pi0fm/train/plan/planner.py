"""Plan of a run on a number of cards, before any is rented: seconds of a step, memory, cost, and what limits scaling.

Owns: the model of a step. Does not know: how it is shown, the figures of a card (cards.yaml) and how they were measured.

    a pass      samples x operations / (product rate x efficiency)  +  trainable numbers x pass_bytes / copy rate
                + samples x numbers in and out of adapted layers x adapter_bytes / copy rate
    a step      [ forward | backward ] x micro batches, the optimiser, and the communication that is not hidden:

      none        -                      gradients averaged, from the last layer's to the first's, during the last backward pass
      gradients   weights gathered       gradients scattered, every backward pass; under accumulate_whole the last one
      full        weights gathered       weights gathered again, gradients scattered
      replicas                           + rows averaged over the replicas, in the last backward pass

    shown       the part of a collective that is not hidden: a pass hides at most `overlap` of it, and never the part of one unit

The optimiser reads and writes 32 bytes for each trainable number, 12 more with an average. Not modelled: loading, validation, checkpoints,
`compile`, and prompts shorter than the longest.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from typing import TYPE_CHECKING, Any

import yaml

from pi0fm.options import nearest
from pi0fm.train.components import AUTO, DDP, FULL, GRADIENTS, NONE
from pi0fm.train.config import TrainConfig
from pi0fm.train.plan.network import Network
from pi0fm_client.errors import ConfigError

if TYPE_CHECKING:  # seconds, which the options of pi0fm plan need not wait for
    import torch

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
    """Device with the figures of cards.yaml, which explains them."""

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
    """One step of a run on `workers` cards. parts: seconds by PARTS; hours, cost (US dollars): of the whole run."""

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
        """Seconds of a step."""
        return sum(self.parts.values())

    @property
    def samples_per_second(self) -> float:
        """Samples per second of all workers."""
        return self.global_batch / self.seconds

    @property
    def stopped_by(self) -> str:
        """The largest part of a step in words; `nothing` where that is the products."""
        return STOPPED_BY[max(self.parts, key=lambda part: self.parts[part])]

    def json(self) -> dict[str, Any]:
        """Return the plan as JSON values, for the command's last line."""
        shares = {part: seconds / self.seconds for part, seconds in self.parts.items()}
        rates = {"step_seconds": self.seconds, "samples_per_second": self.samples_per_second, "shares": shares}
        names = ("workers", "shard", "replicas", "micro_batch", "micro_steps", "memory_gib", "fits", "hours", "cost", "stopped_by")
        return {name: getattr(self, name) for name in names} | rates


def known_cards() -> dict[str, Card]:
    """Return the cards of cards.yaml by name."""
    text = (resources.files(__package__) / "cards.yaml").read_text()
    return {name: Card(**values) for name, values in yaml.safe_load(text).items()}


def card_named(name: str) -> Card:
    """Return one of `known_cards`. Raises ConfigError that names the nearest."""
    cards = known_cards()
    if name not in cards:
        raise ConfigError(f"unknown gpu {name!r}: {nearest(name, list(cards))}")
    return cards[name]


def plan(config: TrainConfig, card: Card, network: Network, workers: int, cameras: int, device: str = "cuda") -> Plan:
    """Plan a step of `config`, whose sharding is resolved. Raises ConfigError where the workers cannot share the batch or the replicas."""
    import torch

    from pi0fm.train.plan.flops import training_work
    from pi0fm.train.plan.memory import GIB, SPARE, count_network

    how, shard = config.adaptation(), config.parallel
    shard.refuse_for(workers)
    computes = torch.float32 if config.precision == "float32" else torch.bfloat16
    of_network = config.network()
    count = count_network(replace(of_network, action_horizon=1, max_prompt_tokens=1), how, computes)  # lengths change no module
    work = training_work(of_network, how, cameras, config.flow_draws_per_observation)
    samples, steps = config.largest_micro_batch(workers), config.micro_steps(workers)
    one_forward = work.forward / (card.flops_per_second * card.forward_efficiency)
    one_backward = (work.backward + work.recomputed) / (card.flops_per_second * card.backward_efficiency)
    adapters = samples * work.adapted * card.adapter_bytes / card.bytes_per_second
    trained, each = count.trained // 4, shard.workers_of_a_state(workers)
    weights = trained * card.pass_bytes / card.bytes_per_second
    forward = samples * one_forward + (adapters + weights) / 3
    backward = samples * one_backward + 2 * (adapters + weights) / 3

    def shown(collective: float, computation: float, units: int) -> float:
        hidden = min(collective * (1 - 1 / units), computation) * card.overlap
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


def possible_shardings(config: TrainConfig, workers: int, per_machine: int) -> Iterator[TrainConfig]:
    """Yield `config` with every sharding possible for `workers`; only its sharding where that is not `auto`."""
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


def best_plan(plans: Sequence[Plan]) -> Plan:
    """Return the fastest plan that fits, or DDP if within 3 % of it; where none fits, the one that needs least memory."""
    fitting = [each for each in plans if each.fits]
    if not fitting:
        return min(plans, key=lambda each: each.memory_gib)
    fastest = min(fitting, key=lambda each: each.seconds)
    return next((each for each in fitting if each.shard == NONE and each.seconds <= 1.03 * fastest.seconds), fastest)


def plan_shardings(config: TrainConfig, card: Card, network: Network, workers: int, cameras: int) -> list[Plan]:
    """Return the plan of every sharding possible for `workers`. Raises what `plan` raises."""
    return [plan(each, card, network, workers, cameras) for each in possible_shardings(config, workers, network.per_machine)]


def full_speed(config: TrainConfig, cameras: int, workers: int, device: "torch.device") -> float | None:
    """Return the samples per second of `workers` cards like this one at their peak product rate; None for an unknown card."""
    if device.type != "cuda" or config.precision == "float32":
        return None
    import torch

    from pi0fm.train.plan.flops import training_work

    found = torch.cuda.get_device_name(device).lower().replace(" ", "")
    card = next((card for name, card in known_cards().items() if name in found), None)
    work = training_work(config.network(), config.adaptation(), cameras, config.flow_draws_per_observation)
    return None if card is None else workers * card.flops_per_second / (work.forward + work.backward)


def gpu_counts(most: int) -> list[int]:
    """Return the powers of two up to `most`, and `most`."""
    return sorted({2**power for power in range(most.bit_length())} | {most})
