r"""pi0 and pi0.5 at any size: (observation, x_t, t) -> velocity.

Owns: how an observation becomes prefix tokens, how noisy actions and flow time become suffix tokens, the head, and the reversed
clock of released weights. Does not know: probability paths, solvers, losses, robots.
Sources: Black et al. 2024 (arXiv 2410.24164), pi0.5 (arXiv 2504.16054), the released weights.

    pictures -> SigLIP -> \
                           prefix -> backbone stream --\ one softmax per layer
    prompt   -> embed  -> /                             |
    state    -> linear -> \                             |
                           suffix -> action stream  ---/  -> linear -> velocity
    x_t, t   -> MLP    -> /

A flow time is given per chunk, t [B], or per row, t [B, H], where rows are held at t = 1 (flow/committed.py).

Shape letters: B batch, C cameras, V tokens of a picture, L prompt tokens, P = C V + L, H horizon, A action dim, Q suffix tokens.
"""

import math
from collections.abc import Callable
from typing import NamedTuple, final

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from pi0fm.models.config import CHECKPOINTING, Pi0Config
from pi0fm.models.initial import Initial, NormalInit, initialise_new, unit_variance
from pi0fm.models.joint_decoder import JointDecoder, Stream
from pi0fm.models.layers import GatedMLP, Linear, Modulation, at_least_float32, each_token, time_embedding
from pi0fm.models.observation import ModelObservation, pixels
from pi0fm.models.prefix_cache import ActionContext, Modulations, PrefixCache
from pi0fm.models.vision import VisionLayer, VisionMLP, VisionTower


class FlowTime(NamedTuple):
    """Values computed from one flow time alone.

    embedded: [B or 1, D], or [B, H, D], from `_time`; modulations: those of the adaptive norms, None for plain norms.
    """

    embedded: Tensor
    modulations: Modulations | None = None

    def where(self, held: Bool[Tensor, "B H"], clean: "FlowTime") -> "FlowTime":
        """Values per row: those of `clean` where `held`, else these; both are of one time for all."""

        def rows(of_held: Tensor, of_free: Tensor) -> Tensor:
            return torch.where(held[..., None], each_token(of_held), each_token(of_free))

        def modulation(of_held: Modulation, of_free: Modulation) -> Modulation:
            return Modulation(*(rows(*pair) for pair in zip(of_held, of_free, strict=True)))

        embedded = rows(clean.embedded, self.embedded)
        if self.modulations is None or clean.modulations is None:
            return FlowTime(embedded)
        layers = zip(clean.modulations.layers, self.modulations.layers, strict=True)
        made = tuple((modulation(theirs[0], ours[0]), modulation(theirs[1], ours[1])) for theirs, ours in layers)
        return FlowTime(embedded, Modulations(made, modulation(clean.modulations.final, self.modulations.final)))


