"""A policy in this process: chain + network + flow -> ActionChunk.

Owns: one batched inference, and the score of given chunks. Does not know: files, sockets, simulators.

    observations -> chain -> encode_prefix once -> num_flow_steps velocities against the cache -> inverse chain -> chunks
    the same, with the previous chunk's remainder -> velocities that lead to it, or its first rows held (realtime.py)
    the same, N noises for each observation -> N chunks from one prefix -> best_of -> the chosen chunks
    observations, chunks -> chain -> encode_prefix once -> the same velocities and their divergence, backwards -> Scores
"""

import copy
import logging
import secrets
import time
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pi0fm.data.chain import Chain, Sample
from pi0fm.data.columns.embodiment import of_sample
from pi0fm.flow.density import push_backward
from pi0fm.flow.guidance import GuidedVelocity, refuse_guidance
from pi0fm.flow.matching import FlowMatching
from pi0fm.flow.sampling import num_increments, sample
from pi0fm.flow.solver import VelocitySpread
from pi0fm.models.observation import ModelObservation
from pi0fm.models.pi0 import CachedVelocity, Pi0
from pi0fm.policy.load_options import GUIDED, HARD_PREFIX, WITHOUT_JACOBIAN
from pi0fm.policy.sampling import noise
from pi0fm.policy.sampling.best_of import LIKELIHOOD, BestOf, choose, medoid_distances
from pi0fm.policy.sampling.buckets import Buckets
from pi0fm.policy.sampling.realtime import check_prefix, guidance_targets, held_actions, held_count, refuse_guidance_mode
from pi0fm.policy.sampling.sampler import Committed, Sampler
from pi0fm.policy.sampling.scores import ScoreOptions, Scores, conditioned, make_scores, observe_given, sample_and_score
from pi0fm.policy.saved.calibration import Calibration
from pi0fm_client.errors import ConfigError, ObservationError
from pi0fm_client.types import ActionChunk, ActionPrefix, Observation

logger = logging.getLogger(__name__)


