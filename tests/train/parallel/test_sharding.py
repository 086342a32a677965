"""Tests that a sharded state trains as one process does, with every option, and that a worker holds its share of the bytes.

The workers are forks that talk over gloo. One group of them runs all cases of a table, since a group costs more than a case.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import recorded_curve
import torch
from forked_workers import workers
from small_pi0 import BOTH
from small_runs import start, weights

from pi0fm import options
from pi0fm.cluster.training_run import TrainingRun
from pi0fm.data.loading.batch import Batch
from pi0fm.data.order.split import micro_steps, split
from pi0fm.flow.config import FlowConfig
from pi0fm.flow.matching import FlowMatching
from pi0fm.models.config import LoraConfig
from pi0fm.models.observation import ModelObservation
from pi0fm.train.checkpoint.checkpoints import Checkpoints
from pi0fm.train.components import FULL, GRADIENTS, NONE, Adaptation, OptimizerConfig, ParallelConfig
from pi0fm.train.config import TrainConfig
from pi0fm.train.loop import train
from pi0fm.train.parallel.accelerate import Parallel
from pi0fm.train.parallel.context import Context
from pi0fm.train.parallel.sharding import local, local_rows
from pi0fm.train.start.output import claim
from pi0fm.train.state import StateConfig, TrainState
from pi0fm.train.step import train_step
from pi0fm_client.errors import ConfigError

# a wrapped network is no Pi0; four processes share two cores
pytestmark = [pytest.mark.usefixtures("shapes_unchecked"), pytest.mark.timeout(400)]

FLOW = FlowMatching.from_config(FlowConfig())
ALONE = Context(shown=False)
STEPS, SAMPLES = 2, 8
LORA = LoraConfig(4, targets=("backbone", "action_expert"))
HSDP = ParallelConfig(FULL, replicas=2)


@dataclass(frozen=True)
class Case:
    """What is trained, and how it is cut; `spoilt` is a step whose loss is not finite."""

    parallel: ParallelConfig
    how: Adaptation = Adaptation()
    kind: str = "pi0"
    micro: int | None = None
    draws: int = 1
    averaged: bool = True
    clip: float = 1.0
    spoilt: int | None = None
    bundled: bool = False

    def one_process(self) -> "Case":
        return replace(self, parallel=ParallelConfig(NONE))


FLOAT32 = {
    "ddp": Case(ParallelConfig(NONE)),
    "gradients": Case(ParallelConfig(GRADIENTS)),
    "full": Case(ParallelConfig(FULL), bundled=True),
    "hsdp": Case(HSDP),
    "pi05, clipped": Case(ParallelConfig(FULL), kind="pi05", clip=1e-2),
    "draws, checkpointing": Case(ParallelConfig(FULL), Adaptation(activation_checkpointing="full"), draws=3),
    "checkpointing, gathered once": Case(ParallelConfig(GRADIENTS), Adaptation(activation_checkpointing="full")),
    "selective": Case(ParallelConfig(FULL), Adaptation(activation_checkpointing="selective")),
    "micro batches": Case(ParallelConfig(FULL), micro=1),
    "micro batches, whole": Case(ParallelConfig(GRADIENTS, accumulate_whole=True), micro=1),
    "micro batches, replicas": Case(HSDP, micro=1),
    "micro batches, replicas, whole": Case(replace(HSDP, accumulate_whole=True), micro=1),
    "expert only, no average": Case(ParallelConfig(FULL), Adaptation("expert_only"), averaged=False),
    "lora": Case(HSDP, Adaptation("full", LORA, activation_checkpointing="full"), bundled=True),
    "not finite": Case(ParallelConfig(FULL), spoilt=1),
}


def batch(draws: int, step: int) -> Batch:
    """Eight samples of which some steps are past their episode's end."""
    random = torch.Generator().manual_seed(step)
    observation = ModelObservation(
        images=torch.randint(0, 256, (SAMPLES, 1, 32, 32, 3), dtype=torch.uint8, generator=random),
        image_mask=torch.ones(SAMPLES, 1, dtype=torch.bool),
        prompt_tokens=torch.randint(3, 40, (SAMPLES, 8), generator=random),
        prompt_mask=torch.ones(SAMPLES, 8, dtype=torch.bool),
        state=torch.randn(SAMPLES, 6, generator=random),
    )
    mask = (torch.arange(4) <= torch.arange(SAMPLES)[:, None] % 4)[:, :, None].expand(-1, -1, 5)
    actions, noise = (torch.randn(*shape, 4, 5, generator=random) for shape in ((SAMPLES,), (SAMPLES, draws)))
    return Batch(observation, actions, mask, noise, torch.rand(SAMPLES, draws, generator=random))


