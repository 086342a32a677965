"""Tests of trained parameters: every pair of fine-tuning options works together, or is refused with the reason."""

import copy
import itertools
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from small_pi0 import LIKE_PI0, LIKE_PI05, observation
from torch import Tensor, nn

from pi0fm.data.loading.loader import Batch
from pi0fm.flow.config import FlowConfig
from pi0fm.flow.matching import FlowMatching
from pi0fm.models import joint_decoder, vision
from pi0fm.models.config import LoraConfig, Pi0Config
from pi0fm.models.lora import is_adapter
from pi0fm.models.observation import ModelObservation
from pi0fm.models.parts import part_of
from pi0fm.models.pi0 import Pi0
from pi0fm.options import decode
from pi0fm.train.components import TRAINED, Adaptation, OptimizerConfig
from pi0fm.train.config import TrainConfig
from pi0fm.train.ema import Ema
from pi0fm.train.optim import make_optimizer
from pi0fm.train.start.adaptation import adapt, plain_weights
from pi0fm.train.start.network import starting_network
from pi0fm.train.step import train_step
from pi0fm_client.errors import ConfigError

FLOW = FlowMatching.from_config(FlowConfig())
LORA = LoraConfig(rank=4, targets=("vision", "backbone", "action_expert"))
MODES = {
    "full": Adaptation(),
    "frozen_vision": Adaptation("frozen_vision"),
    "expert_only": Adaptation("expert_only"),
    "lora": Adaptation(lora=LORA),
}


def network(config: Pi0Config) -> Pi0:
    """Every parameter random, those too that start at zero: nothing hides behind a closed gate."""
    torch.manual_seed(0)
    model = Pi0(config)
    _shake(model, lambda name, parameter: parameter.ndim == 1 or "modulation" in name)
    return model.train()


def _shake(model: Pi0, which) -> None:
    random = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if which(name, parameter):
            nn.init.normal_(parameter, std=0.2, generator=random)


def batch(draws: int) -> Batch:
    random = torch.Generator().manual_seed(1)
    actions, noise = torch.randn(3, 4, 5, generator=random), torch.randn(3, draws, 4, 5, generator=random)
    return Batch(observation(), actions, torch.ones(3, 4, 5, dtype=torch.bool), noise, torch.rand(3, draws, generator=random))


class Recorder:
    """What train_step asks of accelerate, in one process: one process of accelerate's can have one precision only."""

    gradient_accumulation_steps, num_processes, sync_gradients, device = 1, 1, True, torch.device("cpu")

    def __init__(self, model: Pi0, computes: torch.dtype) -> None:
        self.gradients: dict[str, Tensor | None] = {}
        self._model, self._computes = model, computes

    def __call__(self, *inputs: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self._computes == torch.bfloat16):
            return self._model(*inputs)

    def parameters(self) -> Iterator[nn.Parameter]:
        return self._model.parameters()

    def accumulate(self, _: object) -> nullcontext:
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        loss.backward()
        self.gradients = {name: None if (g := p.grad) is None else g.clone() for name, p in self._model.named_parameters()}


def one_step(model: Pi0, draws: int, computes: torch.dtype, decay: float | None = None) -> SimpleNamespace:
    """Of one step of the real `train_step`: loss, gradients before clipping, optimiser, average."""
    recorder, optimizer, ema = Recorder(model, computes), make_optimizer(OptimizerConfig(learning_rate=1e-2), model), Ema(model, decay)
    whole = batch(draws)
    loss, _ = train_step(recorder, FLOW, optimizer, recorder, iter([whole]), int(whole.action_mask.sum()) * draws, 1.0)
    ema.update(0)
    return SimpleNamespace(loss=loss, gradients=recorder.gradients, optimizer=optimizer, ema=ema)


def expected_to_train(name: str, mode: str) -> bool:
    if mode == "lora":
        return is_adapter(name) or part_of(name) == "projections"
    return part_of(name) in TRAINED[mode]


def pairs() -> Iterator[tuple[str, float | None, bool, torch.dtype, int, str]]:
    """All of them; pi0 and pi0.5 in turn, so that each meets every value of every option."""
    for mode, decay, recomputed, computes, draws in itertools.product(
        MODES, (None, 0.9), ("none", "full"), (torch.float32, torch.bfloat16), (1, 4)
    ):
        odd = (decay is None) ^ (recomputed == "full") ^ (computes == torch.float32) ^ (draws == 1)
        yield mode, decay, recomputed, computes, draws, "pi05" if odd else "pi0"