@final
class LocalPolicy:
    """A loaded policy. Not thread-safe: a server calls it from one thread."""

    def __init__(
        self,
        model: Pi0,
        flow: FlowMatching,
        chain: Chain,
        metadata: Mapping[str, Any],
        device: torch.device,
        dtype: torch.dtype,
        padded_noise: bool = False,
        compile: str = "off",
        guidance: str = GUIDED,
        max_delay: int = 0,
        alarm: Calibration | None = None,
    ) -> None:
        refuse_guidance_mode(guidance, max_delay)
        self.guidance, self._max_delay, self._alarm = guidance, max_delay, alarm
        self._longest_delay = max_delay
        self.sampler = Sampler(model, flow, device, dtype, compile)
        self.model, self.flow, self.chain, self.metadata = self.sampler.model, flow, chain, metadata
        self.device, self.dtype = device, dtype
        horizon, width = model.config.action_horizon, model.config.action_dim
        self._shape = (horizon, width)
        real = torch.arange(width).expand(horizon, width) < (width if padded_noise else chain.embodiment.dims()[1])
        self._real, self._real_at_source = real.to(device), real.to(self.sampler.source)

    def observation(self, flat: Mapping[str, Any]) -> Observation:
        """The observation in a flat map of keys, or in a LeRobotDataset's row; `Embodiment.observation`, `Chain.check` say the errors."""
        embodiment = self.chain.embodiment
        observation = embodiment.observation(of_sample(flat, embodiment))
        self.chain.check(observation)
        return observation

    def memory_bytes(self) -> int:
        """Bytes that this process holds on the policy's GPU, 0 without one."""
        return torch.cuda.memory_reserved(self.device) if self.device.type == "cuda" else 0

    def seen(self, observation: Observation) -> dict[str, NDArray[np.uint8]]:
        """The pictures of an observation as the network takes them: [size, size, 3], by camera."""
        inputs = self.chain.observe([observation])
        pictures = zip(self.chain.embodiment.cameras, inputs.images[0].numpy(), strict=True)
        return {name: picture for name, picture in pictures if name in observation.images}

    def mask(self, batch: int) -> Tensor:
        """[batch, H, A], True where the policy samples; elsewhere a chunk is held at 0."""
        return self._real.expand(batch, -1, -1)

    def infer(self, observation: Mapping[str, Any], noise_seed: int | None = None, scores: ScoreOptions | bool = False) -> ActionChunk:
        """Return one chunk for a flat map of keys, as `PolicyClient.infer` does; `infer_batch` takes `Observation`s."""
        if isinstance(observation, Observation):
            raise ObservationError("infer takes a flat map of keys, found an Observation: type infer_batch([observation])[0]")
        return self.infer_batch([self.observation(observation)], None if noise_seed is None else [noise_seed], scores)[0]

    def infer_batch(
        self,
        observations: Sequence[Observation],
        noise_seeds: Sequence[int] | None = None,
        scores: ScoreOptions | bool = False,
        prefixes: Sequence[ActionPrefix | None] | None = None,
    ) -> list[ActionChunk]:
        """One chunk for each observation: actions float32 [H, robot_action_dim] in robot units, `infer_ms` of the whole batch.

        Its `scores` hold the `spread` of the velocities over the flow steps (best_of.py), and for a calibrated bundle whether that is an
        `alarm`, 1 or 0 (calibration.py). noise_seeds: all random numbers of a chunk are a function of its seed alone.
        scores: give each chunk a likelihood instead, True for the default options; its actions stay the same.
        prefixes: the previous chunk's remainder, or None, one for each observation; the chunk continues it (sampling/realtime.py), as
        `guidance` says; under hard_prefix its held rows are the prefix's own.
        Raises ObservationError for a wrong observation or prefix, ConfigError for scores of chunks that are led.
        """
        if not observations:
            return []
        led = prefixes if prefixes is not None and any(prefix is not None for prefix in prefixes) else None
        if led is not None and scores is not False:
            raise ConfigError("scores are of chunks that are not led to an action prefix; leave one of the two out")
        if scores is not False:
            self._refuse_scores()
        began = time.perf_counter()
        seeds = _seeds(observations, noise_seeds)
        inputs = self.chain.observe(observations)
        if led is not None:
            self._refuse_wrong_prefixes(led, observations)
            normal, spread = _on_host(*self._sample_after_prefix(inputs, observations, seeds, led))
            each = self._score_rows({"spread": spread})
        elif scores is False:
            normal, spread = _on_host(*self._sampled(inputs, seeds))
            each = self._score_rows({"spread": spread})
        else:
            sampled, found = self._sample_and_score(inputs, seeds, ScoreOptions() if scores is True else scores)
            normal, each = sampled.float().cpu().numpy(), found.each()
        actions = self._to_robot(inputs.state.cpu().numpy(), normal)
        for chunk, prefix in zip(actions, led or (), strict=False):
            if prefix is not None and self.guidance == HARD_PREFIX:  # without the rounding of two normalisations
                held = held_count(prefix, self._max_delay)
                chunk[:held] = prefix.actions[:held]
        timings = {"infer_ms": 1e3 * (time.perf_counter() - began)}
        return [ActionChunk(chunk, timings, row) for chunk, row in zip(actions, each, strict=True)]

    @property
    def leading(self) -> dict[str, str]:
        """How a chunk is led to a prefix: by which guidance, and compiled how; guidance is never compiled."""
        return {"guidance": self.guidance, "compile": self.sampler.compile if self.guidance == HARD_PREFIX else "off"}

    def refuse_prefixes(self) -> None:
        """Raise ConfigError or FlowError where a chunk cannot be led to a prefix."""
        refuse_guidance_mode(self.guidance, self._max_delay)
        if self.guidance == HARD_PREFIX:
            return
        refuse_guidance(self.flow)
        if self.guidance == GUIDED and self.sampler.compile != "off":
            raise ConfigError(
                f"guided needs the derivative of a velocity that is not compiled, found compile {self.sampler.compile}; "
                f"take guidance {WITHOUT_JACOBIAN}, or compile off"
            )

    def check_prefix(self, prefix: ActionPrefix) -> None:
        """Raise ObservationError for a prefix that `infer_batch` would refuse."""
        check_prefix(prefix, self._shape[0], self.chain)

    def _refuse_wrong_prefixes(self, prefixes: Sequence[ActionPrefix | None], observations: Sequence[Observation]) -> None:
        if len(prefixes) != len(observations):
            raise ObservationError(f"one action prefix or None for each observation: expected {len(observations)}, found {len(prefixes)}")
        self.refuse_prefixes()
        for prefix in prefixes:
            if prefix is not None:
                self.check_prefix(prefix)
                self._warn_of_delay(prefix)

    def _warn_of_delay(self, prefix: ActionPrefix) -> None:
        """Warn of a delay beyond training, each time that it is longer than any before."""
        if self.guidance == HARD_PREFIX and prefix.inference_delay > self._longest_delay:
            self._longest_delay = prefix.inference_delay
            logger.warning(
                "an inference delay of %d rows, but the policy was trained to go on from %d: that many are held; train with a larger "
                "--rtc.max_delay, or bring the delay down",
                prefix.inference_delay,
                self._max_delay,
            )

    def _sample_after_prefix(
        self, inputs: ModelObservation, observations: Sequence[Observation], seeds: Sequence[int], prefixes: Sequence[ActionPrefix | None]
    ) -> tuple[Tensor, Tensor]:
        """Chunks that go on from prefixes, and their spread: with held rows as any others, with guidance operation by operation."""
        if self.guidance == HARD_PREFIX:
            return self._sampled(inputs, seeds, held_actions(self.chain, observations, prefixes, self._shape[0], self._max_delay))
        target, weights = (tensor.to(self.device) for tensor in guidance_targets(self.chain, observations, prefixes, self._shape[0]))
        start, increments = self._noise(seeds, self.device)
        # not inference_mode: the guidance may be a derivative
        with torch.no_grad(), self.sampler.precision():
            seen = self.sampler.prepared(inputs)
            # without a compiler, which would compile again for this mode while a robot waits
            velocity = CachedVelocity(self.model, self.model.encode_prefix(seen), seen.state, self.sampler.times)
            watched, mask = VelocitySpread(velocity), self.mask(len(start))
            guided = GuidedVelocity(watched, target, weights, jacobian=self.guidance == GUIDED)
            return sample(self.flow, guided, start, mask, increments=increments), watched.deviation(mask)

    def _score_rows(self, measures: Mapping[str, NDArray[np.float64]]) -> list[dict[str, float]]:
        """The scores of each row, with the alarm where the policy is calibrated."""
        if self._alarm is not None and "spread" in measures:
            measures = {**measures, "alarm": np.array(self._alarm.alarms(measures["spread"].tolist()), np.float64)}
        rows = zip(*(values.tolist() for values in measures.values()), strict=True)
        return [dict(zip(measures, map(float, row), strict=True)) for row in rows]

    def infer_best(
        self, observations: Sequence[Observation], options: BestOf | None = None, noise_seeds: Sequence[int] | None = None
    ) -> list[ActionChunk]:
        """The best of `options.num_chunks` chunks for each observation, all from one prefix; the first is `infer_batch`'s of that seed.

        Its `scores` hold the chosen one's number `candidate`, `spread` and `medoid_distance` (best_of.py); under likelihood `log_prob` and
        `noise_norm` instead of the spread. Raises ObservationError for a wrong observation.
        """
        options = options or BestOf()
        if not observations:
            return []
        began = time.perf_counter()
        given = _seeds(observations, noise_seeds)
        seeds = [each for seed in given for each in noise.candidate_seeds(seed, options.num_chunks)]
        inputs = self.chain.observe(observations)
        if options.criterion == LIKELIHOOD:
            self._refuse_scores()
            sampled, found = self._sample_and_score(inputs, seeds, options.likelihood)
            normal, measures = sampled.float().cpu().numpy(), {"log_prob": found.log_prob, "noise_norm": found.noise_norm}
        else:
            normal, spread = _on_host(*self._sampled(inputs, seeds))
            measures = {"spread": spread}
        groups = normal[..., : self.chain.embodiment.dims()[1]].reshape(len(given), options.num_chunks, -1)
        measures["medoid_distance"] = np.concatenate([medoid_distances(group) for group in groups])
        measures["candidate"] = np.tile(np.arange(options.num_chunks), len(given))
        chosen = choose(measures, options)
        actions = self._to_robot(inputs.state.cpu().numpy(), normal[chosen])
        timings = {"infer_ms": 1e3 * (time.perf_counter() - began)}
        scores = self._score_rows({name: values[chosen] for name, values in measures.items()})
        return [ActionChunk(chunk, timings, each) for chunk, each in zip(actions, scores, strict=True)]

    def warm_up(self, max_batch: int) -> int:
        """Compile and record every shape of `infer_batch` for up to `max_batch` observations; return the number of shapes."""
        examples = [] if self._buckets is None else list(self._buckets.examples(max_batch))
        for inputs in examples:
            self._sampled(inputs, [0] * len(inputs))
        return len(examples)

    def log_prob(
        self,
        observations: Sequence[Observation],
        actions: Sequence[NDArray[np.float32]] | NDArray[np.float32],
        noise_seeds: Sequence[int] | None = None,
        options: ScoreOptions | None = None,
    ) -> Scores:
        """Return the log-density of a given chunk for each observation; scores.py defines it.

        actions: [H, robot_action_dim] for each observation, robot units. noise_seeds: of Hutchinson's probes, fresh when None.
        Raises ObservationError for a wrong observation or chunk.
        """
        options = options or ScoreOptions()
        chunks = self._chunks(observations, actions)
        seeds = _seeds(observations, noise_seeds)
        inputs, normal = observe_given(self.chain, observations, chunks)
        with torch.no_grad(), self.sampler.precision():
            inputs = self.sampler.prepared(inputs)
            velocity = conditioned(self._scoring_model(options), self.model.encode_prefix(inputs), inputs.state)
            density = options.density(self._probes(seeds, options))
            pushed = push_backward(self.flow, velocity, normal.to(self.device), self.mask(len(seeds)), density)
        return make_scores(pushed, self.chain, self._shape[0])

    @property
    def _buckets(self) -> Buckets | None:
        if self.sampler.compile == "off":
            return None
        return Buckets(self.model.config, len(self.chain.embodiment.cameras), self.sampler.static)

    def _sampled(self, inputs: ModelObservation, seeds: Sequence[int], committed: Committed | None = None) -> tuple[Tensor, Tensor]:
        """A chunk for each seed, one or more of them for each observation, and their spread."""
        asked, chunks = len(seeds), len(seeds) // len(inputs)
        if self._buckets is not None:
            if committed is None and self.guidance == HARD_PREFIX and chunks == 1:
                # one set of shapes, with prefixes and without: nothing held is the same chunk
                committed = torch.zeros(asked, *self._shape), torch.zeros(asked, self._shape[0], dtype=torch.bool)
            inputs = self._buckets.padded(inputs)
            seeds = [*seeds, *[seeds[-1]] * (len(inputs) * chunks - asked)]
            if committed is not None:
                repeated = torch.arange(len(inputs)).clamp(max=asked - 1)
                committed = committed[0][repeated], committed[1][repeated]
        start, increments = self._noise(seeds, self.sampler.source)
        mask = self._real_at_source.expand(len(seeds), -1, -1)
        sampled, spread = self.sampler.with_spread(inputs, start, mask, increments, committed)
        return sampled[:asked], spread[:asked]

    def _sample_and_score(self, inputs: ModelObservation, seeds: Sequence[int], options: ScoreOptions) -> tuple[Tensor, Scores]:
        chunks, inputs = len(seeds) // len(inputs), self.sampler.prepared(inputs)
        start, increments = self._noise(seeds, self.device)
        # not inference_mode: the divergence is a derivative
        with torch.no_grad(), self.sampler.precision():
            cache = self.model.encode_prefix(inputs)
            pushed = sample_and_score(
                self.flow,
                conditioned(self.model, cache, inputs.state, chunks),
                conditioned(self._scoring_model(options), cache, inputs.state, chunks),
                start,
                self.mask(len(seeds)),
                options,
                probes=self._probes(seeds, options),
                increments=increments,
            )
        return pushed.actions, make_scores(pushed, self.chain, self._shape[0])

    def _noise(self, seeds: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor | None]:
        """Starting noise, and the increments of a stochastic solver, on a device."""
        increments = noise.increments(seeds, num_increments(self.flow), self._shape)
        return noise.starting_noise(seeds, self._shape).to(device), None if increments is None else increments.to(device)

    def _probes(self, seeds: Sequence[int], options: ScoreOptions) -> Tensor | None:
        probes = noise.probes(seeds, options.num_probes, self._shape)
        return None if probes is None else probes.to(self.device)

    def _refuse_scores(self) -> None:
        if self.sampler.compile != "off":
            raise ConfigError(
                f"scores need a policy that is not compiled, since they never change an action, found compile {self.sampler.compile}; "
                "load it with compile off"
            )

    def _scoring_model(self, options: ScoreOptions) -> Pi0:
        return self._in_float64 if options.float64 else self.model

    @cached_property
    def _in_float64(self) -> Pi0:
        """A second copy of the weights, made by the first call that asks for it."""
        return copy.deepcopy(self.model).double()

    def _chunks(
        self, observations: Sequence[Observation], actions: Sequence[NDArray[np.float32]] | NDArray[np.float32]
    ) -> NDArray[np.float32]:
        """[B, H, robot_action_dim], finite; a ragged list is refused as one of another shape."""
        shape = (self._shape[0], self.chain.embodiment.dims()[1])
        if not len(observations):
            raise ObservationError("scores need one observation or more, found none")
        found = [np.shape(chunk) for chunk in actions]
        wrong = [each for each in found if each != shape]
        if wrong or len(found) != len(observations):
            what = f"{len(found)} of them, one of shape {list(wrong[0])}" if wrong else f"{len(found)} of them"
            raise ObservationError(
                f"scores need one chunk of shape {list(shape)} for each of {len(observations)} observations, found {what}"
            )
        chunks = np.stack([np.asarray(chunk, dtype=np.float32) for chunk in actions])
        if not np.isfinite(chunks).all():
            raise ObservationError("a chunk to score must be finite, found NaN or infinity in it")
        return chunks

    def _to_robot(self, state: NDArray[np.float32], actions: NDArray[np.float32]) -> NDArray[np.float32]:
        robot = self.chain.inverse(Sample(state, actions)).actions
        assert robot is not None
        return robot.astype(np.float32, copy=False)