def parts(case: Case, context: Context, step: int) -> Iterator[Batch]:
    given = batch(case.draws, step)
    for first, count in split(SAMPLES, context.rank, context.world_size, case.micro):
        here = slice(first, first + count)
        seen = ModelObservation(**{name: value[here] for name, value in vars(given.observation).items()})
        actions = given.actions[here]
        if step == case.spoilt and first == 0:
            actions = actions.clone().fill_(float("nan"))
        yield Batch(seen, actions, given.action_mask[here], given.noise[here], given.uniform[here])


def opened(case: Case, context: Context, precision: str = "float32") -> tuple[TrainState, Parallel]:
    parallel = Parallel(context, precision, micro_steps(SAMPLES, context.world_size, case.micro), allow_cuda=False)
    optimizer = OptimizerConfig(learning_rate=2e-5, warmup_steps=0, clip_norm=case.clip)
    config = StateConfig(1, optimizer, case.how, 0.9 if case.averaged else None, case.parallel)
    return TrainState.build(BOTH[case.kind], config, None, parallel), parallel


def stepped(case: Case, state: TrainState, parallel: Parallel, steps: int) -> list[tuple[float, float]]:
    """(loss, norm) of each step up to step number `steps`."""
    curve = []
    state.prepare(parallel)
    while state.step < steps:
        valid = int(batch(1, 0).action_mask.sum()) * case.draws
        given = parts(case, parallel.context, state.step)
        part, norm = train_step(state.trained, FLOW, state.optimizer, parallel.accelerator, given, valid, case.clip)
        state.advance()
        curve.append((float(parallel.sum(part)), float(norm)))
    return curve


Held = dict[str, tuple[slice, torch.Tensor]]


def held(state: TrainState) -> Held:
    """This worker's rows of every tensor, and which they are."""
    return {name: (local_rows(value) if value.ndim else ..., local(value).detach().clone()) for name, value in state.tensors().items()}


@dataclass(frozen=True)
class Outcome:
    """Everything that must not depend on the workers: the state at the start, after one step and at the end; (loss, norm) of each step."""

    start: Held
    first: Held
    end: Held
    curve: list[tuple[float, float]]
    bundle: dict[str, torch.Tensor]


def outcome(case: Case, context: Context, precision: str = "float32") -> Outcome:
    state, parallel = opened(case, context, precision)
    start = held(state)
    curve = stepped(case, state, parallel, 1)
    first = held(state)
    curve += stepped(case, state, parallel, STEPS)
    return Outcome(start, first, held(state), curve, bundle_of(state) if case.bundled else {})


def bundle_of(state: TrainState) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in state.bundle_weights()}


def differences(found: Outcome, expected: Outcome) -> list[str]:
    """What is not as one process has it, within 1e-5; the gradient, of which a first moment is a tenth, relative to its largest entry."""
    wrong = [f"start of {name}" for name, (rows, value) in found.start.items() if not torch.equal(value, expected.start[name][1][rows])]
    for (loss, norm), (true_loss, true_norm) in zip(found.curve, expected.curve, strict=True):
        wrong += [] if loss == pytest.approx(true_loss, rel=1e-5, nan_ok=True) else [f"loss {loss} for {true_loss}"]
        wrong += [] if norm == pytest.approx(true_norm, rel=1e-4, nan_ok=True) else [f"norm {norm} for {true_norm}"]
    for name, (rows, moment) in found.first.items():
        if name.endswith("exp_avg"):
            true = expected.first[name][1]
            error = largest(moment - true[rows]) / max(1e-6, largest(true))
            wrong += [] if error < 1e-5 else [f"gradient of {name} by {error:.1e}"]
    for name, (rows, value) in found.end.items():
        error = largest(value - expected.end[name][1][rows])
        wrong += [] if error < 1e-5 else [f"{name} by {error:.1e}"]
    for name, value in expected.bundle.items():
        error = largest(value - found.bundle[name])
        wrong += [] if error < 1e-5 else [f"{name} of the bundle by {error:.1e}"]
    return wrong


def largest(value: torch.Tensor) -> float:
    return float(value.abs().max()) if value.numel() else 0.0


