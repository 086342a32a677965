"""Tests of predicted against recorded chunks: closed forms of the errors, the evaluated episodes, the files."""

import json
import re
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
import tiny_dataset
from small_policies import observations, saved, small_policy

from pi0fm.cli import main as cli
from pi0fm.data.columns.embodiment import Embodiment
from pi0fm.data.columns.lerobot_source import open_source
from pi0fm.data.config import DatasetConfig
from pi0fm.data.pictures.streaming import open_pictures
from pi0fm.eval import open_loop
from pi0fm.eval.open_loop import Moments, choose_moments, compare, infer_moments, open_episodes, read_moments, read_policy
from pi0fm.eval.recorded_config import OpenLoopConfig
from pi0fm.eval.report import open_loop as report
from pi0fm.policy.saved import bundle
from pi0fm_client.errors import ConfigError, OutputError, ServingError
from pi0fm_client.types import ActionChunk

__all__ = ["observations", "saved", "small_policy"]


@pytest.fixture(scope="session")
def dataset(tmp_path_factory):
    return tiny_dataset.written(tmp_path_factory)


class Scripted:
    """A policy that answers with given chunks, in the order of the calls."""

    def __init__(self, chunks):
        self.metadata, self.chunks = {}, iter(chunks)

    def infer_batch(self, observations, noise_seeds=None):
        return [ActionChunk(next(self.chunks)) for _ in observations]


def moments(recorded, real, still, episode):
    count = len(recorded)
    pictures = np.zeros((count, 1, 2, 2, 3), np.uint8)
    return Moments(np.arange(count), np.array(episode), np.float32(recorded), np.array(real), np.float32(still), pictures)


def test_errors_of_two_moments_worked_by_hand():
    """Second dimension never changes; the second moment's second row is past the episode's end."""
    recorded = [[[0, 5], [2, 5]], [[4, 5], [4, 5]]]
    given = moments(recorded, [[True, True], [True, False]], [[1, 5], [4, 5]], [0, 1])
    predicted = np.float32([[[1, 6], [2, 5]], [[2, 5], [99, 99]]])
    found = compare(given, predicted, np.full(2, np.nan), ("a", "b"))
    # rows: |1-0|, |2-4| -> 1.5; |2-2| -> 0 of the one moment that has it
    np.testing.assert_allclose(found.error, [[1.5, 0.5], [0, 0]])
    np.testing.assert_allclose(found.still, [[0.5, 0], [1, 0]])
    np.testing.assert_allclose(found.mean, [[2, 0], [0, 0]])  # mean chunk: (0 + 4) / 2, and 2
    scale = np.std([0, 2, 4])
    np.testing.assert_allclose(found.scale, [scale, 0])
    np.testing.assert_allclose(found.each, [0.5 / scale, 2 / scale])  # (1 + 0) / 2; 2
    # still: (1 + 1) / 2 = 1 and 0; mean: (2 + 0) / 2 = 1 and 2
    assert found.over_still.value == pytest.approx(2.5 / 1)
    assert found.over_mean.value == pytest.approx(2.5 / 3)


def test_one_episode_has_no_interval_and_two_alike_a_narrow_one():
    recorded = np.arange(8.0).reshape(4, 2, 1)
    given = moments(recorded, np.ones((4, 2), bool), np.zeros((4, 1)), [0, 0, 0, 0])
    assert compare(given, np.float32(recorded + 1), np.full(4, np.nan), ("a",)).over_still.interval is None
    twice = moments(np.tile(recorded, (2, 1, 1)), np.ones((8, 2), bool), np.zeros((8, 1)), [0] * 4 + [1] * 4)
    ratio = compare(twice, np.float32(np.tile(recorded, (2, 1, 1)) + 1), np.full(8, np.nan), ("a",)).over_still
    assert ratio.interval == pytest.approx((ratio.value, ratio.value))


def test_the_recorded_chunks_have_no_error_and_standing_still_has_its_own(dataset, saved):
    config = OpenLoopConfig(policy=str(saved), dataset=DatasetConfig(root=dataset))
    judged = read_policy(config)
    source, _ = open_episodes(config, judged)
    stride, place = choose_moments(config, judged, source)
    given = read_moments(config.dataset, judged, source, place)
    assert stride == 2 and place.tolist() == [*range(0, 12, 2), *range(12, 21, 2), *range(21, 28, 2)]
    perfect = infer_moments(config, judged, source, Scripted(given.recorded), given)
    assert perfect.over_still.value == 0 and not perfect.each.any()
    lazy = infer_moments(config, judged, source, Scripted(np.repeat(given.still[:, None], 4, 1)), given)
    assert lazy.over_still.value == pytest.approx(1)
    np.testing.assert_allclose(lazy.error, lazy.still)
    # standing still: dimension 0 is trained as a difference to the state, the others repeat the action of the row before
    np.testing.assert_array_equal(given.still[:, 0], source.state[place, 0])
    inside = ~np.isin(place, [0, 12, 21])
    np.testing.assert_array_equal(given.still[inside, 1:], source.action[place[inside] - 1, 1:])


