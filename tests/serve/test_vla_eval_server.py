"""Tests of a bundle behind vla-eval's runner: every chunk is the bundle's, the noise is a function of task, episode and step."""

import numpy as np
import pytest
from small_policies import saved, small_policy

from pi0fm.policy.saved import bundle
from pi0fm_client.errors import ConfigError

vla_eval = pytest.importorskip("vla_eval")
from vla_eval.benchmarks.base import StepBenchmark, StepResult  # noqa: E402
from vla_eval.model_servers.base import SessionContext  # noqa: E402

from pi0fm.serve.vla_eval_server import BundleModelServer  # noqa: E402

__all__ = ["saved", "small_policy"]
EXECUTED, STEPS = 2, 6
pytestmark = pytest.mark.timeout(180)  # the harness alone imports for seconds
seen: list[tuple[dict, list[float]]] = []


class Still(StepBenchmark):
    """One task whose pictures tell the step; it succeeds at its last step. Keeps what it sent and what it was told."""

    def __init__(self, send_state: bool = False, send_wrist_image: bool = False, quat_no_antipodal: bool = False) -> None:
        super().__init__()
        self.asked = (send_state, send_wrist_image, quat_no_antipodal)

    def get_tasks(self):
        return [{"name": "press the button"}]

    def reset(self, task):
        self.steps = 0
        return {}

    def make_obs(self, raw, task):
        assert self.asked == (True, True, True)
        images = {name: np.full((32, 32, 3), shade + self.steps, np.uint8) for name, shade in (("agentview", 20), ("wrist", 90))}
        self.sent = {"images": images, "states": np.full(4, 0.1 * self.steps), "task_description": task["name"]}
        return self.sent

    def step(self, action):
        seen.append((self.sent, np.asarray(action.get("actions", action.get("action"))).tolist()))
        self.steps += 1
        return StepResult({}, 0.0, self.steps == STEPS, {})

    def check_done(self, result):
        return result.done

    def get_step_result(self, result):
        return {"success": result.done}

    def get_metadata(self):
        return {"max_steps": STEPS}

    def get_action_spec(self):
        return {}

    def get_observation_spec(self):
        return {}


def evaluate(saved, **options):
    seen.clear()
    config = {"benchmarks": [{"benchmark": f"{__name__}:Still", "episodes_per_task": 1}]}
    return vla_eval.evaluate(BundleModelServer(str(saved), **options), config, docker=False, no_save=True)


def test_the_runner_executes_the_bundles_chunks(saved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (result,) = evaluate(saved)
    assert result["mean_success"] == 1 and result["num_errors"] == 0 and len(seen) == STEPS
    first, policy, server = list(seen), bundle.load(saved), BundleModelServer(str(saved))
    for start in range(0, STEPS, EXECUTED):  # the wrist's picture comes last at the benchmark and in the bundle
        observation = server.observation(first[start][0])
        assert (observation.images["base"][0, 0, 0], observation.images["wrist"][0, 0, 0]) == (20 + start, 90 + start)
        context = SessionContext("session", "episode")
        server._tasks["session"], context._step = {"name": "press the button", "episode_idx": 0}, start
        (chunk,) = policy.infer_batch([observation], [server._seed(context)])
        np.testing.assert_allclose([told for _, told in first[start : start + EXECUTED]], chunk.actions[:EXECUTED], atol=1e-5)
    evaluate(saved, max_batch_size=2)
    np.testing.assert_allclose([told for _, told in seen], [told for _, told in first], atol=1e-5)


def test_what_the_benchmark_must_send(saved):
    with pytest.raises(ConfigError, match="found 'top'"):
        BundleModelServer(str(saved), cameras={"top": "agentview"})
    server, picture = BundleModelServer(str(saved), cameras={"wrist": "hand"}), np.zeros((32, 32, 3), np.uint8)
    with pytest.raises(ConfigError, match="needs the camera 'wrist'"):
        server.observation({"images": {"agentview": picture}, "states": np.zeros(4)})
    with pytest.raises(ConfigError, match="send_state=true"):
        server.observation({"images": {"agentview": picture, "hand": picture}})
