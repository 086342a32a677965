"""Tests of a robot's observation keys, and of pictures in other forms, as inputs of the policy."""

import time
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_server import METADATA, FakePolicy
from PIL import Image
from test_policy_server import actions_of, observation_bytes, talk

from pi0fm.serve.door import RequestReader, decode_jpeg
from pi0fm.serve.keys import as_picture, read_keys
from pi0fm_client import Executor, ObservationCheck, PolicyClient, wire
from pi0fm_client.errors import ConfigError, ObservationError

DROID = """
observation/exterior_image_1_left: observation.images.front
observation/joint_position: observation.state
observation/gripper_position: observation.state
observation/wrist_depth:
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "keys.yaml"
    path.write_text(text)
    return path


def test_a_robot_with_keys_of_its_own_is_answered(start_server: Any, tmp_path: Path) -> None:
    server = start_server(keys=read_keys(written(tmp_path, DROID), METADATA))
    message = {
        "observation/exterior_image_1_left": np.full((3, 6, 8), 5 / 255, np.float32),
        "observation/joint_position": np.float64([10, 20]),
        "observation/gripper_position": np.float32(30),
        "observation/wrist_depth": np.zeros((4, 4), np.float32),
        "prompt": "pick",
    }
    with talk(server.url) as robot:
        robot.recv()
        robot.send(wire.pack(message))
        assert actions_of(robot.recv())[0].tolist() == [15, 25, 35]


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"observation/gripper_position": None}, "position, observation/gripper_position for the state, found no observation/gripper"),
        ({"observation/exterior_image_1_left": None}, "one picture of: observation/exterior_image_1_left, observation.images.wrist"),
        ({"observation/joint_positions": np.zeros(2)}, "unknown .* 'observation/joint_positions': did you mean 'observation/joint_posi"),
    ],
)
def test_faults_are_told_in_the_robots_words(change: dict[str, Any], line: str, tmp_path: Path) -> None:
    keys = read_keys(written(tmp_path, DROID), METADATA)
    message = {
        "observation/exterior_image_1_left": np.zeros((6, 8, 3), np.uint8),
        "observation/joint_position": np.float64([10, 20]),
        "observation/gripper_position": np.float32(30),
        "prompt": "pick",
    }
    assert list(keys({key.replace("/", "."): value for key, value in message.items()})) == list(keys(message)), "dots are slashes"
    with pytest.raises(ObservationError, match=line):
        keys({key: value for key, value in (message | change).items() if value is not None})


def test_the_executor_knows_the_robots_own_keys(start_server: Any, tmp_path: Path) -> None:
    """What it checks is what the policy is shown: cameras under either name, a state in parts, its range."""
    policy = FakePolicy()
    policy.metadata["state_range"] = {"min": [0.0, 0.0, 0.0], "max": [40.0, 40.0, 40.0]}
    server = start_server(policy, keys=read_keys(written(tmp_path, DROID), METADATA))
    message = {
        "observation/exterior_image_1_left": np.zeros((6, 8, 3), np.uint8),
        "observation/joint_position": np.float64([10, 20]),
        "observation/gripper_position": np.float32(30),
        "prompt": "pick",
    }
    options: dict[str, Any] = {"control_hz": 50, "initial_command": np.zeros(3), "cameras": ["front"]}
    with PolicyClient(server.url) as client, Executor(client, relative_to_state=[0, 1, 2], **options) as executor:
        executor.observe(message)
        end = time.monotonic() + 10
        while executor.next()[0] == 0 and time.monotonic() < end:
            executor.pace()
        assert executor.command.action[1] - executor.command.action[0] == 2 * (20 - 10), "once by the fake policy, once by the state"
        with pytest.raises(ObservationError, match=r"observation\.state\[1\] was 0 \.\. 40 in training, found 2000"):
            ObservationCheck(client.metadata, cameras=["front"])({**message, "observation/joint_position": [10.0, 2000.0]})
        with pytest.raises(ObservationError, match=r"found no observation\.images\.wrist"):
            ObservationCheck(client.metadata)(message)


def test_a_state_far_outside_the_training_is_refused_or_told_as_the_operator_chose(
    start_server: Any, caplog: pytest.LogCaptureFixture
) -> None:
    def ask(state_check: str) -> Any:
        policy = FakePolicy()
        policy.metadata["state_range"] = {"min": [-1.0] * 3, "max": [1.0] * 3}
        with talk(start_server(policy, state_check=state_check).url) as robot:
            robot.recv()
            for value in (1e7, 2e7):
                robot.send(observation_bytes(state=value))
                answer = robot.recv()
                if isinstance(answer, str):
                    return answer
        return None

    told = "observation.state[0] was -1 .. 1 in training, found 1e+07 (3 of 3 outside): check its units and order"
    assert told in ask("refuse")
    caplog.clear()
    assert ask("off") is None and not caplog.messages
    assert ask("warn") is None and caplog.messages == [told], "once, not at each request"


def test_pictures_in_each_form_are_one_picture() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (4, 6, 3), np.uint8)
    for form in (picture, picture.transpose(2, 0, 1), picture[None], picture.astype(np.float32) / 255, picture.transpose(2, 0, 1) / 255.0):
        assert np.array_equal(as_picture(form, "front"), picture)
    for wrong in (picture[..., :2], picture.astype(np.float32), picture.astype(np.int32), np.full((4, 6, 3), np.nan), np.zeros(0)):
        with pytest.raises(ObservationError, match="front must be"):
            as_picture(wrong, "front")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("image: observation.images.frnt", "did you mean 'observation.images.front'"),
        ("a: observation.images.front\nb: observation.images.front", "maps a and b to one picture"),
        ("a: [observation.state]", "must map a key to a column"),
        ("a: observation.state\nb: prompt\na: observation.images.front", "lines 1 and 3 both set 'a'"),
        ("a: prompt\nb: prompt", "maps a and b to one text prompt"),
        ("prompt: observation.state", "maps 'prompt', a text, to 'observation.state', the state"),
        ("task: observation.images.front", "maps 'task', a text, to 'observation.images.front', a picture"),
        ("observation/state: prompt", "maps 'observation/state', the state, to 'prompt', a text"),
        ("observation.images.wrist: observation.state", "a picture, to 'observation.state', the state"),
        ("prompt:", "leaves 'prompt' out, and maps no other key to it"),
        ("observation.state:", "leaves 'observation.state' out"),
        ("observation.images.front:\nobservation.images.wrist:", "leaves every camera out"),
        ("observation/state: observation.state\nobservation.state: observation.state", "names one key twice"),
    ],
)
def test_a_file_that_names_no_column_is_refused(tmp_path: Path, text: str, line: str) -> None:
    with pytest.raises(ConfigError, match=line):
        read_keys(written(tmp_path, text), METADATA)


def test_a_text_may_have_another_name_and_cameras_may_be_exchanged(tmp_path: Path) -> None:
    front, wrist = "observation.images.front", "observation.images.wrist"
    swap = f"{front}: {wrist}\n{wrist}: {front}\nlanguage: prompt\nprompt:\n"
    pictures = {f"observation.images.{name}": np.full((2, 2, 3), value, np.uint8) for name, value in (("front", 1), ("wrist", 2))}
    found = read_keys(written(tmp_path, swap), METADATA)({**pictures, "language": "pick", "prompt": "ignored"})
    assert found["prompt"] == "pick" and found["observation.images.front"].max() == 2 and found["observation.images.wrist"].max() == 1


def test_a_key_and_its_column_in_one_message_are_refused(tmp_path: Path) -> None:
    renamed = read_keys(written(tmp_path, "a: observation.images.front"), METADATA)
    with pytest.raises(ObservationError, match="once, found it and 'a'"):
        renamed({"a": np.zeros((2, 2, 3), np.uint8), "observation.images.front": np.zeros((2, 2, 3), np.uint8)})


def jpeg(width: int, height: int) -> bytes:
    file = BytesIO()
    Image.new("RGB", (width, height), (200, 100, 50)).save(file, "JPEG", quality=95)
    return file.getvalue()


def test_a_jpeg_is_a_picture(fake_policy: Any) -> None:
    door = RequestReader(fake_policy().observation, 1 << 20)
    message = {"observation.images.front": {wire.JPEG: jpeg(8, 6)}, "observation.state": np.zeros(3, np.float32), "prompt": ""}
    picture = door.read(wire.pack(message)).observation.images["front"]
    assert picture.shape == (6, 8, 3) and np.abs(picture.astype(int) - [200, 100, 50]).max() <= 3


def test_a_jpeg_is_bounded_before_it_is_decoded() -> None:
    huge = bytearray(jpeg(8, 8))
    start = huge.index(b"\xff\xc0")
    huge[start + 5 : start + 9] = b"\x10\x00\x10\x00"
    with pytest.raises(ObservationError, match="4096 x 4096: send a smaller picture"):
        decode_jpeg(bytes(huge), "front", 1 << 20)
    for broken in (jpeg(64, 64)[:200], b"", b"GIF89a" + bytes(100)):
        with pytest.raises(ObservationError, match="whole JPEG"):
            decode_jpeg(broken, "front", 1 << 20)