class Leaving(Scripted):
    """A server that is killed after some answers."""

    def infer_batch(self, observations, noise_seeds=None):
        try:
            return super().infer_batch(observations, noise_seeds)
        except StopIteration:
            raise ServingError("gone") from None


def test_answers_outlive_a_server_that_is_killed_on_the_way(dataset, saved, tmp_path, capsys):
    config = OpenLoopConfig(policy=str(saved), dataset=DatasetConfig(root=dataset), batch_size=3)
    judged = read_policy(config)
    source, _ = open_episodes(config, judged)
    given = read_moments(config.dataset, judged, source, choose_moments(config, judged, source)[1])
    kept = tmp_path / open_loop.UNFINISHED
    with pytest.raises(ServingError):
        infer_moments(config, judged, source, Leaving(given.recorded[:7]), given, kept)
    assert "answers at 6 of 15 moments are kept" in capsys.readouterr().err
    other = replace(config, seed=1)
    with pytest.raises(ServingError):
        # another question takes none of them, and keeps none
        infer_moments(other, judged, source, Leaving(given.recorded[:2]), given, kept)
    found = infer_moments(config, judged, source, Scripted(given.recorded[6:]), given, kept)
    assert found.over_still.value == 0 and not kept.exists()


def test_a_moment_has_the_pictures_that_training_has(dataset, saved, tmp_path):
    config = OpenLoopConfig(policy=str(saved), dataset=DatasetConfig(root=dataset, cache_dir=tmp_path))
    judged = read_policy(config)
    source, _ = open_episodes(config, judged)
    _, place = choose_moments(config, judged, source)
    trained = open_pictures(source, config.dataset, judged.image_size, 4, resize=judged.resize)
    np.testing.assert_array_equal(read_moments(config.dataset, judged, source, place).pictures, trained.gather(place))


def test_the_most_moments_are_whole_episodes(dataset, saved):
    config = OpenLoopConfig(policy=str(saved), dataset=DatasetConfig(root=dataset), moments=11)
    judged = read_policy(config)
    source, _ = open_episodes(config, judged)
    _, place = choose_moments(config, judged, source)
    assert np.unique(source.episode[place]).tolist() == [0, 2]


def trained_on(saved, small_policy, tmp_path, dataset, **facts):
    """The bundle, of a run on this very data set."""
    source = open_source(DatasetConfig(root=dataset), small_policy.config.embodiment)
    training = {"dataset_fingerprint": source.fingerprint, **facts}
    bundle.save(tmp_path / "trained", small_policy.weights, replace(small_policy.config, training=training), small_policy.stats)
    return str(tmp_path / "trained")


@pytest.mark.parametrize(
    ("facts", "asked", "judged", "told"),
    [
        ({"held_out_episodes": "1,2"}, (), [1, 2], "no: its run"),
        ({"held_out_episodes": "1,2"}, (1,), [1], "no: its run"),
        ({"held_out_episodes": "1,2"}, (0, 1), [0, 1], "yes, on 1 of 2 episodes"),
        ({}, (), [0, 1, 2], "yes, on 3 of 3 episodes"),
    ],
)
def test_held_out_episodes_come_first(saved, small_policy, tmp_path, dataset, facts, asked, judged, told):
    path = trained_on(saved, small_policy, tmp_path, dataset, **facts)
    config = OpenLoopConfig(policy=path, dataset=DatasetConfig(root=dataset, episodes=asked))
    source, trained = open_episodes(config, read_policy(config))
    assert np.unique(source.episode).tolist() == judged and open_loop.describe_overlap(trained, source.episode).startswith(told)


def test_another_data_set_says_that_nothing_is_known(saved, dataset):
    config = OpenLoopConfig(policy=str(saved), dataset=DatasetConfig(root=dataset))
    assert open_loop.describe_overlap(open_episodes(config, read_policy(config))[1], np.arange(3)).startswith("not known")


def test_a_column_of_another_name_is_given_as_to_a_training(small_policy, dataset, tmp_path):
    """And the line of what is missing says an option that there is."""
    other = replace(small_policy.config.embodiment, cameras={"base": "observation.images.head", "wrist": "observation.images.wrist"})
    bundle.save(tmp_path / "other", small_policy.weights, replace(small_policy.config, embodiment=other), small_policy.stats)
    words = {"policy": str(tmp_path / "other"), "dataset": DatasetConfig(root=dataset)}
    config = OpenLoopConfig(**words, embodiment=Embodiment(cameras={"base": "observation.images.base"}))
    assert open_episodes(config, read_policy(config))[0].embodiment.cameras == small_policy.config.embodiment.cameras
    with pytest.raises(ConfigError, match=r"has the cameras base, wrist, found --embodiment\.cameras\.head"):
        read_policy(OpenLoopConfig(**words, embodiment=Embodiment(cameras={"head": "observation.images.base"})))
    with pytest.raises(ConfigError, match=r"embodiment\.state_dim cannot be given"):
        OpenLoopConfig(**words, embodiment=Embodiment(state_dim=4))