@pytest.mark.usefixtures("shapes_unchecked")
@pytest.mark.parametrize(("mode", "decay", "recomputed", "computes", "draws", "kind"), pairs())
def test_every_choice_goes_with_every_other(mode, decay, recomputed, computes, draws, kind):
    """What trains has a gradient and moves, what is frozen has none and stays; masters, moments and average are float32."""
    model = network(LIKE_PI05 if kind == "pi05" else LIKE_PI0)
    halved = computes == torch.bfloat16 and mode != "full" and decay is not None
    adapt(model, Adaptation(MODES[mode].train_only, MODES[mode].lora, halved, recomputed), computes)
    _shake(model, lambda name, _: ".lora_B." in name)  # at 0 it would hide A's gradient
    before = copy.deepcopy(model.state_dict())
    found = one_step(model, draws, computes, decay)
    assert torch.isfinite(found.loss)
    trained = {name for name, parameter in model.named_parameters() if expected_to_train(name, mode)}
    assert {name for name, gradient in found.gradients.items() if gradient is not None} == trained
    assert {name for name in trained if not found.gradients[name].any()} == set()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) == (name not in trained), name
    moments = [value for state in found.optimizer.state.values() for value in state.values()]
    assert len(found.optimizer.state) == len(trained)
    kept = [parameter for name, parameter in model.named_parameters() if name in trained]
    assert {tensor.dtype for tensor in (*kept, *moments, *found.ema.average.values())} == {torch.float32}
    assert found.ema.average.keys() == (trained if decay else set())
    assert any(parameter.dtype == torch.bfloat16 for parameter in model.parameters()) == halved


