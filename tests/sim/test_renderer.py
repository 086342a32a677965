import os
import subprocess
import sys

import numpy as np
import pytest

from pi0fm.sim.renderer import choose_backend, outside_view
from pi0fm_client.errors import SimulationError


def test_spheres_outside_a_square_camera() -> None:
    # A camera at the origin that looks along -z with 90 degrees: |x| and |y| up to depth are seen.
    centres = np.array([[0, 0, -1.0], [0, 0, 2.0], [3.0, 0, -1.0], [1.2, 0, -1.0], [0, -3.0, -1.0], [9.0, 9.0, 9.0]])
    radii = np.array([0.1, 0.1, 0.1, 0.3, 0.1, 0.0])
    unseen = outside_view(centres, radii, np.zeros(3), np.eye(3).ravel(), fovy=90.0, aspect=1.0)
    assert unseen.tolist() == [False, True, True, False, True, False]  # the last has no bound


def test_a_wide_picture_sees_more_to_the_side() -> None:
    centre, radius = np.array([[1.5, 0, -1.0]]), np.array([0.01])
    assert outside_view(centre, radius, np.zeros(3), np.eye(3).ravel(), 90.0, aspect=1.0).all()
    assert not outside_view(centre, radius, np.zeros(3), np.eye(3).ravel(), 90.0, aspect=2.0).any()


def test_the_users_choice_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MUJOCO_GL", "osmesa")
    assert choose_backend() == "osmesa"


def test_no_renderer_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MUJOCO_GL", "disabled")
    with pytest.raises(SimulationError, match="egl, osmesa or glfw"):
        choose_backend()


CANNOT_RENDER = """
from pi0fm_client.errors import SimulationError
from pi0fm.sim.renderer import gl_context
try:
    gl_context()
except SimulationError as error:
    print(error)
"""


@pytest.mark.parametrize("environment", [{"MUJOCO_GL": "egl", "PYOPENGL_PLATFORM": "osmesa"}, {"MUJOCO_GL": "glfw", "DISPLAY": ""}])
def test_a_machine_that_cannot_render_says_what_to_install(environment: dict[str, str]) -> None:
    script = CANNOT_RENDER
    done = subprocess.run([sys.executable, "-c", script], env=os.environ | environment, capture_output=True, text=True, check=True)
    assert len(done.stdout.splitlines()) == 1
    assert "libosmesa6" in done.stdout
