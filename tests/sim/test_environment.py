import pytest

from pi0fm.sim.environment import CameraSpec, parse_camera, parse_cameras
from pi0fm_client.errors import ConfigError


def test_camera_text_round_trip() -> None:
    camera = parse_camera("base=corner2:128x96")
    assert camera == CameraSpec("base", "corner2", height=96, width=128)
    assert parse_camera(str(camera)) == camera


def test_several_cameras_in_both_forms() -> None:
    text = "base=corner2:96x96,wrist=gripperPOV:64x48"
    assert (
        parse_cameras(text)
        == parse_cameras(text.split(","))
        == (CameraSpec("base", "corner2", 96, 96), CameraSpec("wrist", "gripperPOV", 48, 64))
    )


@pytest.mark.parametrize(
    "text",
    ["base", "base=corner2", "base=corner2:96", "base=corner2:0x96", "base=corner2:96x97", "base=corner2:96x4000", "=corner2:96x96", ""],
)
def test_bad_camera_text_is_one_line(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_cameras(text)
    assert "\n" not in str(caught.value)


def test_a_camera_name_comes_once() -> None:
    with pytest.raises(ConfigError, match="a different name"):
        parse_cameras("a=corner2:96x96,a=corner:96x96")
