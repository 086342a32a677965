"""A policy on disk: one directory that holds all it needs; nothing is looked up by name.

Owns: the bundle's files, their check, loading and saving. Does not know: training, serving.

    my_policy/
      manifest.json        written last: size and SHA-256 of every other file; a bundle without it is not one
      config.json          network, flow, embodiment, normalisation, how it was trained, versions
      norm_stats.json
      robots.json          only of a mixture: what each of its robots has of its own (policy/robots.py)
      model.safetensors    float32 (the moving average of training, when there is one); converted weights as their source has them
      tokenizer/           only for a tokenizer that is not byt5
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pi0fm import files, options
from pi0fm.data.chain import Chain, make_chain
from pi0fm.data.columns.embodiment import Embodiment
from pi0fm.data.columns.norm_stats import NormStats, norm_stats_from_json
from pi0fm.data.prompt import BYTES, OPENPI, PromptTokenizer, load_tokenizer
from pi0fm.flow.matching import FlowConfig, FlowMatching
from pi0fm.flow.sampling import overridden
from pi0fm.models.pi0 import Pi0, Pi0Config
from pi0fm.policy import robots
from pi0fm.policy.device import choose_device, inference_dtype
from pi0fm.policy.local import LocalPolicy
from pi0fm.policy.robots import Robots
from pi0fm.policy.sampler import refuse_compile
from pi0fm_client.errors import BundleError, ConfigError

FORMAT = 2
SMALL = 64 * 2**20  # files up to here are hashed at every load; larger ones are told by their size and their own header


@dataclass(frozen=True)
class PolicyConfig:
    """Everything about a policy but its weights and statistics.

    demonstration_seeds: by task, the lowest and highest seed that its data set holds; an evaluation must not use them.
    camera_sources: by camera, where a simulator finds it (`corner2:96x96`). training: free facts about the run.
    padded_noise: the weights know noise in the dimensions that the robot lacks (released ones do); else these are held at 0.
    """

    model: Pi0Config
    flow: FlowConfig
    embodiment: Embodiment
    normalization: str = "z_score"
    norm_floor: float = 1e-3
    tokenizer: str = BYTES
    prompt_dialect: str = OPENPI
    execution_horizon: int = 8
    fps: float = 0.0
    demonstration_seeds: dict[str, list[int]] = options.option(dict, "")
    camera_sources: dict[str, str] = options.option(dict, "")
    training: dict[str, str] = options.option(dict, "")
    padded_noise: bool = False

    def chain(self, stats: NormStats, tokenizer: str | None = None) -> Chain:
        """The transform chain; `tokenizer` stands for the configured one (a bundle's own directory)."""
        loaded = load_tokenizer(tokenizer or self.tokenizer, self.model.vocab_size)
        return make_chain(
            self.embodiment,
            stats,
            PromptTokenizer(loaded, self.model.max_prompt_tokens, self.model.state_input == "prompt", self.prompt_dialect),
            normalization=self.normalization,
            floor=self.norm_floor,
            image_size=self.model.vision.image_size,
            padded_state_dim=self.model.state_dim,
            padded_action_dim=self.model.action_dim,
        )

    def metadata(self) -> dict[str, Any]:
        """What a caller must know; sent to every client of a server."""
        state_dim, action_dim = self.embodiment.dims()
        size = self.model.vision.image_size
        return {
            "name": "pi0fm",
            "version": version("pi0fm"),
            "embodiment": self.embodiment.name,
            "cameras": dict(self.embodiment.cameras),
            "state_key": self.embodiment.state,
            "state_dim": state_dim,
            "robot_action_dim": action_dim,
            "action_horizon": self.model.action_horizon,
            "execution_horizon": self.execution_horizon,
            "num_flow_steps": self.flow.num_flow_steps,
            "solver": self.flow.solver,
            "noise_level": self.flow.noise_level,
            "image_size": [size, size],
            "fps": self.fps,
            "demonstration_seeds": dict(self.demonstration_seeds),
            "camera_sources": dict(self.camera_sources),
            "training": dict(self.training),
        }


def save(path: Path, weights: Mapping[str, Tensor], config: PolicyConfig, stats: NormStats, own: Robots | None = None) -> None:
    """Write a bundle to `path`, which must not exist; a reader sees all of it or nothing. Raises BundleError when it exists.

    own: of a mixture, its robots by name; `config` and `stats` are then those of the first.
    """
    if path.exists():
        raise BundleError(f"a bundle is written to a new directory, but {path} exists; remove it or choose another")
    with files.new_directory(path) as aside:
        save_file({name: tensor.detach().float().cpu().contiguous() for name, tensor in weights.items()}, aside / "model.safetensors")
        if config.tokenizer != BYTES:
            load_tokenizer(config.tokenizer, config.model.vocab_size).save_pretrained(aside / "tokenizer")
            config = replace(config, tokenizer="tokenizer")
        tree = {
            "format": FORMAT,
            "policy": options.encode(config),
            "versions": {name: version(name) for name in ("pi0fm", "torch", "transformers")},
        }
        files.write_json(aside / "config.json", tree)
        files.write_json(aside / "norm_stats.json", stats.to_json())
        if own:
            files.write_json(aside / robots.FILE, robots.to_json(own))
        listed = {str(file.relative_to(aside)): _describe(file) for file in sorted(aside.rglob("*")) if file.is_file()}
        files.write_json(aside / "manifest.json", {"format": FORMAT, "files": listed})


def load(
    path: str | Path,
    *,
    robot: str | None = None,
    device: str | None = None,
    precision: str = "auto",
    num_flow_steps: int | None = None,
    solver: str | None = None,
    noise_level: float | None = None,
    threads: int | None = None,
    compile: str = "off",
) -> LocalPolicy:
    """The policy in a bundle.

    robot: of a mixture's bundle, the name of the robot that it is to serve; the first when None.
    device: the best that works when None. precision: `auto`, `float32` or `bfloat16`, of the towers' matrices.
    num_flow_steps, solver, noise_level: in place of the bundle's; noise_level belongs to solver euler_maruyama.
    threads: torch's CPU threads, a setting of the whole process. compile: off, kernels or graph; see policy/sampler.py.
    Raises BundleError for a missing, cut or mismatched file, ConfigError for an option that cannot be honoured.
    """
    path = Path(path)
    config, stats = read(path, robot)
    config = replace(config, flow=overridden(config.flow, num_flow_steps, solver, noise_level))
    flow = FlowMatching.from_config(config.flow)
    if threads is not None:
        if threads < 1:
            raise ConfigError(f"threads must be >= 1, found {threads}")
        torch.set_num_threads(threads)
    chosen = choose_device(device)
    refuse_compile(compile, chosen, flow)
    with torch.device("meta"):
        model = Pi0(config.model)
    _fill(model, load_weights(path), path)
    chain = config.chain(stats, None if config.tokenizer == BYTES else str(path / config.tokenizer))
    return LocalPolicy(
        model,
        flow,
        chain,
        config.metadata() | _robot_facts(path, robot),
        chosen,
        inference_dtype(precision, chosen, config.model.decoder.backbone.width),
        config.padded_noise,
        compile,
    )


def read(path: Path, robot: str | None = None) -> tuple[PolicyConfig, NormStats]:
    """Configuration and statistics of a bundle whose files were checked against its manifest; of a mixture's for one robot.

    Raises ConfigError for a robot that it does not hold. A bundle of one data set knows its robot by `embodiment.name`.
    """
    _check(path)
    tree = _json(path / "config.json")
    if tree.get("format") != FORMAT:
        raise BundleError(
            f"{path} is a bundle of format {tree.get('format')}, this pi0fm reads {FORMAT}; "
            "the version that wrote it exports it (pi0fm convert --to lerobot), and this one converts that back"
        )
    try:
        config = options.decode(PolicyConfig, tree["policy"])
    except ConfigError as error:
        raise BundleError(f"{path / 'config.json'} does not fit this version of pi0fm: {error}") from None
    stats = norm_stats_from_json(_json(path / "norm_stats.json"), str(path / "norm_stats.json"))
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
    """What the policy that `load` makes says of itself, without its weights."""
    return read(path, robot)[0].metadata() | _robot_facts(path, robot)


def _robots(path: Path) -> Robots:
    """Of a mixture's bundle its robots, of another none."""
    file = path / robots.FILE
    return robots.from_json(_json(file), str(file)) if file.is_file() else {}


def _robot_facts(path: Path, robot: str | None) -> dict[str, Any]:
    """Of a mixture's bundle, which robot is served, which others could be, and the seeds that any of them demonstrated."""
    own = _robots(path)
    return {"robot": robot or next(iter(own)), "robots": list(own), "demonstration_seeds": robots.demonstrated(own)} if own else {}


def load_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a bundle, on the CPU. Nothing is unpickled."""
    try:
        return load_file(path / "model.safetensors")
    except (SafetensorError, OSError) as error:
        raise BundleError(f"{path / 'model.safetensors'} is cut or damaged ({error}); copy the bundle again") from None


def _fill(model: Pi0, weights: dict[str, Tensor], path: Path) -> None:
    wanted = model.state_dict()
    missing, unexpected = sorted(wanted.keys() - weights.keys()), sorted(weights.keys() - wanted.keys())
    shapes = [
        f"{name} {list(weights[name].shape)} for {list(wanted[name].shape)}"
        for name in wanted.keys() & weights.keys()
        if weights[name].shape != wanted[name].shape
    ]
    if missing or unexpected or shapes:
        raise BundleError(
            f"the weights in {path} do not fit its configuration: missing {missing}, unexpected {unexpected}, of another shape {shapes}"
        )
    # converted weights may be bfloat16: computing begins in float32, whatever is stored
    model.load_state_dict({name: weights.pop(name).float() for name in list(weights)}, assign=True)


def _describe(file: Path) -> dict[str, Any]:
    with file.open("rb") as opened:
        return {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(opened, "sha256").hexdigest()}


def _check(path: Path) -> None:
    if not path.is_dir():
        raise BundleError(
            f"no bundle at {path}; train one with pi0fm train, whose last line names the directory, or convert weights with pi0fm convert"
        )
    listed = _json(path / "manifest.json").get("files")
    if not isinstance(listed, dict) or not all(
        isinstance(entry, dict) and {"bytes", "sha256"} <= entry.keys() for entry in listed.values()
    ):
        raise BundleError(f"{path / 'manifest.json'} must say bytes and sha256 of each file; copy the bundle again")
    for name in ("config.json", "norm_stats.json", "model.safetensors", *listed):
        file = path / name
        if name not in listed or not file.resolve().is_relative_to(path.resolve()):
            raise BundleError(f"{path / 'manifest.json'} must list {name} inside the bundle; copy the bundle again")
        if not file.is_file():
            raise BundleError(f"the bundle {path} lacks {name}; copy it again, all files")
        size = file.stat().st_size
        if size != listed[name]["bytes"]:
            raise BundleError(f"{file} has {size} bytes, the manifest says {listed[name]['bytes']}; it is cut: copy the bundle again")
        if size <= SMALL and _describe(file)["sha256"] != listed[name]["sha256"]:
            raise BundleError(f"{file} differs from the manifest's SHA-256; it was changed or damaged: copy the bundle again")
    # A tokenizer reads whatever lies in its folder. Hidden files are those of file managers and downloads.
    found = (file.relative_to(path) for file in path.rglob("*") if file.is_file())
    extra = sorted(
        str(name) for name in found if str(name) not in (*listed, "manifest.json") and not any(part.startswith(".") for part in name.parts)
    )
    if extra:
        raise BundleError(f"the bundle {path} holds {', '.join(extra[:5])}, which its manifest does not list; move it elsewhere")


def _json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text()))
    except FileNotFoundError:
        raise BundleError(f"the bundle {path.parent} lacks {path.name}; copy it again, all files") from None
    except (OSError, ValueError, TypeError) as error:
        raise BundleError(f"{path} is not readable ({' '.join(str(error).split()):.120}); copy the bundle again") from None
