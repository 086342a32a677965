"""A bundle as a model server of vla-eval, the field's evaluation harness.

Owns: `BundleModelServer`: the camera of each of the benchmark's pictures, the parameters that it requests from the benchmark. Does not
know: benchmarks, transport.

    python -m pi0fm.serve.vla_eval_server --args.bundle BUNDLE --port 8000
    vla-eval run --no-docker --config libero.yaml                              (its server.url: ws://127.0.0.1:8000)

vla-eval's LIBERO sends neither state nor wrist picture by default, and turns rotations to their shorter form, which weights of openpi and
LeRobot do not know: the requested parameters mend that, unless the benchmark's configuration says otherwise.
"""

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from vla_eval.model_servers.base import SessionContext
from vla_eval.model_servers.predict import PredictModelServer
from vla_eval.specs import IMAGE_RGB, LANGUAGE, RAW, DimSpec

from pi0fm.policy.load_options import LoadOptions
from pi0fm.policy.saved import bundle as bundles
from pi0fm_client.errors import ConfigError
from pi0fm_client.types import Observation


class BundleModelServer(PredictModelServer):
    """Chunks of a bundle for every observation; several sessions are inferred together with max_batch_size above 1.

    cameras: the bundle's camera -> the benchmark's, such as {"image": "agentview", "image2": "wrist"}; by name where both have it, else in
    order. execution_horizon: actions executed of a chunk; the bundle's own when not given. seed: of the noise, with task, episode and step.
    Raises BundleError, and ConfigError for a camera that the bundle does not have.
    """

    def __init__(
        self,
        bundle: str,
        cameras: dict[str, str] | None = None,
        execution_horizon: int | None = None,
        robot: str | None = None,
        num_flow_steps: int | None = None,
        device: str | None = None,
        seed: int = 0,
        max_batch_size: int = 1,
        max_wait_time: float = 0.01,
    ) -> None:
        self.policy = bundles.load(bundle, LoadOptions(robot=robot, num_flow_steps=num_flow_steps, device=device))
        known = self.policy.metadata
        super().__init__(
            chunk_size=execution_horizon or known["execution_horizon"], max_batch_size=max_batch_size, max_wait_time=max_wait_time
        )
        self._tasks: dict[str, dict[str, Any]] = {}
        self.cameras, self.given, self.seed = list(known["cameras"]), dict(cameras or {}), seed
        unknown = sorted(set(self.given) - set(self.cameras))
        if unknown:
            raise ConfigError(f"the bundle has the cameras {', '.join(self.cameras)}, found {unknown[0]!r}; correct --args.cameras")

    async def on_episode_start(self, config: dict[str, Any], ctx: SessionContext) -> None:
        """Record the task, which the noise depends on."""
        self._tasks[ctx.session_id] = dict(config.get("task") or {})
        await super().on_episode_start(config, ctx)

    def predict_batch(self, obs_batch: list[Any], ctx_batch: list[SessionContext]) -> list[Any]:
        """One chunk for each observation."""
        seeds = [self._seed(ctx) for ctx in ctx_batch]
        return [{"actions": chunk.actions} for chunk in self.policy.infer_batch([self.observation(obs) for obs in obs_batch], seeds)]

    def observation(self, sent: Mapping[str, Any]) -> Observation:
        """Return a benchmark's message as an observation. Raises ConfigError where it lacks the state or a camera."""
        images, state = dict(sent.get("images") or {}), sent.get("states", sent.get("state"))
        left = [name for name in images if name not in self.given.values() and name not in self.cameras]
        taken = {}
        for camera in self.cameras:
            source = self.given.get(camera) or (camera if camera in images else None) or (left.pop(0) if left else None)
            if source not in images:
                raise ConfigError(f"the bundle needs the camera {camera!r}, the benchmark sends {sorted(images)}; type --args.cameras")
            taken[camera] = np.ascontiguousarray(images[source], np.uint8)
        if state is None:
            raise ConfigError("the bundle needs the state, the benchmark sends none; type --param send_state=true to vla-eval run")
        return Observation(taken, np.asarray(state, np.float32).reshape(-1), str(sent.get("task_description", "")))

    def get_observation_params(self) -> dict[str, Any]:
        """Request state, wrist picture, and rotations as robosuite has them."""
        return {"send_state": True, "send_wrist_image": len(self.cameras) > 1, "quat_no_antipodal": True}

    def get_action_spec(self) -> dict[str, DimSpec]:
        """Robot units: no convention is claimed."""
        return {"action": RAW}

    def get_observation_spec(self) -> dict[str, DimSpec]:
        """Pictures, language and a state in robot units."""
        return {"image": IMAGE_RGB, "language": LANGUAGE, "state": RAW}

    def _seed(self, ctx: SessionContext) -> int:
        task = self._tasks.get(ctx.session_id, {})
        text = f"{self.seed}/{task.get('name')}/{task.get('episode_idx')}/{ctx.step}"
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


if __name__ == "__main__":
    from vla_eval.model_servers.serve import run_server

    run_server(BundleModelServer)