@pytest.mark.parametrize("count", [4, 2])
def test_every_case_is_one_process(tmp_path, count):
    cases = FLOAT32 if count == 4 else {name: FLOAT32[name] for name in ("gradients", "full")}
    cases = {name: replace(case, parallel=replace(case.parallel, replicas=1)) if count == 2 else case for name, case in cases.items()}
    expected = {name: outcome(case.one_process(), ALONE) for name, case in cases.items()}

    def body(context: Context) -> dict[str, list[str]]:
        return {name: differences(outcome(case, context), expected[name]) for name, case in cases.items()}

    for found in workers(count, tmp_path, body):
        assert found == {name: [] for name in cases}


def held_bytes(case: Case, context: Context) -> dict[str, int]:
    """Bytes of this worker's weights, moments, average and gradients, of which all are there before a step is taken."""
    state, parallel = opened(case, context)
    groups = {"weights": 0, "moments": 0, "average": 0, "gradients": 0}
    for name, tensor in state.tensors().items():
        group = {"model": "weights"}.get(kind := name.split("/")[0], kind)
        groups[group] += local(tensor).nbytes
    state.prepare(parallel)
    given = next(parts(case, context, 0))
    pair = FLOW.training_pair(given.actions, FLOW.times(given.uniform[:, 0]), given.noise[:, 0])
    parallel.accelerator.backward(state.trained(given.observation, pair.x_t, FLOW.times(given.uniform[:, 0])).square().sum())
    groups["gradients"] = sum(local(parameter.grad).nbytes for parameter in state.network.parameters() if parameter.grad is not None)
    return groups


def test_a_worker_holds_its_share_of_the_bytes(tmp_path, capsys):
    """The table; four workers of a whole state hold at most 0.30 each of what one holds, and never all rows of anything large."""
    alone = held_bytes(Case(ParallelConfig(NONE)), ALONE)
    cases = {"DDP": ParallelConfig(NONE), "gradients": ParallelConfig(GRADIENTS), "full": ParallelConfig(FULL), "HSDP 2 x 2": HSDP}
    four = workers(4, tmp_path, lambda context: {name: held_bytes(Case(how), context) for name, how in cases.items()})
    share = {name: {group: max(found[name][group] for found in four) / size for group, size in alone.items()} for name in cases}
    with capsys.disabled():
        print("\nshare of one process's bytes, the fullest of four workers")
        for name, groups in share.items():
            print(f"{name:>11}  " + "  ".join(f"{group} {part:.3f}" for group, part in groups.items()))
    for name, most in {"DDP": 1.0, "gradients": 0.30, "full": 0.30, "HSDP 2 x 2": 0.55}.items():
        assert max(share[name].values()) <= most, name
    assert min(share["DDP"].values()) == 1.0
    assert min(share["HSDP 2 x 2"].values()) >= 0.5


KINDS = {"one": (1, ParallelConfig(NONE)), "ddp": (2, ParallelConfig(NONE)), "full": (4, ParallelConfig(FULL)), "hsdp": (4, HSDP)}


@pytest.mark.long
def test_any_goes_on_from_the_checkpoint_of_any(tmp_path):
    """One process, DDP x 2, full x 4, HSDP 2 x 2: each writes after one step, each goes on from all four, and all end alike."""
    expected = outcome(Case(ParallelConfig(NONE)), ALONE)

    def write(kind: str, context: Context) -> None:
        state, parallel = opened(Case(KINDS[kind][1]), context)
        stepped(Case(KINDS[kind][1]), state, parallel, 1)
        checkpoints = Checkpoints(tmp_path / f"from-{kind}", parallel, keep=1)
        checkpoints.save(1, state.tensors(), {"step": 1})  # the copy behind training's back
        stepped(Case(KINDS[kind][1]), state, parallel, 2)
        checkpoints.close()

    def go_on(kind: str, writer: str, context: Context) -> list[str]:
        state, parallel = opened(Case(KINDS[kind][1]), context)
        checkpoints = Checkpoints(tmp_path / f"from-{writer}", parallel, keep=1)
        assert checkpoints.restore(state.tensors(), lambda index: None) is not None
        checkpoints.close()
        state.step, first = 1, held(state)
        curve = expected.curve[:1] + stepped(Case(KINDS[kind][1]), state, parallel, STEPS)
        return differences(Outcome(expected.start, first, held(state), curve, {}), expected)

    def together(count: int, body) -> list[dict[str, list[str]]]:
        return [body(ALONE)] if count == 1 else workers(count, tmp_path, body)

    for count in (1, 2, 4):
        mine = [kind for kind, (size, _) in KINDS.items() if size == count]
        together(count, lambda context, mine=mine: [write(kind, context) for kind in mine])
    for count in (1, 2, 4):
        pairs = [(kind, writer) for kind, (size, _) in KINDS.items() if size == count for writer in KINDS]
        found = together(count, lambda context, pairs=pairs: {f"{k} from {w}": go_on(k, w, context) for k, w in pairs})
        assert all(answer == {f"{kind} from {writer}": [] for kind, writer in pairs} for answer in found), found


