"""`--policy.type=pi0fm`: which bundle, how it is opened, and the features that it takes, in LeRobot's words.

Owns: the options. Does not know: inference (modeling_pi0fm.py).
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lerobot.configs import FeatureType, PolicyFeature, PreTrainedConfig

from pi0fm.policy.saved.bundle import metadata
from pi0fm_client.errors import ConfigError

TRAINED_ELSEWHERE = "a bundle is trained by pi0fm train, LeRobot can only run it: type pi0fm train --dataset.root ..."


@PreTrainedConfig.register_subclass("pi0fm")
@dataclass
class Pi0fmConfig(PreTrainedConfig):
    """Options of the policy.

    bundle: its folder. n_action_steps: actions of a chunk that are executed, empty for the bundle's own. noise_seed: of every chunk; empty
    draws from torch's generator, which `--seed` of lerobot-eval sets. rename_map: LeRobot's key -> the bundle's column, of observations.
    robot, num_flow_steps, solver, precision, compile, guidance: as of pi0fm serve.
    """

    bundle: str = ""
    n_action_steps: int | None = None
    noise_seed: int | None = None
    rename_map: dict[str, str] = field(default_factory=dict)
    robot: str | None = None
    num_flow_steps: int | None = None
    solver: str | None = None
    precision: str = "auto"
    compile: str = "off"
    guidance: str = "guided"
    push_to_hub: bool = False
    # set by --inference.type=rtc of lerobot-rollout
    rtc_config: Any = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.bundle:
            raise ConfigError("--policy.bundle must name the folder of a bundle, found nothing: type --policy.bundle=outputs/run/bundle")
        known = metadata(Path(self.bundle), self.robot)
        self.n_action_steps = known["execution_horizon"] if self.n_action_steps is None else self.n_action_steps
        if not 1 <= self.n_action_steps <= known["action_horizon"]:
            raise ConfigError(f"--policy.n_action_steps must lie in 1..{known['action_horizon']}, found {self.n_action_steps}")
        columns = [*known["cameras"].values(), known["state_key"]]
        for theirs, column in self.rename_map.items():
            if column not in columns:
                raise ConfigError(f"--policy.rename_map maps {theirs!r} to {column!r}; the bundle has {', '.join(columns)}")
        theirs_of = {column: theirs for theirs, column in self.rename_map.items()}
        height, width = known["image_size"]
        features = {column: PolicyFeature(FeatureType.VISUAL, (3, height, width)) for column in known["cameras"].values()}
        features[known["state_key"]] = PolicyFeature(FeatureType.STATE, (known["state_dim"],))
        self.input_features = {theirs_of.get(column, column): feature for column, feature in features.items()}
        self.output_features = {"action": PolicyFeature(FeatureType.ACTION, (known["robot_action_dim"],))}

    @property
    def observation_delta_indices(self) -> None:
        """One observation at a time."""
        return

    @property
    def reward_delta_indices(self) -> None:
        """No rewards."""
        return

    @property
    def action_delta_indices(self) -> list[int]:
        """Rows of a chunk."""
        return list(range(metadata(Path(self.bundle), self.robot)["action_horizon"]))

    def get_optimizer_preset(self) -> Any:
        """Raise ConfigError: LeRobot does not train it."""
        raise ConfigError(TRAINED_ELSEWHERE)

    def get_scheduler_preset(self) -> Any:
        """Raise ConfigError: LeRobot does not train it."""
        raise ConfigError(TRAINED_ELSEWHERE)

    def validate_features(self) -> None:
        """Accept what the bundle says: features are its own."""
