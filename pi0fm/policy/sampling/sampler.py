"""A network prepared for sampling: (observation, noise) -> chunk, in normalised units.

Owns: how its matrices are kept, in which precision it multiplies, whether it compiles and records. Does not know: robots, seeds, files.

    compile    the prefix, and a velocity                    a whole chunk                      where
    off        operation by operation                        the solver calls the velocity      anywhere
    kernels    CUDA: models/fused; else torch.compile      the same                           anywhere
    graph      the same kernels                              a CUDA graph for each shape        CUDA, solvers of fixed steps without noise
"""

from collections.abc import Callable
from typing import final

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from pi0fm.flow.checks import check_finite
from pi0fm.flow.committed import CommittedVelocity
from pi0fm.flow.config import FIXED_GRID_SOLVERS
from pi0fm.flow.matching import FlowMatching
from pi0fm.flow.sampling import sample
from pi0fm.flow.solver import Velocity, VelocitySpread
from pi0fm.models.observation import ModelObservation
from pi0fm.models.pi0 import CachedVelocity, FlowTime, Pi0
from pi0fm.models.prefix_cache import PrefixCache
from pi0fm.options import nearest
from pi0fm.policy.load_options import COMPILE
from pi0fm.policy.packed import can_pack, pack
from pi0fm.policy.sampling.cuda_graphs import Graphs, Record
from pi0fm_client.errors import ConfigError

Committed = tuple[Float[Tensor, "B H A"], Bool[Tensor, "B H"]]