@pytest.mark.parametrize("kind", ["pi0", "pi05"])
def test_no_parameter_is_dead_but_the_towers_key_biases(kind):
    """In float64 these have no gradient, and the answer does not move with them: softmax is blind to what is added to all keys alike.

    Released weights hold them. They are a third of a tower layer's `qkv.bias`.
    """
    model = network(LIKE_PI05 if kind == "pi05" else LIKE_PI0).double().eval()
    whole = batch(1)
    seen = ModelObservation(
        **{name: value.double() if value.is_floating_point() else value for name, value in vars(whole.observation).items()}
    )
    x_t, t = whole.noise[:, 0].double(), whole.uniform[:, 0].double()
    answer = model(seen, x_t, t)
    answer.square().sum().backward()
    biases = [layer.qkv.bias for layer in model.vision.layers]
    assert all(bias.grad.chunk(3)[1].abs().max() < 1e-12 for bias in biases)
    assert all(min(bias.grad.chunk(3)[part].abs().max() for part in (0, 2)) > 1e-9 for bias in biases)
    assert min(float(parameter.grad.abs().max()) for parameter in model.parameters()) > 1e-9
    with torch.no_grad():
        for bias in biases:
            bias[len(bias) // 3 : 2 * len(bias) // 3].add_(1.0)
        assert torch.allclose(model(seen, x_t, t), answer, rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("shapes_unchecked")
@pytest.mark.parametrize("how", ["selective", "full"])
@pytest.mark.parametrize("train_only", ["full", "expert_only"])
@pytest.mark.parametrize(("kind", "draws", "computes"), [("pi0", 1, torch.bfloat16), ("pi05", 4, torch.float32)])
def test_checkpointed_activations_give_the_same_loss_and_gradients(kind, draws, computes, train_only, how):
    """Bit by bit."""
    found = []
    for word in ("none", how):
        model = network(LIKE_PI05 if kind == "pi05" else LIKE_PI0)
        adapt(model, Adaptation(train_only, activation_checkpointing=word), computes)
        found.append(one_step(model, draws, computes))
    plain, checkpointed = found
    assert torch.equal(plain.loss, checkpointed.loss)
    ours, theirs = ({key: value for key, value in each.gradients.items() if value is not None} for each in (checkpointed, plain))
    assert ours.keys() == theirs.keys()
    assert [name for name, gradient in theirs.items() if not torch.equal(gradient, ours[name])] == []


def test_selective_checkpointing_repeats_attention_and_activations_and_no_large_product(monkeypatch):
    model, calls = network(LIKE_PI0), []
    model.checkpoint_activations("selective")
    whole, plain = batch(1), F.linear
    monkeypatch.setattr(F, "linear", lambda x, weight, bias=None: calls.append(tuple(weight.shape)) or plain(x, weight, bias))
    for module in (joint_decoder, vision):
        attend = "attend" if module is joint_decoder else "attend_pictures"
        kept = getattr(module, attend)
        monkeypatch.setattr(module, attend, lambda *given, kept=kept: calls.append("attention") or kept(*given))
    velocity = model(whole.observation, whole.noise[:, 0], whole.uniform[:, 0])
    forward = Counter(calls)
    calls.clear()
    velocity.sum().backward()
    again = Counter(calls)
    assert again["attention"] == forward["attention"] == LIKE_PI0.vision.depth + 2 * LIKE_PI0.decoder.depth - 1
    layer = model.decoder.layers[0]
    for name in ("backbone.qkv", "backbone.mlp.gate_up", "action_expert.qkv", "action_expert.mlp.gate_up"):
        assert again[tuple(layer.get_submodule(name).weight.shape)] == 0, name


@pytest.mark.parametrize(("said", "meant"), [(True, "full"), (False, "none"), ("selective", "selective"), ("Full", "full")])
def test_the_older_spelling_of_checkpointing_is_understood(said, meant):
    assert decode(TrainConfig, {"activation_checkpointing": said}).activation_checkpointing == meant
    with pytest.raises(ConfigError, match="activation_checkpointing must be a known word, found 'selektive': did you mean 'selective'"):
        decode(TrainConfig, {"activation_checkpointing": "selektive"})


def test_checkpointing_computes_each_layer_twice_in_training_and_once_else():
    model = network(LIKE_PI0)
    model.checkpoint_activations("full")
    calls: list[str] = []
    model.decoder.layers[0].register_forward_pre_hook(lambda *_: calls.append("decoder"))
    model.vision.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append("vision"))
    whole = batch(1)
    inputs = (whole.observation, whole.noise[:, 0], whole.uniform[:, 0])
    model(*inputs).sum().backward()
    assert sorted(calls) == ["decoder"] * 2 + ["vision"] * 2
    calls.clear()
    model.eval()(*inputs).sum().backward()
    with torch.no_grad():
        model.train()(*inputs)
    assert sorted(calls) == ["decoder"] * 2 + ["vision"] * 2


def test_frozen_matrices_are_halved_and_nothing_else():
    model = network(LIKE_PI05)
    adapt(model, Adaptation("expert_only", frozen_bfloat16=True), torch.bfloat16)
    halved = {name for name, parameter in model.named_parameters() if parameter.dtype == torch.bfloat16}
    assert "prompt_embedding.weight" in halved
    assert "decoder.layers.0.backbone.qkv.weight" in halved
    assert {part_of(name) for name in halved} == {"vision", "backbone"}
    assert all("norm" not in name and "embeddings" not in name for name in halved)
    seen = batch(1)
    exact = network(LIKE_PI05)
    with torch.no_grad():
        inputs = (seen.observation, seen.noise[:, 0], seen.uniform[:, 0])
        with torch.autocast("cpu", torch.bfloat16):
            found = model(*inputs)
        expected = exact(*inputs)
    assert float((found - expected).abs().max() / expected.abs().max()) < 0.05


@pytest.mark.parametrize(
    ("how", "computes", "words"),
    [
        ({"train_only": "expert"}, torch.float32, "train_only must be a known word.*did you mean 'expert_only'"),
        ({"frozen_bfloat16": True}, torch.bfloat16, "full without lora freezes nothing"),
        ({"train_only": "expert_only", "frozen_bfloat16": True}, torch.float32, "needs a run that computes in bfloat16"),
        ({"train_only": "frozen_vision", "lora": LORA}, torch.float32, "'vision' in vision, which train_only frozen_vision freezes"),
        ({"train_only": "expert_only", "lora": LoraConfig(4)}, torch.float32, "'backbone' in backbone, which train_only expert_only"),
        ({"train_only": "expert_only", "lora": LoraConfig(4, targets=("*.backbone.qkv",))}, torch.float32, "in backbone, which train_only"),
        ({"lora": LoraConfig(4, targets=("qkv",))}, torch.float32, "which names none"),
    ],
)
def test_what_does_not_go_together_is_refused_with_its_reason(how, computes, words):
    with pytest.raises(ConfigError, match=words):
        adapt(network(LIKE_PI0), Adaptation(**how), computes)


@pytest.mark.parametrize("how", [Adaptation(lora=LORA), Adaptation("expert_only", frozen_bfloat16=True)])
def test_an_adapted_network_starts_from_the_plain_one(how):
    """Its weights are those of the run without the adaptation, cast where they are kept in bfloat16; adapters change nothing yet."""

    def weights(how: Adaptation, seed: int) -> dict[str, Tensor]:
        return dict(plain_weights(starting_network(LIKE_PI0, how, seed, None, torch.bfloat16).state_dict(), how))

    plain, found = weights(Adaptation(), 3), weights(how, 3)
    assert found.keys() == plain.keys()
    assert [name for name, value in found.items() if not torch.equal(value, plain[name].to(value.dtype))] == []
    assert not torch.equal(weights(how, 4)["action_in.weight"], plain["action_in.weight"])
