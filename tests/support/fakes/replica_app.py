"""The application of a replica, for tests of Ray Serve: its actions say which process answered."""

import os
from collections.abc import Sequence

import numpy as np
from fake_server import FakePolicy
from starlette.applications import Starlette

from pi0fm.serve.app import create_app
from pi0fm.serve.limits import ServingLimits
from pi0fm_client.types import ActionChunk, Observation


class PidPolicy(FakePolicy):
    def infer_batch(self, observations: Sequence[Observation], noise_seeds: Sequence[int] | None = None) -> list[ActionChunk]:
        return [ActionChunk(np.full((4, 3), os.getpid(), np.float32), {"infer_ms": 0.0}) for _ in observations]


def build() -> Starlette:
    return create_app(PidPolicy(), ServingLimits(), tokens=["robot"])
