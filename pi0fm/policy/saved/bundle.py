"""A policy on disk: one directory that holds all it needs; nothing is looked up by name.

Owns: the content of a bundle's files, loading and saving. Does not know: their hashes (policy/saved/manifest), training, serving.

    my_policy/
      manifest.json        written last: size and SHA-256 of every other file; a bundle without it is not one
      config.json          network, flow, embodiment, normalisation, how it was trained, versions
      norm_stats.json
      robots.json          only of a mixture: embodiment, statistics and facts of each robot (policy/saved/robots.py)
      model.safetensors    float32 (the moving average of training, when there is one); converted weights as their source has them
      reference.safetensors   of a trained policy: a recorded observation and the chunk for it (policy/saved/reference.py)
      tokenizer/           only for a tokenizer that is not byt5
"""

import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pi0fm import files, options
from pi0fm.data.chain import Chain, make_chain
from pi0fm.data.columns.embodiment import Embodiment
from pi0fm.data.columns.norm_stats import NormStats, norm_stats_from_json
from pi0fm.data.normalization import RELATIVE, NormRule
from pi0fm.data.pictures.resizing import ANTIALIAS, Resize
from pi0fm.data.prompt import BYTES, OPENPI, PromptTokenizer, load_tokenizer
from pi0fm.flow.config import FlowConfig
from pi0fm.flow.matching import FlowMatching
from pi0fm.flow.sampling import overridden
from pi0fm.machine import release
from pi0fm.models.config import Pi0Config
from pi0fm.models.pi0 import Pi0
from pi0fm.policy.device import choose_device, inference_dtype, is_out_of_memory, set_threads
from pi0fm.policy.load_options import GUIDED, LoadOptions
from pi0fm.policy.local import LocalPolicy
from pi0fm.policy.sampling.realtime import refuse_guidance_mode
from pi0fm.policy.sampling.sampler import refuse_compile
from pi0fm.policy.saved import calibration, reference, robots
from pi0fm.policy.saved.calibration import Calibration
from pi0fm.policy.saved.manifest import (
    CONFIG,
    FORMAT,
    STATS,
    WEIGHTS,
    check_files,
    identity,
    listed_files,
    read_json,
    sha256,
    write_manifest,
)
from pi0fm.policy.saved.robots import Robots
from pi0fm.policy.saved.weights import Entries, Put, Weights, fill_network, open_file, tensor_file
from pi0fm.progress import say
from pi0fm_client.errors import BundleError, ConfigError
from pi0fm_client.types import Observation

# by format, the values of a policy's fields that a bundle does not name: each keeps the rules that its weights were trained under
UNNAMED: Mapping[int, Mapping[str, Any]] = {2: {"norm_rule": "centred", "resize": "rounded"}, FORMAT: {}}
VERBOSE_FROM = 2**30  # bytes of weights whose check is reported, with its time