def test_the_command_writes_a_page_figures_and_every_chunk(saved, dataset, tmp_path, capsys):
    out = tmp_path / "out"
    assert cli.main(["eval", "--policy", str(saved), "--dataset.root", str(dataset), "--likelihood", "--output_dir", str(out)]) == 0
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert line["episodes"] == 3 and line["moments"] == 15 and list(line["error"]) == ["action 0", "action 1", "action 2"]
    rows = pq.read_table(out / "moments.parquet").to_pylist()
    error = np.abs(np.subtract([row["predicted"] for row in rows], [row["recorded"] for row in rows])).reshape(15, 4, 3)
    real = np.arange(4) < np.array([row["rows"] for row in rows])[:, None]
    of_rows = [error[real[:, h], h].mean(0) for h in range(4)]
    np.testing.assert_allclose(list(line["error"].values()), np.mean(of_rows, 0), rtol=1e-4)
    whole = [row for row in rows if row["rows"] == 4]
    assert all(row["nats_per_entry"] is not None for row in whole) and len(whole) < len(rows)
    assert {row["nats_per_entry"] for row in rows if row["rows"] < 4} == {None}
    assert line["nats_per_entry"] == pytest.approx(np.mean([row["nats_per_entry"] for row in whole]), rel=1e-4)
    page = (out / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 1 + 2 * 8 + 2 * 3 and not re.search(r'(src|href)="http', page)
    assert "press the button" in page and json.loads((out / "summary.json").read_text())["error"] == line["error"]
    # a second time into the same folder: refused, and nothing is lost
    assert cli.main(["eval", "--policy", str(saved), "--dataset.root", str(dataset), "--output_dir", str(out)]) == 1
    assert "never overwritten" in capsys.readouterr().err and (out / "report.html").read_text() == page


def test_the_same_seed_gives_the_same_figures_whatever_the_batch(saved, dataset):
    def errors(**options):
        config = OpenLoopConfig(policy=str(saved), dataset=DatasetConfig(root=dataset), **options)
        judged = read_policy(config)
        source, _ = open_episodes(config, judged)
        _, place = choose_moments(config, judged, source)
        return infer_moments(
            config, judged, source, open_loop.open_policy(config), read_moments(config.dataset, judged, source, place)
        ).predicted

    np.testing.assert_allclose(errors(batch_size=1), errors(batch_size=7), atol=1e-4)
    assert np.abs(errors(seed=1) - errors(seed=0)).max() > 1e-3


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"stride": 0}, "--stride 1"),
        ({"batch_size": 0}, "--batch_size 1"),
        ({"policy": "ws://127.0.0.1:1", "likelihood": True}, "likelihood needs"),
        ({"policy": "ws://127.0.0.1:1", "num_flow_steps": 3}, "belongs to the server"),
    ],
)
def test_options_that_cannot_be_honoured_are_refused(options, line):
    with pytest.raises(ConfigError, match=re.escape(line)):
        OpenLoopConfig(**{"policy": "somewhere", **options})


def test_a_data_set_of_another_robot_is_refused_before_anything_is_written(saved, small_policy, dataset, tmp_path):
    wide = replace(small_policy.config, embodiment=replace(small_policy.config.embodiment, cameras={"base": "observation.images.head"}))
    bundle.save(tmp_path / "other", small_policy.weights, wide, small_policy.stats)
    config = OpenLoopConfig(policy=str(tmp_path / "other"), dataset=DatasetConfig(root=dataset), output_dir=str(tmp_path / "out"))
    with pytest.raises(ConfigError, match=r"observation\.images\.head"):
        open_loop.evaluate_open_loop(config)
    assert not (tmp_path / "out").exists()


def test_a_file_in_the_place_of_the_folder_is_refused(saved, dataset, tmp_path):
    (tmp_path / "file").write_text("")
    config = OpenLoopConfig(policy=str(saved), dataset=DatasetConfig(root=dataset), output_dir=str(tmp_path / "file"))
    with pytest.raises(OutputError, match="found a file"):
        open_loop.evaluate_open_loop(config)


def test_traces_go_from_the_worst_episode_to_the_best():
    recorded = np.repeat(np.arange(5.0), 2).reshape(5, 2, 1)
    given = moments(recorded, np.ones((5, 2), bool), np.zeros((5, 1)), [0, 1, 2, 3, 4])
    predicted = np.float32(recorded + np.array([3, 1, 5, 2, 4.0])[:, None, None])
    found = compare(given, predicted, np.full(5, np.nan), ("a",))
    assert report.traced_episodes(found, 3) == [2, 0, 1] and report.traced_episodes(found, 0) == []
    assert report.traced_episodes(found, 9) == [2, 4, 0, 3, 1]
