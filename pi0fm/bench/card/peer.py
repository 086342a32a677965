"""LeRobot's PI0 network at full size, on a machine that has LeRobot's wheel but few of its dependencies.

Owns: its import, its construction on the device. Does not know: its inputs, clocks.

LeRobot's packages import simulators, data sets and every other policy before the network. Here empty packages over the same folders take
their place, so `modeling_pi0` and the modules that it computes with are LeRobot's files, unchanged:

    lerobot.policies, .pi0, .rtc     empty packages: only the modules asked for are imported
    .pretrained, lerobot.transforms  stand-ins for two names that the network never calls
    create_causal_mask               without `cache_position`, which LeRobot passes and newer transformers neither accept nor need

To be used only in a process that uses LeRobot for nothing else.
"""

import dataclasses
import importlib
import importlib.util
import inspect
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import nn


def network(device: torch.device, precision: str) -> Any:
    """Build `PI0Pytorch` with its initial random weights. precision: LeRobot's `dtype`, bfloat16 or float32.

    Raises ImportError where LeRobot or a library that its network needs is not installed.
    """
    modeling, configuration = imported()
    with device:
        return modeling.PI0Pytorch(configuration.PI0Config(device=device.type, dtype=precision, push_to_hub=False)).to(device)


def imported() -> tuple[Any, Any]:
    """Import LeRobot's modules `modeling_pi0` and `configuration_pi0`."""
    if "lerobot.policies.pi0.modeling_pi0" not in sys.modules:
        for name in ("lerobot.policies", "lerobot.policies.pi0", "lerobot.policies.rtc"):
            _add(name)
        _add("lerobot.policies.pretrained", PreTrainedPolicy=nn.Module, T=TypeVar("T"))
        if importlib.util.find_spec("torchvision") is None:
            _add("lerobot.transforms", ImageTransformsConfig=dataclasses.make_dataclass("ImageTransformsConfig", []))
        importlib.import_module("lerobot.policies.pi0.modeling_pi0")
        _drop_cache_position(sys.modules["lerobot.policies.pi_gemma"])
    modeling, configuration = (sys.modules[f"lerobot.policies.pi0.{name}_pi0"] for name in ("modeling", "configuration"))
    return modeling, configuration


def _drop_cache_position(gemma: Any) -> None:
    make = gemma.create_causal_mask
    if "cache_position" not in inspect.signature(make).parameters:
        gemma.create_causal_mask = lambda cache_position=None, **given: make(**given)


def _add(name: str, **contents: object) -> None:
    """Put an empty module in the place of LeRobot's; an empty package still finds the files of its folder."""
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