@dataclass(frozen=True)
class PolicyConfig:
    """Everything about a policy but its weights and statistics.

    demonstration_seeds: by task, the lowest and highest seed that its data set holds; an evaluation must not use them.
    camera_sources: by camera, where a simulator finds it (`corner2:96x96`). training: free facts about the run.
    norm_rule: how statistics become scales (data/normalization.py); norm_floor: a share of the range, or robot units, as the rule says;
    resize: how pictures of another size were resized in training (data/pictures/resizing.py);
    norm_epsilon: added to every deviation or range of quantiles, where the weights were trained so (openpi's 1e-6).
    rtc_max_delay: rows that the policy was trained to go on from (flow/committed.py); 0 for none.
    padded_noise: the weights know noise in the dimensions that the robot lacks (released ones do); else these are held at 0.
    """

    model: Pi0Config
    flow: FlowConfig
    embodiment: Embodiment
    normalization: str = "z_score"
    norm_floor: float = 0.01
    norm_epsilon: float = 0.0
    norm_rule: NormRule = RELATIVE
    resize: Resize = ANTIALIAS
    tokenizer: str = BYTES
    prompt_dialect: str = OPENPI
    execution_horizon: int = 8
    rtc_max_delay: int = 0
    fps: float = 0.0
    demonstration_seeds: dict[str, list[int]] = options.option(dict, "")
    camera_sources: dict[str, str] = options.option(dict, "")
    training: dict[str, str] = options.option(dict, "")
    padded_noise: bool = False

    @property
    def is_base(self) -> bool:
        """Whether the bundle is of weights to start from: it waits for the robot and the statistics of a run."""
        return self.embodiment.state_dim is None

    def refuse_base(self, path: Path) -> None:
        """Raise BundleError for weights to start from, which answer for no robot. path: of the bundle."""
        if self.is_base:
            raise BundleError(
                f"a policy needs a robot's cameras and statistics, {path} holds weights to start from; train with --pretrained {path}, or "
                "convert again with --embodiment.cameras and --norm_stats"
            )

    def chain(self, stats: NormStats, tokenizer: str | None = None) -> Chain:
        """The transform chain; `tokenizer` stands for the configured one (a bundle's own directory)."""
        loaded = load_tokenizer(tokenizer or self.tokenizer, self.model.vocab_size)
        return make_chain(
            self.embodiment,
            stats,
            PromptTokenizer(loaded, self.model.max_prompt_tokens, self.model.state_input == "prompt", self.prompt_dialect),
            normalization=self.normalization,
            floor=self.norm_floor,
            epsilon=self.norm_epsilon,
            rule=self.norm_rule,
            resize=self.resize,
            image_size=self.model.vision.image_size,
            padded_state_dim=self.model.state_dim,
            padded_action_dim=self.model.action_dim,
        )

    def metadata(self) -> dict[str, Any]:
        """Facts for callers; sent to every client of a server."""
        state_dim, action_dim = self.embodiment.dims()
        size = self.model.vision.image_size
        return {
            "name": "pi0fm",
            "version": release(),
            "embodiment": self.embodiment.name,
            "cameras": dict(self.embodiment.cameras),
            "limits": dict(self.embodiment.limits),
            "state_key": self.embodiment.state,
            "state_dim": state_dim,
            "robot_action_dim": action_dim,
            "state_names": list(self.embodiment.state_names),
            "action_names": list(self.embodiment.action_names),
            "units": dict(self.embodiment.units),
            "action_horizon": self.model.action_horizon,
            "execution_horizon": self.execution_horizon,
            "rtc_max_delay": self.rtc_max_delay,
            "num_flow_steps": self.flow.num_flow_steps,
            "solver": self.flow.solver,
            "noise_level": self.flow.noise_level,
            "image_size": [size, size],
            "fps": self.fps,
            "demonstration_seeds": dict(self.demonstration_seeds),
            "camera_sources": dict(self.camera_sources),
            "training": dict(self.training),
        }


def save(
    path: Path,
    weights: Mapping[str, Tensor],
    config: PolicyConfig,
    stats: NormStats,
    own: Robots | None = None,
    keep_older: bool = False,
    recorded: Observation | None = None,
) -> None:
    """Write a bundle to `path` in float32, tensor by tensor from wherever they are; otherwise as `new_bundle`."""
    entries = {name: (tuple(tensor.shape), torch.float32) for name, tensor in weights.items()}
    with new_bundle(path, entries, config, stats, own, keep_older, recorded) as put:
        for name, tensor in weights.items():
            put(name, 0, tensor)


