"""What LeRobot does around the policy: rename, batch, move. Normalisation, resizing and tokens are the bundle's own chain, inside it."""

from typing import Any

from lerobot.processor import (
    AddBatchDimensionProcessorStep,
    DeviceProcessorStep,
    PolicyProcessorPipeline,
    RenameObservationsProcessorStep,
)
from lerobot.processor.converters import policy_action_to_transition, transition_to_policy_action
from lerobot.utils.constants import POLICY_POSTPROCESSOR_DEFAULT_NAME, POLICY_PREPROCESSOR_DEFAULT_NAME

from lerobot_policy_pi0fm.configuration_pi0fm import Pi0fmConfig


def make_pi0fm_pre_post_processors(config: Pi0fmConfig, dataset_stats: Any = None) -> tuple[Any, Any]:
    """Return both pipelines; a data set's statistics are not used, the bundle has those of its training."""
    steps = [
        RenameObservationsProcessorStep(rename_map=config.rename_map),
        AddBatchDimensionProcessorStep(),
        DeviceProcessorStep(device="cpu"),
    ]
    before = PolicyProcessorPipeline(steps=steps, name=POLICY_PREPROCESSOR_DEFAULT_NAME)
    after = PolicyProcessorPipeline(
        steps=[DeviceProcessorStep(device="cpu")],
        name=POLICY_POSTPROCESSOR_DEFAULT_NAME,
        to_transition=policy_action_to_transition,
        to_output=transition_to_policy_action,
    )
    return before, after
