"""A CUDA device of fake tensors on a machine without one: operations run, no number is computed.

    a tensor left on the host      fails, as on a card: "found two different devices"
    a look at a value              noted with the line that looked, and answered with 0 or False; on a card the host would wait there
    a copy to the host             noted too

Backward passes ask for a device and are left out: `Stepped` puts a gradient in the place of each.
"""

import contextlib
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from pi0fm.data.chain import Chain
from pi0fm.models.observation import ModelObservation

CUDA = torch.device("cuda", 0)
PACKAGE = str(Path(__file__).resolve().parents[3] / "pi0fm")


class Looks(TorchDispatchMode):
    """Notes every wait for the device's numbers: `found` holds `file.py:function` of the innermost line of pi0fm."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "aten":  # inference mode leaves composite operations whole
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        if func is torch.ops.aten._local_scalar_dense.default and args[0].device.type == "cuda":
            self.found.append(_where())
            return False if args[0].dtype == torch.bool else 0.0 if args[0].dtype.is_floating_point else 0
        if func is torch.ops.aten._to_copy.default and args[0].device.type == "cuda" and _host(kwargs.get("device")):
            self.found.append(_where())
        return func(*args, **kwargs)


def _host(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cpu"


def _where() -> str:
    inside = [frame for frame in traceback.extract_stack() if frame.filename.startswith(PACKAGE)]
    return f"{Path(inside[-1].filename).name}:{inside[-1].name}" if inside else "test"


@contextlib.contextmanager
def fake_cuda(patch: pytest.MonkeyPatch) -> Iterator[Looks]:
    """Inside, tensors are fake and `CUDA` is a device; bfloat16 autocast is on where it is asked for."""
    patch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    patch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
    patch.setattr(torch.cuda, "current_device", lambda: 0)
    patch.setattr(nn.Module, "_apply", _replaced)
    patch.setattr(FakeTensor, "numpy", lambda self, **_: np.zeros(self.shape, _numpy_type(self.dtype)))
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    patch.setattr(Chain, "observe", _observed(Chain.observe, mode))
    patch.setattr(ModelObservation, "is_whole", lambda self: self.images.shape[1] > 1)  # a look at the host's numbers, which are fake here
    with mode, Looks() as looks:
        yield looks


def _observed(observe: Callable[..., ModelObservation], mode: FakeTensorMode) -> Callable[..., ModelObservation]:
    """`Chain.observe` on the host's numbers, at which it is free to look, to a fake observation."""

    def seen(*args: Any) -> ModelObservation:
        with _disable_current_modes():
            found = observe(*args)
        return ModelObservation(**{name: mode.from_tensor(value) for name, value in vars(found).items()})

    return seen


def _replaced(module: nn.Module, change: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """`nn.Module._apply` by new parameters: torch exchanges what is inside a fake one, and refuses while anything refers to it."""
    for part in module.modules() if recurse else (module,):
        for name, parameter in list(part.named_parameters(recurse=False)):
            setattr(part, name, nn.Parameter(change(parameter.detach()), requires_grad=parameter.requires_grad))
    return module


def _numpy_type(dtype: torch.dtype) -> Any:
    return np.dtype(str(dtype).removeprefix("torch."))


class Stepped:
    """accelerate's part of a step on one device: autocast is the caller's, and every parameter that trains gets a gradient of its shape."""

    gradient_accumulation_steps, num_processes, sync_gradients, device = 1, 1, True, CUDA

    def __init__(self, model: nn.Module, precision: torch.dtype) -> None:
        self._model, self._precision = model, precision

    def accumulate(self, _: nn.Module) -> torch.autocast:
        """The precision of the products."""
        return torch.autocast("cuda", self._precision, enabled=self._precision != torch.float32)

    def backward(self, loss: Tensor) -> None:
        """Without the pass itself."""
        assert loss.device == CUDA and loss.dtype == torch.float32
        for parameter in self._model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.empty_like(parameter)