@contextmanager
def new_bundle(
    path: Path,
    entries: Entries,
    config: PolicyConfig,
    stats: NormStats,
    own: Robots | None = None,
    keep_older: bool = False,
    recorded: Observation | None = None,
) -> Iterator[Put]:
    """Write a bundle to `path`; the block puts its weights, as `tensor_file` says. A reader sees all of it or nothing.

    own: of a mixture, its robots by name; `config` and `stats` are then those of the first. keep_older: a bundle that is at `path` keeps
    its name until this one is whole, and then is `path-STEPS`. recorded: of the first robot, for the reference.
    Raises BundleError where one exists otherwise, OutputError for a place that cannot be written.
    """
    if path.exists() and not keep_older:
        raise BundleError(f"a bundle is written to a new directory, but {path} exists; remove it or choose another")
    with files.write_faults(path), files.new_directory(path, _older_name(path) if path.exists() else None) as aside:
        if config.tokenizer != BYTES:
            load_tokenizer(config.tokenizer, config.model.vocab_size).save_pretrained(aside / "tokenizer")
            config = replace(config, tokenizer="tokenizer")
        versions = {"pi0fm": release()} | {name: version(name) for name in ("torch", "transformers")}
        files.write_json(aside / CONFIG, {"format": FORMAT, "policy": options.encode(config), "versions": versions})
        files.write_json(aside / STATS, stats.to_json())
        if own:
            files.write_json(aside / robots.FILE, robots.to_json(own))
        with tensor_file(aside / WEIGHTS, entries) as put:
            yield put
        if recorded is not None and reference.fits_in_memory(aside / WEIGHTS):
            if (aside / WEIGHTS).stat().st_size >= VERBOSE_FROM:
                say(f"{path}: sampling the reference chunk in float32 on the CPU")
            cpu, flow = torch.device("cpu"), FlowMatching.from_config(config.flow)
            model = fill_network(open_file(aside / WEIGHTS), config.model, cpu, torch.float32)
            chain = config.chain(stats, None if config.tokenizer == BYTES else str(aside / config.tokenizer))
            reference.make(aside, LocalPolicy(model, flow, chain, {}, cpu, torch.float32, config.padded_noise), recorded)
        write_manifest(aside)


def _older_name(path: Path) -> Path:
    """Return the name that the bundle at `path` is kept under: its number of steps, and a count where that is taken."""
    try:
        steps = read(path)[0].training["steps"]
    except (BundleError, KeyError):
        steps = "unreadable"  # kept all the same: the run that just ended must not fail for it
    aside, count = path.with_name(f"{path.name}-{steps}"), 1
    while aside.exists():
        aside, count = path.with_name(f"{path.name}-{steps}.{count}"), count + 1
    return aside


def load(path: str | Path, options: LoadOptions | None = None, *, guidance: str = GUIDED, **words: Any) -> LocalPolicy:
    """The policy in a bundle, opened as `options` say, or as LoadOptions(**words). guidance: a word of GUIDANCE, of real-time chunking.

    Its weights go straight to the device in the numbers they are multiplied in, and are hashed meanwhile.
    Raises BundleError for a missing, cut, changed or mismatched file, ConfigError for an option that cannot be honoured.
    """
    path, options = Path(path), options or LoadOptions(**words)
    config, stats = read(path, options.robot)
    config.refuse_base(path)
    config = replace(config, flow=overridden(config.flow, options.num_flow_steps, options.solver, options.noise_level))
    flow, device = FlowMatching.from_config(config.flow), choose_device(options.device)
    dtype = inference_dtype(options.precision, device, config.model.decoder.backbone.width)
    refuse_compile(options.compile, device, flow)
    refuse_guidance_mode(guidance, config.rtc_max_delay)
    set_threads(options.threads)
    model = load_network(path, config.model, device, dtype)
    chain = config.chain(stats, None if config.tokenizer == BYTES else str(path / config.tokenizer))
    known = config.metadata() | _facts(path, options.robot, stats)
    alarm = _alarm(path, known.get("robot", config.embodiment.name), flow)
    if alarm is not None:
        known["alarm"] = alarm.metadata()
    rtc = (guidance, config.rtc_max_delay)
    return LocalPolicy(model, flow, chain, known, device, dtype, config.padded_noise, options.compile, *rtc, alarm)


def _alarm(path: Path, robot: str, flow: FlowMatching) -> Calibration | None:
    """Return the bundle's calibration, or None with a printed line where it is of another robot or sampling."""
    found = calibration.read(path)
    asked = (robot, calibration.sampling(flow))
    if found is not None and (found.robot, found.sampling) != asked:
        say(f"no alarm: {path} was calibrated for {found.robot}, {found.sampling}, loaded for {', '.join(asked)}; pi0fm calibrate does so")
        return None
    return found


