"""`pi0fm plan CONFIG --gpus N`: time, memory and cost of a run on N cards, before any is rented.

Owns: the options, tables and the picture's file. Does not know: how a plan is made (train/plan/planner.py).
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pi0fm import files, progress
from pi0fm.cli import lerobot
from pi0fm.cli.training import train
from pi0fm.cluster.training_run import TrainingRun
from pi0fm.options import option
from pi0fm.train.config import TrainConfig
from pi0fm.train.plan import pictures
from pi0fm.train.plan.network import Network
from pi0fm.train.plan.planner import Card, Plan, best_plan, card_named, gpu_counts, known_cards, plan_shardings
from pi0fm.train.start.defaults import defaults
from pi0fm_client.errors import ConfigError

HELP = "estimate step time, memory, cost and scaling limits for any number of cards; options of pi0fm train are taken too"
ALIASES = lerobot.TRAIN
DEFAULTS = defaults
NETWORK = train.NETWORK
GBITS = (10.0, 25.0, 100.0, 400.0)  # networks in the picture, Gb/s

MOST_GPUS = 4096


@dataclass(frozen=True)
class PlanOptions(TrainingRun):
    """A run, and the cards that it might run on. Raises ConfigError for a value out of range."""

    gpus: int = option(1, "total number of cards; replaces num_workers")
    gpu: str = option("h100", "kind of card: h100, a100 or rtx4090")
    gpus_per_machine: int = option(8, "cards in a full machine")
    gbits: float = option(100.0, "network of each machine, Gb/s each way, which its cards share")
    price: float | None = option(None, "US dollars per card and hour; empty takes the assumption in train/plan/cards.yaml")
    cameras: int | None = option(None, "pictures per sample; empty counts embodiment.cameras")
    samples_per_gpu: int | None = option(None, "samples per card, so that global_batch_size grows with the cards")
    picture: Path | None = option(None, "PNG file of speed and shares from 1 to `gpus` cards")

    def __post_init__(self) -> None:
        object.__setattr__(self, "num_workers", 0)  # a plan splits the batch over `gpus`
        super().__post_init__()
        for name, least in (("gpus", 1), ("gpus_per_machine", 1), ("cameras", 1), ("samples_per_gpu", 1)):
            if getattr(self, name) is not None and getattr(self, name) < least:
                raise ConfigError(f"{name} must be {least} or more, found {getattr(self, name)}; type --{name} {least}")
        if self.gpus > MOST_GPUS:
            raise ConfigError(f"gpus must be 1 to {MOST_GPUS}, the range of the plan's network model, found {self.gpus}")
        if not self.gbits > 0:
            raise ConfigError(f"gbits must be above 0, found {self.gbits}; type --gbits 100")
        if self.price is not None and not self.price >= 0:
            raise ConfigError(f"price must be 0 or more, in US dollars per card and hour, found {self.price}; leave it out")
        if self.device == "cpu":
            raise ConfigError("a plan is of cards, found device cpu; leave it out")
        if self.precision == "float32":
            raise ConfigError("the rates of cards are those of bfloat16, found precision float32; type --precision bfloat16")
        if self.picture is not None and self.picture.suffix != ".png":
            raise ConfigError(f"picture must be a PNG file, found {self.picture}; type --picture scaling.png")


Options = PlanOptions


OFTEN = train.short_help_options(PlanOptions)


def run(options: PlanOptions) -> dict[str, Any]:
    """Plan, print two tables, draw; the last line is the plan of the best sharding on all cards."""
    card, cameras = _card(options, options.gpu), options.cameras or _cameras(options)
    plans = plan_shardings(_with_batch(options, options.gpus), card, _network(options, card, options.gbits), options.gpus, cameras)
    chosen = best_plan(plans)
    smaller = _curve(options, card, options.gbits, cameras)
    console = Console(stderr=True, highlight=False, width=max(130, Console(stderr=True).width))
    console.print(_table(f"every sharding on {options.gpus} {options.gpu}", plans))
    console.print(_table("the best sharding for each number of cards", smaller))
    if not chosen.fits:
        progress.say(f"no sharding fits: the least takes {chosen.memory_gib:.1f} of {card.memory_gib:.1f} GiB; type --micro_batch_size 1")
    if not card.measured:
        progress.say(f"no {options.gpu} was measured: the figures are its data sheet's, times the shares that an H100 reached of its own")
    if options.compile:
        progress.say("compile is not in the plan, which models layers without it")
    if options.picture is not None:
        files.make_folder(options.picture.parent)
        files.write_bytes(options.picture, _picture(options, smaller, cameras))
        progress.say(f"written: {options.picture}")
    return {"gpu": options.gpu, "gbits": options.gbits, "price": card.price} | chosen.json()


def _card(options: PlanOptions, name: str) -> Card:
    card = card_named(name)
    return card if options.price is None else replace(card, price=options.price)


def _network(options: PlanOptions, card: Card, gbits: float) -> Network:
    return Network(card.inside, gbits * 1e9 / 8, card.latency, options.gpus_per_machine)


def _cameras(options: PlanOptions) -> int:
    found = {camera for entry in options.entries().values() for camera in entry.embodiment.cameras}
    if not found:
        raise ConfigError("a plan must know how many pictures a sample has, found no embodiment.cameras; type --cameras 2")
    return len(found)


def _with_batch(options: PlanOptions, gpus: int) -> TrainConfig:
    each, precision = options.samples_per_gpu, "bfloat16"
    return replace(options, precision=precision, global_batch_size=each * gpus if each else options.global_batch_size)


def _curve(options: PlanOptions, card: Card, gbits: float, cameras: int) -> list[Plan]:
    """Return the best plan for each number of cards that can share the batch."""
    found = []
    for gpus in gpu_counts(options.gpus):
        config = _with_batch(options, gpus)
        if gpus <= config.global_batch_size and gpus % config.parallel.replicas == 0 and (gpus > config.parallel.replicas or gpus == 1):
            only = config if gpus > 1 else replace(config, parallel=replace(config.parallel, shard="auto", replicas=1))
            found.append(best_plan(plan_shardings(only, card, _network(options, card, gbits), gpus, cameras)))
    return found


def _picture(options: PlanOptions, chosen: list[Plan], cameras: int) -> bytes:
    card = _card(options, options.gpu)
    networks = {f"{gbits:g} Gb/s": _curve(options, card, gbits, cameras) for gbits in GBITS}
    cards = {name: _curve(options, _card(options, name), options.gbits, cameras) for name in known_cards()}
    fitting = {name: [each for each in plans if each.fits] for name, plans in (networks | cards).items()}
    return pictures.scaling(
        {name: fitting[name] for name in networks if fitting[name]}, {name: fitting[name] for name in cards if fitting[name]}, chosen
    )


def _table(title: str, plans: Iterable[Plan]) -> Table:
    table = Table(box=None, padding=(0, 2), header_style="", title=title, title_justify="left")
    for heading in ("cards", "shard", "replicas", "batch", "step s", "samples/s", "GiB", "fits", "hours", "$", "held back by"):
        table.add_column(heading, justify="left" if heading in ("shard", "fits", "held back by") else "right")
    for each in plans:
        numbers = (f"{each.seconds:.3f}", f"{each.samples_per_second:.1f}", f"{each.memory_gib:.1f}", "yes" if each.fits else "no")
        batch = f"{each.micro_batch} x {each.micro_steps}"
        money = (f"{each.hours:.1f}", f"{each.cost:.0f}")
        table.add_row(str(each.workers), each.shard, str(each.replicas), batch, *numbers, *money, each.stopped_by)
    return table
