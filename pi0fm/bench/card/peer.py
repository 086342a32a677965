"""LeRobot's own PI0 network at full size, on a machine that has LeRobot's wheel and little else.

Owns: its import, its construction on the device, its inputs. Does not know: clocks.

LeRobot's packages import simulators, data sets and every other policy on the way to one network. Here the packages on that way are empty
ones over the same folders, so that `modeling_pi0` and what it computes with are LeRobot's files, unchanged:

    lerobot.policies, .pi0, .rtc     empty packages: nothing but what is asked for is imported
    .pretrained, lerobot.transforms  stand-ins for two names that the network never calls

Only in a process that uses LeRobot for nothing else.
"""

import dataclasses
import importlib
import importlib.util
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from pi0fm.bench.card.policies import FLOW_STEPS
from pi0fm.models.presets import PI0

CAMERAS = 3


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What LeRobot's network is given, in the order of its arguments: pictures in [-1, 1], masks, words, state; actions and noise apart."""

    observation: tuple[list[Tensor], list[Tensor], Tensor, Tensor, Tensor]
    actions: Tensor
    noise: Tensor
    time: Tensor


def network(device: torch.device, precision: str) -> Any:
    """`PI0Pytorch` with the weights that its constructors draw. precision: LeRobot's `dtype`, bfloat16 or float32.

    Raises ImportError where LeRobot is not there, or its network asks for more than a bare machine has.
    """
    modeling, configuration = imported()
    with device:
        return modeling.PI0Pytorch(configuration.PI0Config(device=device.type, dtype=precision, push_to_hub=False)).to(device)


def random_inputs(device: torch.device, batch: int) -> Inputs:
    """Every camera and word is real."""
    side, shape = PI0.vision.image_size, (batch, PI0.action_horizon, PI0.action_dim)
    pictures = [torch.rand(batch, 3, side, side, device=device) * 2 - 1 for _ in range(CAMERAS)]
    there = [torch.ones(batch, dtype=torch.bool, device=device) for _ in range(CAMERAS)]
    words = torch.randint(3, PI0.vocab_size, (batch, PI0.max_prompt_tokens), device=device)
    read = torch.ones(words.shape, dtype=torch.bool, device=device)
    state, time = torch.randn(batch, PI0.state_dim, device=device), torch.rand(batch, device=device)
    observation = (pictures, there, words, read, state)
    return Inputs(observation, torch.randn(shape, device=device), torch.randn(shape, device=device), time)


def sampling(model: Any, device: torch.device, autocast: bool) -> Callable[[], Tensor]:
    """`sample_actions` for one observation of three cameras, on tensors that are on the device."""
    given = random_inputs(device, 1)
    model.eval()

    def call() -> Tensor:
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            chunk: Tensor = model.sample_actions(*given.observation, noise=given.noise, num_steps=FLOW_STEPS)
        return chunk

    return call


def training(model: Any, device: torch.device, batch: int) -> Callable[[], Tensor]:
    """A step under autocast as LeRobot's trainer takes it: forward, backward, clip, AdamW in torch's fused kernel; checkpointed."""
    given, optimizer = (
        random_inputs(device, batch),
        torch.optim.AdamW(model.parameters(), lr=2.5e-5, fused=True),
    )
    model.train()
    model.gradient_checkpointing_enable()

    def call() -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            loss: Tensor = model(*given.observation, given.actions, given.noise, given.time).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return call


def imported() -> tuple[Any, Any]:
    """`modeling_pi0` and `configuration_pi0`."""
    if "lerobot.policies.pi0.modeling_pi0" not in sys.modules:
        for name in ("lerobot.policies", "lerobot.policies.pi0", "lerobot.policies.rtc"):
            _add(name)
        _add("lerobot.policies.pretrained", PreTrainedPolicy=nn.Module, T=TypeVar("T"))
        if importlib.util.find_spec("torchvision") is None:
            _add("lerobot.transforms", ImageTransformsConfig=dataclasses.make_dataclass("ImageTransformsConfig", []))
        importlib.import_module("lerobot.policies.pi0.modeling_pi0")
    modeling, configuration = (sys.modules[f"lerobot.policies.pi0.{name}_pi0"] for name in ("modeling", "configuration"))
    return modeling, configuration


def _add(name: str, **contents: object) -> None:
    """An empty module in the place of LeRobot's; an empty package still finds the files of its folder."""
    found = importlib.util.find_spec("lerobot")
    if found is None or not found.submodule_search_locations:
        raise ImportError("LeRobot is not installed here; `make gpu-wheels` fetches its wheel for a bare machine")
    folder = Path(found.submodule_search_locations[0]).joinpath(*name.split(".")[1:])
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None, is_package=folder.is_dir())
    if folder.is_dir():
        module.__path__ = [str(folder)]
    vars(module).update(contents)
    sys.modules[name] = module