class Pi0(nn.Module):
    """Vector field of pi0."""

    def __init__(self, config: Pi0Config) -> None:
        super().__init__()
        self.config = config
        backbone, expert = config.decoder.backbone.width, config.decoder.action_expert.width
        adaptive = config.time_conditioning == "adaptive_norm"
        self.vision = VisionTower(config.vision, backbone)
        self.prompt_embedding = nn.Embedding(config.vocab_size, backbone)
        self.decoder = JointDecoder(config.decoder, expert if adaptive else None)
        self.action_in = nn.Linear(config.action_dim, expert)
        self.action_out = nn.Linear(expert, config.action_dim)
        if config.state_input == "token":
            self.state_in = nn.Linear(config.state_dim, expert)
        # pi0: (action, time) -> token. pi0.5: time -> condition of the norms.
        self.time_mlp_in = nn.Linear(expert if adaptive else 2 * expert, expert)
        self.time_mlp_out = nn.Linear(expert, expert)
        initialise_new(self)

    def encode_prefix(self, observation: ModelObservation, whole: bool = False) -> PrefixCache:
        """Run pictures and prompt through the backbone once; the cache serves every flow time.

        whole: the result of `observation.is_whole` on the host; attention without a mask is faster on a GPU.
        """
        return self.decoder.encode(*self._prefix(observation), whole)

    def velocity(
        self, cache: PrefixCache, state: Float[Tensor, "BK S"], x_t: Float[Tensor, "BK H A"], t: Float[Tensor, "*times"]
    ) -> Float[Tensor, "BK H A"]:
        """Evaluate dx/dt at (x_t, t) for the cached observations, K rows each; t in [0, 1] from noise to data; float32."""
        suffix, num_state_tokens, condition = self._suffix(state, x_t, t)
        return self._head(self.decoder.decode(suffix, cache, num_state_tokens, condition))

    def cached_velocity(self, observation: ModelObservation, chunks: int = 1) -> "CachedVelocity":
        """Return the velocity of one batch of observations as a function of (x_t, t), for a sampler that evaluates it many times."""
        return CachedVelocity(self, self.encode_prefix(observation), observation.state, chunks=chunks)

    def flow_time(self, t: float) -> FlowTime:
        """Compute the values of one flow time for a whole batch, without gradient."""
        with torch.inference_mode(False), torch.no_grad():  # samplers keep it, also those that take a derivative in x_t
            embedded = self._time(torch.full((1,), t, dtype=self.action_out.weight.dtype, device=self.action_out.weight.device))
            adaptive = self.config.time_conditioning == "adaptive_norm"
            return FlowTime(embedded, self.decoder.modulations(embedded) if adaptive else None)

    def action_velocity(self, x_t: Float[Tensor, "BN H A"], time: FlowTime, context: ActionContext) -> Float[Tensor, "BN H A"]:
        """Evaluate the velocity once in a sampler: as `velocity`, with everything independent of x_t precomputed."""
        actions, condition = self._actions(x_t, time.embedded)
        return self._head(self.decoder.decode_actions(actions, context, condition if time.modulations is None else time.modulations))

    def forward(self, observation: ModelObservation, x_t: Float[Tensor, "BK H A"], t: Float[Tensor, "*times"]) -> Float[Tensor, "BK H A"]:
        """Compute `velocity` of `encode_prefix` in one pass, for training.

        K rows of x_t and t for each observation, in its order: one prefix serves all.
        """
        state = observation.state.repeat_interleave(x_t.shape[0] // len(observation), dim=0)
        suffix, num_state_tokens, condition = self._suffix(state, x_t, t)
        return self._head(self.decoder(*self._prefix(observation), suffix, num_state_tokens, condition))

    def checkpoint_activations(self, how: str) -> None:
        """In training, keep less for the backward pass, which recomputes the rest: the same loss and gradients, bit by bit.

        full        keeps each layer's input: a fraction of the memory, a third more time
        selective   keeps the results of the large products too, and recomputes attention, rotations and activations; a layer that is
                    compiled keeps what its compiler chooses, which is much the same
        `eval()` and no_grad are untouched. how: a word of CHECKPOINTING; none keeps everything.
        """
        assert how in CHECKPOINTING, how
        self.decoder.activation_checkpointing = self.vision.activation_checkpointing = how == "full"
        for module in self.modules():
            if isinstance(module, Stream | GatedMLP | VisionLayer | VisionMLP):
                module.recompute = how == "selective"

    def cast_once(self, wanted: bool) -> None:
        """In training under autocast, cast the towers' matrices once per update (`layers.Linear`) and keep the copies: the same numbers.

        A matrix sharded over workers is left out: it is gathered in the products' type, by writes that its version does not count.
        """
        for module in self.modules():
            if isinstance(module, Linear):
                module.cast_once = wanted and type(module.weight) is nn.Parameter

    def compile_layers(self) -> None:
        """Compile every layer of both towers, for training: one set of kernels for all batches and prompt lengths."""
        for layer in (*self.vision.layers, *self.decoder.layers):
            layer.compile(fullgraph=True, dynamic=True)

    def _prefix(self, observation: ModelObservation) -> tuple[Tensor, Tensor]:
        batch, cameras = observation.image_mask.shape
        pictures = self.vision(pixels(observation.images.flatten(0, 1)))
        tokens_per_image = pictures.shape[1]
        # scaled in float32, in which the residual stream then stays, even where the words are kept in bfloat16
        words = self.prompt_embedding(observation.prompt_tokens).to(self.action_out.weight.dtype)
        words = words * math.sqrt(self.prompt_embedding.embedding_dim)
        tokens = torch.cat((pictures.unflatten(0, (batch, cameras)).flatten(1, 2).to(words.dtype), words), dim=1)
        mask = torch.cat((observation.image_mask.repeat_interleave(tokens_per_image, dim=1), observation.prompt_mask), dim=1)
        return tokens, mask

    def _suffix(self, state: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, int, Tensor | None]:
        actions, condition = self._actions(x_t, self._time(t))
        if self.config.state_input == "prompt":
            return actions, 0, condition
        if condition is not None and condition.ndim == 3:  # the last row is never held: its time is the chunk's, and the state's
            condition = torch.cat((condition[:, -1:], condition), dim=1)
        return torch.cat((self.state_in(state)[:, None], actions), dim=1), 1, condition

    def _time(self, t: Tensor) -> Tensor:
        """Embed flow times, [*times, D]: pi0.5's condition, or the time's half of the first product of pi0's MLP."""
        width = self.action_in.out_features
        # released weights count time from data to noise: their clock is 1 - t
        time = time_embedding(1.0 - t, width).to(self.action_out.weight.dtype)
        if self.config.time_conditioning == "adaptive_norm":
            return F.silu(self.time_mlp_out(F.silu(self.time_mlp_in(time))))
        return F.linear(time, self.time_mlp_in.weight[:, width:], self.time_mlp_in.bias)

    def _actions(self, x_t: Tensor, time: Tensor) -> tuple[Tensor, Tensor | None]:
        """Action tokens [B, H, D], and the condition of adaptive norms."""
        actions = self.action_in(x_t)
        if self.config.time_conditioning == "adaptive_norm":
            return actions, time
        # MLP(concatenated action and time), the two halves of the product apart: the time's is the same for all H actions
        joined = F.linear(actions, self.time_mlp_in.weight[:, : actions.shape[-1]]) + each_token(time)
        return self.time_mlp_out(F.silu(joined)), None

    def _head(self, suffix: Tensor) -> Tensor:
        # float32 from here on: the solver adds many small velocities
        with torch.autocast(suffix.device.type, enabled=False):
            head = self.action_out(suffix[:, -self.config.action_horizon :].to(self.action_out.weight.dtype))
        # the head of released weights points from data to noise
        return -at_least_float32(head)

    def initial_values(self) -> dict[str, Initial]:
        """Unit-variance tokens, and residual branches that start small; the tower and the norms define their own."""
        found: dict[str, Initial] = {"prompt_embedding.weight": NormalInit(self.prompt_embedding.embedding_dim**-0.5)}
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear) and name.startswith(("decoder.", "action_in", "time_mlp_")):
                found |= {f"{name}.{part}": initial for part, initial in unit_variance(module).items()}
        return found