@final
class Sampler:
    """Chunks of one network by one flow. The model is changed in place: no gradients, matrices as `arrange_matrices` says.

    dtype: of the towers' matrices. compile: a word of COMPILE. record: how a graph is recorded, other than by CUDA, for tests.
    Raises ConfigError for another word, and for graphs where there are none.
    """

    def __init__(
        self,
        model: Pi0,
        flow: FlowMatching,
        device: torch.device,
        dtype: torch.dtype,
        compile: str = "off",
        record: Record | None = None,
    ) -> None:
        if record is None:
            refuse_compile(compile, device, flow)
        self.flow, self.device, self.dtype, self.compile = flow, device, dtype, compile
        model = model.to(device).eval().requires_grad_(False)
        arrange_matrices(model, dtype, device, packs=compile == "off")
        fused = _with_fused_layers(model) if compile != "off" and device.type == "cuda" else None
        self.model = model if fused is None else fused
        self.times: dict[float, FlowTime] = {}
        self._encode: Callable[[ModelObservation, bool], PrefixCache] = self.model.encode_prefix
        self._action_velocity = self.model.action_velocity
        if compile != "off" and fused is None and record is None:
            # any batch and prompt length by the same kernels: a robot's first long sentence must not wait for a compiler
            self._encode, self._action_velocity = (
                torch.compile(model.encode_prefix, dynamic=True),
                torch.compile(model.action_velocity, dynamic=True),
            )
        self._graphs = Graphs(self._recorded, device, record) if compile == "graph" else None

    def __call__(
        self,
        observation: ModelObservation,
        noise: Float[Tensor, "BN H A"],
        mask: Bool[Tensor, "BN H A"],
        increments: Float[Tensor, "K BN H A"] | None = None,
        committed: Committed | None = None,
    ) -> Float[Tensor, "BN H A"]:
        """The chunks that `noise` flows to, float32, on the device, from a graph on the host. mask: False where they are held at 0.

        noise: N rows for each observation, in its order; their chunks share one prefix. increments: see flow/sampling.
        committed: actions [B, H, A], and the rows [B, H] of them that each chunk keeps (flow/committed.py); N is then 1.
        All of it may be on the host; on `source` it is not copied. A `trimmed` observation costs nothing for missing cameras and padding.
        """
        return self._sampled(observation, noise, mask, increments, False, committed)[0]

    def with_spread(
        self,
        observation: ModelObservation,
        noise: Float[Tensor, "BN H A"],
        mask: Bool[Tensor, "BN H A"],
        increments: Float[Tensor, "K BN H A"] | None = None,
        committed: Committed | None = None,
    ) -> tuple[Float[Tensor, "BN H A"], Float[Tensor, " BN"]]:
        """The chunks, and the `VelocitySpread` of the network's answers on the way to each, over the rows that it chose."""
        chunk, spread = self._sampled(observation, noise, mask, increments, True, committed)
        return chunk, spread

    def _sampled(
        self,
        observation: ModelObservation,
        noise: Tensor,
        mask: Tensor,
        increments: Tensor | None,
        spread: bool,
        committed: Committed | None,
    ) -> tuple[Tensor, ...]:
        # known on the host without a wait for the device; on a CPU the network looks itself
        whole = self.device.type == "cuda" and observation.image_mask.device.type == "cpu" and observation.is_whole()
        if self._graphs is not None:
            # on the host: a robot waits for it, and the check is free there
            found = self._graphs(observation, (whole, spread), noise, mask, *(committed or ()))
            check_finite("the sample (or its noise, or the network's answer)", found[0])
            return found
        noise, mask, *held = (tensor.to(self.device) for tensor in (noise, mask, *(committed or ())))
        increments = None if increments is None else increments.to(self.device)
        with torch.inference_mode(), self.precision():
            velocity = self.cached_velocity(self.prepared(observation), len(noise) // len(observation), whole)
            return _solved(lambda field: sample(self.flow, field, noise, mask, increments=increments), velocity, mask, spread, *held)

    @property
    def static(self) -> bool:
        """Whether each shape is recorded, or its kernels chosen, for itself."""
        return self._graphs is not None or (self.compile != "off" and self.device.type == "cuda")

    @property
    def source(self) -> torch.device:
        """The device on which noise and masks are best given: a graph's inputs leave the host together, in one copy."""
        return self.device if self._graphs is None else torch.device("cpu")

    def prepared(self, observation: ModelObservation) -> ModelObservation:
        """The observation on the device, as it is sampled from."""
        if self.device.type == "cpu" and self.compile == "off":
            return observation.trimmed(1)  # no kernel here is chosen by shape, so no padding is worth computing
        return observation.to(self.device)

    def cached_velocity(self, observation: ModelObservation, chunks: int = 1, whole: bool = False) -> CachedVelocity:
        """The velocity, for a caller with its own solver; under `precision()`, without a gradient in the weights."""
        cache = self._encode(observation, whole)
        return CachedVelocity(self.model, cache, observation.state, self.times, self._action_velocity, chunks)

    def precision(self) -> torch.autocast:
        """The context in which the network is called. No cast of a matrix is kept: they have their type already."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32, cache_enabled=self.compile != "graph")

    def _recorded(
        self, observation: ModelObservation, whole: bool, spread: bool, noise: Tensor, mask: Tensor, *committed: Tensor
    ) -> tuple[Tensor, ...]:
        """The computation of a graph: nothing in it may wait for the device."""
        with torch.inference_mode(), self.precision():
            velocity = self.cached_velocity(observation, len(noise) // len(observation), whole)
            return _solved(lambda field: self.flow.sample(field, noise, mask=mask, check=False), velocity, mask, spread, *committed)


def _solved(
    solve: Callable[[Velocity], Tensor], velocity: CachedVelocity, mask: Tensor, spread: bool, *committed: Tensor
) -> tuple[Tensor, ...]:
    """Solve for the chunks, with committed rows where there are any, and for their spread on request."""
    committing = CommittedVelocity(velocity, *committed) if committed else None
    field: Velocity = committing or velocity
    watched = VelocitySpread(field) if spread else None
    chunk = solve(watched or field)
    if committing is not None:
        chunk, mask = committing.placed(chunk), mask & ~committing.held[..., None]
    return (chunk,) if watched is None else (chunk, watched.deviation(mask))


def _with_fused_layers(model: Pi0) -> Pi0 | None:
    from pi0fm.models.fused import with_fused_layers  # Triton is there where CUDA is

    return with_fused_layers(model)


def refuse_compile(word: str, device: torch.device, flow: FlowMatching) -> None:
    """Raise ConfigError for a word that is not known, or that this device or solver cannot do."""
    if word not in COMPILE:
        raise ConfigError(f"compile must be off, kernels or graph, found {word!r}: {nearest(word, COMPILE)}")
    if word == "graph" and device.type != "cuda":
        raise ConfigError(f"compile graph records CUDA graphs, found device {device.type}; type --compile kernels, or off")
    if word == "graph" and flow.solver not in FIXED_GRID_SOLVERS:
        raise ConfigError(
            f"compile graph needs a solver of fixed steps without noise, one of {', '.join(FIXED_GRID_SOLVERS)}, found {flow.solver}; "
            "type --compile kernels"
        )


def arrange_matrices(model: nn.Module, dtype: torch.dtype, device: torch.device, packs: bool = True) -> None:
    """Keep the matrices as inference multiplies them fastest; values stay.

    float32, CPU     with their columns together: a product with the few rows of a chunk takes 0.4 to 0.9 of the time (docs/LOG.md)
    bfloat16, CPU    see `halve_matrices`, then packed for oneDNN where it can be, and `packs`: a compiler arranges them itself
    elsewhere        `halve_matrices`
    """
    if dtype != torch.float32:
        halve_matrices(model, dtype)
        if packs and device.type == "cpu" and dtype == torch.bfloat16 and can_pack():
            pack(model)
        if device.type == "cuda":  # the products before the decoder, which would be cast in each step; `pack` must leave them as they are
            for name in ("action_in", "state_in", "time_mlp_in", "time_mlp_out"):
                getattr(model, name, nn.Identity()).to(dtype)
    for name in columns_together(model, dtype, device):
        matrix = model.get_parameter(name)
        matrix.data = matrix.data.t().contiguous().t()


def columns_together(model: nn.Module, dtype: torch.dtype, device: torch.device) -> set[str]:
    """The matrices that are stored with their columns together."""
    if dtype != torch.float32 or device.type != "cpu":
        return set()
    return {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def halve_matrices(model: nn.Module, dtype: torch.dtype) -> None:
    """Keep the towers' matrices in the type that they are multiplied in, so that no call casts them again.

    Norms, embeddings and the action head stay float32.
    """
    for matrix in tower_matrices(model).values():
        matrix.to(dtype)


def tower_matrices(model: nn.Module) -> dict[str, nn.Linear]:
    """The matrices of both towers by name, without those that modulate norms."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith(("vision.", "decoder.layers.")) and "modulation" not in name
    }