def test_bfloat16_products_and_float32_sums(tmp_path):
    """As DDP of two workers has it: what is kept is float32, frozen matrices are bfloat16 where that is asked for."""
    frozen = Adaptation("frozen_vision", LORA, frozen_bfloat16=True)
    cases = {"whole": Case(ParallelConfig(FULL)), "frozen": Case(ParallelConfig(GRADIENTS), frozen)}

    def body(context: Context) -> dict[str, list[float]]:
        found = {}
        for name, case in cases.items():
            for kind in (case, case.one_process()):
                state, parallel = opened(kind, context, "bfloat16")
                found.setdefault(name, []).extend(loss for loss, _ in stepped(kind, state, parallel, STEPS))
                kinds = {key: tensor.dtype for key, tensor in state.tensors().items()}
                assert {kind for key, kind in kinds.items() if not key.startswith("model/")} == {torch.float32}
                half = {torch.bfloat16} if name == "frozen" else set()
                assert {kind for key, kind in kinds.items() if key.startswith("model/")} == {torch.float32} | half
        return found

    for found in workers(2, tmp_path, body):
        for losses in found.values():
            assert losses[:STEPS] == pytest.approx(losses[STEPS:], rel=3e-3)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"shard": "zero"}, "parallel.shard must be one of auto, none, gradients, full, found 'zero'"),
        ({"shard": NONE, "replicas": 2}, "parallel.replicas needs a sharded state, found parallel.shard none"),
        ({"shard": NONE, "accumulate_whole": True}, "parallel.accumulate_whole needs a sharded state"),
        ({"replicas": 0}, "parallel.replicas must be >= 1, found 0"),
    ],
)
def test_options_that_cannot_be(wrong, words):
    with pytest.raises(ConfigError, match=words):
        ParallelConfig(**wrong)


@pytest.mark.parametrize(("replicas", "world_size"), [(2, 3), (2, 2), (3, 4)])
def test_workers_that_do_not_fit_the_replicas_are_refused_before_any_starts(replicas, world_size):
    with pytest.raises(ConfigError, match=f"two or more to a replica, found {world_size} for parallel.replicas {replicas}"):
        TrainingRun(num_workers=world_size, parallel=ParallelConfig(FULL, replicas))
    with pytest.raises(ConfigError, match=r"two or more workers, found one for parallel\.shard full"):
        TrainingRun(num_workers=1, parallel=ParallelConfig(FULL))
    with pytest.raises(ConfigError, match=r"compile needs a state that is not sharded, found parallel\.shard full"):
        TrainingRun(num_workers=2, parallel=ParallelConfig(FULL), compile=True)


def test_a_run_has_the_curve_the_validations_and_the_bundle_of_one_process(tmp_path, tiny_root):
    """Four workers, two replicas of a state cut in two, from options to a bundle."""
    tree = recorded_curve.options_of(tiny_root, tmp_path) | {"parallel": {"shard": FULL, "replicas": 2}, "micro_batch_size": 1}
    tree |= {"steps": 6, "validation": {"every": 3, "episodes": 1, "samples": 9, "likelihood": True, "probes": 1, "num_flow_steps": 2}}
    alone = options.decode(TrainConfig, tree | {"output_dir": str(tmp_path / "alone"), "parallel": {}, "micro_batch_size": None})
    start(alone)
    config = options.decode(TrainConfig, tree)
    claim(config)
    workers(4, tmp_path, lambda context: train(context, config).steps)
    lines = [[json.loads(line) for line in (each.output_dir / "metrics.jsonl").read_text().splitlines()] for each in (alone, config)]
    assert len(lines[0]) == len(lines[1]) == 8
    for expected, found in zip(*lines, strict=True):
        assert found.keys() - {"slowest_of_median"} == expected.keys()
        for name in expected.keys() & {"loss", "validation_nll", "validation_loss", "validation_error"}:
            assert found[name] == pytest.approx(expected[name], rel=2e-5), name
    ours, theirs = weights(config.output_dir / "bundle"), weights(alone.output_dir / "bundle")
    assert {name: tensor.shape for name, tensor in ours.items()} == {name: tensor.shape for name, tensor in theirs.items()}
    assert max(largest(ours[name] - tensor) for name, tensor in theirs.items()) < 1e-3  # AdamW turns a key's bias by rounding alone
