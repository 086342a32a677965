from pathlib import Path

import pytest
from demos_help import config, submit

from pi0fm.cluster.runtime import ray_session
from pi0fm.demos.encoding import EncodedDemonstration
from pi0fm.demos.record import record
from pi0fm_client.errors import ConfigError


def test_no_more_than_the_window_is_in_flight_and_seeds_are_taken_in_order(tmp_path: Path) -> None:
    flying: list[int] = []
    most = 0
    taken: list[int] = []

    def watched(task: str, seed: int) -> object:
        nonlocal most
        flying.append(seed)
        most = max(most, len(flying))

        def wait() -> EncodedDemonstration | None:
            flying.remove(seed)
            taken.append(seed)
            return submit(task, seed)()

        return wait

    record(config(tmp_path / "set", tasks="reach-v3", episodes=7), watched, window=4)
    assert most == 4 and not flying
    assert taken == [5, 6, 7, 8, 9, 10, 11, 12]  # 6 fails, and nothing is simulated that is not needed


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "nowhere"])
def test_a_cluster_that_is_not_there(address: str) -> None:
    with pytest.raises(ConfigError, match="no Ray cluster answers"), ray_session(address):
        pass