@final
class CachedVelocity:
    """`Pi0.velocity` of one batch of observations, with everything independent of x_t and t precomputed.

        once per batch    pictures, prompt, state -> keys and values of all that the actions see
        once per time     t -> its embedding, the products after it, scales and gates of adaptive norms; kept by value of t
        each evaluation   x_t -> action tokens -> layers -> head

    Not for training: the values of a time are kept without gradient. The gradient in x_t, which a density needs, is complete.
    times: store of the values of flow times, for further samples with the same weights in the same precision.
    action_velocity: `model.action_velocity`, or a compiled form of it.
    chunks: number of rows of x_t for each observation, in its order; all see one prefix.
    """

    def __init__(
        self,
        model: Pi0,
        cache: PrefixCache,
        state: Float[Tensor, "B S"],
        times: dict[float, FlowTime] | None = None,
        action_velocity: Callable[[Tensor, FlowTime, ActionContext], Tensor] | None = None,
        chunks: int = 1,
    ) -> None:
        self._model, self._cache, self._state, self._action_velocity = model, cache, state, action_velocity or model.action_velocity
        self._chunks, config = chunks, model.config
        # under adaptive norms a state token would change with the time: such a network keeps it in the suffix
        self._context: ActionContext | None = None
        if config.state_input == "prompt" or config.time_conditioning != "adaptive_norm":
            tokens = None if config.state_input == "prompt" else model.state_in(state)[:, None]
            self._context = model.decoder.context(cache, tokens, config.action_horizon, chunks)
        self._times = {} if times is None else times

    def __call__(self, x_t: Float[Tensor, "BN H A"], t: Float[Tensor, "*times"]) -> Float[Tensor, "BN H A"]:
        """Evaluate dx/dt at (x_t, t), float32; t: per chunk [BN], or per row [BN, H]."""
        # adaptive norms take one time for all rows of an observation
        if self._context is None or (self._chunks > 1 and self._model.config.time_conditioning == "adaptive_norm"):
            return self._model.velocity(self._cache, self._state.repeat_interleave(self._chunks, dim=0), x_t, t)
        return self._action_velocity(x_t, FlowTime(self._model._time(t)), self._context)

    def at(self, x_t: Float[Tensor, "BN H A"], t: float) -> Float[Tensor, "BN H A"]:
        """Evaluate dx/dt at one time for the whole batch; values independent of x_t are computed at the first call and kept."""
        if self._context is None:
            return self(x_t, torch.full((len(x_t),), t, dtype=x_t.dtype, device=x_t.device))
        return self._action_velocity(x_t, self._time(t), self._context)

    def at_rows(self, x_t: Float[Tensor, "B H A"], t: float, held: Bool[Tensor, "B H"]) -> Float[Tensor, "B H A"]:
        """As `at`, with time 1 for the `held` rows: every row takes the values of one of two times."""
        if self._context is None or self._chunks > 1:
            return self(x_t, torch.where(held, 1.0, torch.full_like(held, t, dtype=x_t.dtype)))
        return self._action_velocity(x_t, self._time(t).where(held, self._time(1.0)), self._context)

    def _time(self, t: float) -> FlowTime:
        if t not in self._times:
            self._times[t] = self._model.flow_time(t)
        return self._times[t]


def parameter_count(model: nn.Module) -> int:
    """Number of parameters, trainable or not."""
    return sum(parameter.numel() for parameter in model.parameters())
