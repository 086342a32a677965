"""One recorded observation in a bundle, with its policy's chunk, by which another machine checks that it computes the same.

Owns: reference.safetensors, the comparison of a chunk with it. Does not know: which observation is taken, the rest of a bundle.

    at the end of training   recorded observation, NOISE_SEED -> the policy in float32 on a CPU -> chunk; all of it to the bundle
    pi0fm verify             the same observation and seed -> the policy here, as it is to run -> chunk -> Agreement

Differences are in deviations of the recorded actions, like the network's output. They are given with the change by another noise seed:
a difference far below it changes no behaviour.
Shape letters: H action horizon, A robot action dim.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from pi0fm import files, machine
from pi0fm.data.chain import Sample
from pi0fm.policy.local import LocalPolicy
from pi0fm.policy.saved.manifest import check_files, identity
from pi0fm.progress import say
from pi0fm_client.errors import BundleError, ConfigError, ObservationError
from pi0fm_client.types import Observation

FILE = "reference.safetensors"
NOISE_SEED = 0
# largest differences that agree, in deviations: one action of a chunk by another device, kernel or number of threads
TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 0.05}
SPACE = 1.5  # of the weights' bytes that must be free before a reference is made: the end of a run must not be killed for it


@dataclass(frozen=True)
class Reference:
    """actions: [H, A], robot units. made: device and versions that computed them; of: the bundle's identity, empty until it is written."""

    observation: Observation
    actions: NDArray[np.float32]
    made: Mapping[str, str]
    of: str = ""


@dataclass(frozen=True)
class Agreement:
    """A chunk computed here, compared with the recorded one.

    largest, mean_square: of the differences, the second under its root; another_seed: as mean_square, for two seeds here; in deviations.
    largest_robot_units: [A]. differs: facts of `Reference.made` that are others here, as (there, here).
    """

    agrees: bool
    largest: float
    mean_square: float
    another_seed: float
    tolerance: float
    largest_robot_units: tuple[float, ...]
    here: Mapping[str, str]
    differs: Mapping[str, tuple[str, str]]

    def json(self) -> dict[str, Any]:
        """For a command's last line."""
        return asdict(self)


def make(folder: Path, policy: LocalPolicy, observation: Observation) -> None:
    """Write the reference of a bundle that is being made. `policy`: its own, from its files."""
    chunk = policy.infer_batch([observation], [NOISE_SEED])[0]
    images = {f"images.{name}": image for name, image in observation.images.items()}
    given: dict[str, NDArray[Any]] = {**images, "state": np.asarray(observation.state, np.float32), "actions": chunk.actions}
    arrays = {name: np.ascontiguousarray(array) for name, array in given.items()}
    # one key: more of them would be written in no fixed order
    told = json.dumps({"prompt": observation.prompt, "made": circumstances(policy)}, sort_keys=True)
    files.write_bytes(folder / FILE, save(arrays, {"reference": told}))


def fits_in_memory(weights: Path) -> bool:
    """Tell whether memory holds a copy of the weights to make a reference with; print a line where it does not."""
    needed, free = SPACE * weights.stat().st_size, machine.free_memory()
    if needed > free:
        say(f"no reference for pi0fm verify: it takes {needed / 2**30:.1f} GiB of memory, {free / 2**30:.1f} are free")
    return needed <= free


def read(path: Path) -> Reference:
    """The reference of a bundle. Raises BundleError where it has none, or where it is damaged."""
    check_files(path)
    if not (path / FILE).is_file():
        raise BundleError(
            f"{path} holds no recorded observation to replay: it was converted, or written by an older pi0fm; type --against with a "
            "bundle of the same robot that pi0fm train wrote"
        )
    try:
        with safe_open(path / FILE, framework="np") as opened:
            arrays = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  (it is no mapping)
            told = json.loads(opened.metadata()["reference"])
        images = {name.partition(".")[2]: array for name, array in arrays.items() if name.startswith("images.")}
        observation = Observation(images, arrays["state"], str(told["prompt"]))
        return Reference(observation, arrays["actions"], {name: str(value) for name, value in told["made"].items()}, identity(path))
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise BundleError(f"{path / FILE} is not readable ({' '.join(str(error).split()):.120}); copy the bundle again") from None


def compare(policy: LocalPolicy, reference: Reference, tolerance: float | None = None) -> Agreement:
    """Compare the policy's chunk for the recorded observation and seed with the recorded chunk.

    tolerance: the largest difference that agrees; None takes TOLERANCES. Raises ConfigError for a policy of another robot or horizon.
    """
    seen, recorded = reference.observation, reference.actions
    allowed = TOLERANCES[policy.dtype] if tolerance is None else tolerance
    try:
        found, other = (policy.infer_batch([seen], [seed])[0].actions for seed in (NOISE_SEED, NOISE_SEED + 1))
    except (ObservationError, KeyError) as error:
        raise ConfigError(f"the recorded observation is of another robot than the policy: {error}; name a bundle of the same one") from None
    if found.shape != recorded.shape:
        raise ConfigError(
            f"the recorded chunk must be of the policy's shape {list(found.shape)}, found {list(recorded.shape)}; name a bundle of "
            "the same robot and action horizon"
        )

    def normal(actions: NDArray[np.float32]) -> NDArray[np.float32]:
        made = policy.chain.forward(Sample(np.asarray(seen.state, np.float32)[None], actions[None])).actions
        assert made is not None
        return made[0, :, : recorded.shape[1]]

    apart, seeds = normal(found) - normal(recorded), normal(other) - normal(found)
    here = circumstances(policy)
    largest = float(np.abs(apart).max())
    return Agreement(
        agrees=largest <= allowed,
        largest=largest,
        mean_square=float(np.sqrt(np.square(apart, dtype=np.float64).mean())),
        another_seed=float(np.sqrt(np.square(seeds, dtype=np.float64).mean())),
        tolerance=allowed,
        largest_robot_units=tuple(float(each) for each in np.abs(found - recorded).max(axis=0)),
        here=here,
        differs={name: (reference.made.get(name, "unknown"), now) for name, now in here.items() if reference.made.get(name) != now},
    )


def circumstances(policy: LocalPolicy) -> dict[str, str]:
    """Name the device, versions and settings that the rounding of a chunk depends on."""
    device = torch.cuda.get_device_name(policy.device) if policy.device.type == "cuda" else machine.describe_machine()["processor"]
    versions = {
        name: version for name, version in machine.describe_versions().items() if name in ("pi0fm", "torch", "transformers", "numpy")
    }
    facts = {"device": f"{policy.device.type}, {device}", "numbers": str(policy.dtype).removeprefix("torch.")}
    facts |= {"compile": policy.sampler.compile, "threads": str(torch.get_num_threads()), **versions}
    return facts | {"solver": f"{policy.flow.solver}, {policy.flow.num_flow_steps} steps"}