@final
class Scoring:
    """A `pi0fm_client.types.Policy` whose every chunk carries its scores; the actions are those of the policy without them."""

    def __init__(self, policy: LocalPolicy, options: ScoreOptions) -> None:
        self._policy, self._options = policy, options

    @property
    def metadata(self) -> Mapping[str, Any]:
        """The policy's."""
        return self._policy.metadata

    def infer_batch(self, observations: Sequence[Observation], noise_seeds: Sequence[int] | None = None) -> list[ActionChunk]:
        """As the policy's, with scores."""
        return self._policy.infer_batch(observations, noise_seeds, self._options)


def _on_host(sampled: Tensor, spread: Tensor) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """Chunks [B, H, A] and their spread [B], in one copy from the device."""
    both = torch.cat([sampled.float().flatten(1), spread.float()[:, None]], dim=1).cpu().numpy()
    return both[:, :-1].reshape(sampled.shape), both[:, -1].astype(np.float64)


def _seeds(observations: Sequence[Observation], given: Sequence[int] | None) -> list[int]:
    seeds = [secrets.randbits(63) for _ in observations] if given is None else list(given)
    if len(seeds) != len(observations):
        raise ObservationError(f"one noise seed for each observation: expected {len(observations)}, found {len(seeds)}")
    return seeds