def load_network(path: Path, model: Pi0Config, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Pi0:
    """A network of `model` with the bundle's weights on `device`, the towers' matrices in `dtype`, all else in float32.

    Raises BundleError where the weights do not fit, or differ from the manifest.
    """
    try:
        with open_weights(path) as weights:
            return fill_network(weights, model, torch.device(device), dtype)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        size = (path / WEIGHTS).stat().st_size
        raise ConfigError(
            f"{device} has no memory left for {path}, whose file has {size / 2**30:.1f} GiB in float32; end what else uses it, or type "
            "--precision bfloat16, or --device cpu"
        ) from None


@contextmanager
def open_weights(path: Path) -> Iterator[Weights]:
    """A bundle's weights; a thread hashes them while the block reads. Raises BundleError at its end where the manifest says otherwise."""
    file, expected = path / WEIGHTS, listed_files(path)[WEIGHTS]["sha256"]
    began = time.perf_counter()
    with ThreadPoolExecutor(1, "pi0fm-hash") as pool:
        found = pool.submit(sha256, file)
        yield open_file(file)
        if found.result() != expected:
            raise BundleError(f"{file} differs from the manifest's SHA-256; it was changed or damaged: copy the bundle again")
    size = file.stat().st_size
    if size >= VERBOSE_FROM:
        say(f"{file}: {size / 1e9:.1f} GB read and verified in {time.perf_counter() - began:.1f} s")


def read(path: Path, robot: str | None = None) -> tuple[PolicyConfig, NormStats]:
    """Configuration and statistics of a bundle whose files were checked against its manifest; of a mixture's for one robot.

    The weights' bytes are checked when they are read. Raises ConfigError for a robot that it does not hold. A bundle of one data set knows
    its robot by `embodiment.name`.
    """
    check_files(path)
    tree = read_json(path / CONFIG)
    if tree.get("format") not in UNNAMED:
        raise BundleError(
            f"{path} is a bundle of format {tree.get('format')}, this pi0fm reads {', '.join(map(str, UNNAMED))}; "
            "the version that wrote it exports it (pi0fm convert --to lerobot), and this one converts that back"
        )
    try:
        config = options.decode(PolicyConfig, {**UNNAMED[tree["format"]], **tree["policy"]})
    except ConfigError as error:
        raise BundleError(f"{path / CONFIG} does not fit this version of pi0fm: {error}") from None
    stats = norm_stats_from_json(read_json(path / STATS), str(path / STATS))
    if robot is None:
        return config, stats
    own = _robots(path)
    robots.refuse_unknown(robot, list(own) or [config.embodiment.name], str(path))
    if not own:
        return config, stats
    chosen, stats = own[robot]
    return replace(config, **vars(chosen)), stats


def robot_names(path: Path) -> tuple[str, ...]:
    """The robots that a bundle serves, the one that is taken by default first."""
    return tuple(_robots(path)) or (read(path)[0].embodiment.name,)


def metadata(path: Path, robot: str | None = None) -> dict[str, Any]:
    """Return the metadata of the policy that `load` makes, without its weights."""
    config, stats = read(path, robot)
    config.refuse_base(path)
    return config.metadata() | _facts(path, robot, stats)


def _robots(path: Path) -> Robots:
    """Return a mixture's robots; none of another bundle."""
    file = path / robots.FILE
    return robots.from_json(read_json(file), str(file)) if file.is_file() else {}


def _facts(path: Path, robot: str | None, stats: NormStats) -> dict[str, Any]:
    """The bundle's identity and the training's range of states; of a mixture's which robot is served, which others could be, and the
    seeds that any of them demonstrated.
    """
    known = {"identity": identity(path), "state_range": {"min": stats.state.min.tolist(), "max": stats.state.max.tolist()}}
    own = _robots(path)
    if not own:
        return known
    return {**known, "robot": robot or next(iter(own)), "robots": list(own), "demonstration_seeds": robots.demonstrated(own)}
