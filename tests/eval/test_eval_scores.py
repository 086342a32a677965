"""Tests of the scores of every policy call: in the rows, the summary and the page, without effect on the episodes."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import tiny_dataset
import torch
from eval_fakes import PointEnvironment, PointPolicy, point_setup

from pi0fm.data.columns.embodiment import Embodiment
from pi0fm.data.columns.norm_stats import NormStats, column_stats
from pi0fm.eval.evaluate import WorkerSetup, in_this_process, run_episodes
from pi0fm.eval.report import page as report
from pi0fm.eval.report.page import ReportContext
from pi0fm.eval.rollouts.episode import Episode, EpisodeResult, RolloutSettings
from pi0fm.eval.summary import summarize
from pi0fm.flow.config import FlowConfig
from pi0fm.flow.matching import FlowMatching
from pi0fm.models.pi0 import Pi0
from pi0fm.policy.local import LocalPolicy, Scoring
from pi0fm.policy.sampling.scores import ScoreOptions
from pi0fm.policy.saved.bundle import PolicyConfig


def scored(*pairs):
    return tuple({"log_prob": density, "noise_norm": norm} for density, norm in pairs)


RESULTS = [
    EpisodeResult("push", 1, "success", 8, 0.5, scores=scored((1.0, 4.0), (3.0, 6.0))),
    EpisodeResult("push", 2, "success", 4, 0.5, scores=scored((6.0, 8.0))),
    EpisodeResult("push", 3, "failure", 40, 0.5, scores=scored((-9.0, 9.0))),
    EpisodeResult("push", 4, "crash", 4, 0.5, error="lost", scores=scored((99.0, 99.0))),
    EpisodeResult("pull", 1, "failure", 40, 0.5, scores=scored((-1.0, 2.0))),
]


class CountingPolicy(PointPolicy):
    """Scores that say which call they belong to."""

    def infer_batch(self, observations, noise_seeds=None):
        chunks = super().infer_batch(observations, noise_seeds)
        calls = len(self.batches)
        return [type(chunk)(chunk.actions, {}, {"log_prob": -float(calls), "noise_norm": float(calls)}) for chunk in chunks]


def test_each_call_of_an_episode_leaves_its_scores():
    results = list(in_this_process([Episode("a", 1), Episode("a", 2)], point_setup(policy=CountingPolicy)))
    for result in results:
        calls = -(-result.steps // 4)
        assert [each["log_prob"] for each in result.scores] == [-float(call) for call in range(1, calls + 1)]
        row = result.row()["scores"]
        assert row["log_prob"] == {"mean": round(-(calls + 1) / 2, 4), "min": -float(calls), "calls": [-float(k + 1) for k in range(calls)]}
        assert row["noise_norm"]["min"] == 1
    (plain,) = in_this_process([Episode("a", 1)], point_setup())
    assert plain.scores == ()
    assert plain.row()["scores"] is None


def test_a_mean_is_over_episodes_and_has_its_count():
    figures = summarize(RESULTS, ("push", "pull")).json()
    assert figures["scores"] == {
        "push": {
            "success": {"episodes": 2, "calls": 3, "log_prob": 4.0, "noise_norm": 6.5},
            "failure": {"episodes": 1, "calls": 1, "log_prob": -9.0, "noise_norm": 9.0},
        },
        "pull": {"failure": {"episodes": 1, "calls": 1, "log_prob": -1.0, "noise_norm": 2.0}},
    }
    assert "scores" not in summarize([EpisodeResult("push", 1, "success", 8, 0.5)], ("push",)).json()


def test_the_page_and_the_files_show_them(tmp_path):
    summary, rows = summarize(RESULTS, ("push", "pull")), [result.row() for result in RESULTS]
    page = report.write(tmp_path, summary, rows, ReportContext("policy")).read_text()
    assert "mean log-likelihood, nats" in page
    assert "<td>push</td>" in page and '<td class="n">2</td><td class="n">3</td><td class="n">4.00</td><td class="n">6.500</td>' in page
    assert '<td class="n">2</td><td class="n">2.00</td><td class="n">1.00</td><td class="n">5.000</td>' in page
    assert json.loads((tmp_path / "summary.json").read_text())["scores"]["push"]["failure"]["episodes"] == 1
    assert json.loads((tmp_path / "episodes.json").read_text())[0]["scores"]["log_prob"]["calls"] == [1.0, 3.0]
    assert pq.read_table(tmp_path / "episodes.parquet")["mean_log_prob"].to_pylist()[0] == 2.0
    plain = report.render(tmp_path, summarize([EpisodeResult("a", 1, "success", 1, 0.1)], ("a",)), [], ReportContext("policy"))
    assert "log-likelihood" not in plain


class Recorded:
    """A policy that keeps every chunk that it answered."""

    def __init__(self, policy):
        self.policy, self.metadata, self.chunks = policy, policy.metadata, []

    def infer_batch(self, observations, noise_seeds=None):
        answered = self.policy.infer_batch(observations, noise_seeds)
        self.chunks.extend(chunk.actions for chunk in answered)
        return answered


@pytest.mark.usefixtures("shapes_unchecked")
@pytest.mark.parametrize("solver", ["euler", "ancestral"])
def test_outcomes_with_and_without_scores_are_identical(solver):
    """A random network on the point: the same chunks, bit by bit, so the same outcomes."""
    config = PolicyConfig(
        model=tiny_dataset.network(),
        flow=FlowConfig(num_flow_steps=2, solver=solver),
        embodiment=Embodiment(cameras={"base": "image"}, state_dim=1, robot_action_dim=1),
    )
    random = np.random.default_rng(0)
    stats = NormStats(
        column_stats(random.normal(60, 40, (50, 1)).astype(np.float32), "state"),
        column_stats(random.normal(8, 6, (50, 1)).astype(np.float32), "action"),
        50,
    )
    torch.manual_seed(0)
    flow = FlowMatching.from_config(config.flow)
    policy = LocalPolicy(Pi0(config.model), flow, config.chain(stats), config.metadata(), torch.device("cpu"), torch.float32)
    episodes = [Episode("a", seed) for seed in range(4)]
    found, asked = [], []
    for judged in (policy, Scoring(policy, ScoreOptions())):
        judged = Recorded(judged)
        asked.append(judged.chunks)
        setup = WorkerSetup(lambda judged=judged: judged, PointEnvironment, RolloutSettings(execution_horizon=4), 4)
        found.append([result.row() for result in run_episodes(episodes, setup, in_this_process)])
    without, with_scores = ([(row["seed"], row["outcome"], row["steps"], row["error"]) for row in rows] for rows in found)
    assert without == with_scores
    assert len(asked[0]) > 4 and all(np.array_equal(*pair) for pair in zip(*asked, strict=True))
    assert not np.array_equal(asked[0][0], asked[0][1])
    assert all(row["scores"] is None for row in found[0])
    assert all(len(row["scores"]["log_prob"]["calls"]) == -(-row["steps"] // 4) for row in found[1])
