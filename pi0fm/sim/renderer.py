"""Off-screen rendering with MuJoCo, ten times faster than by its defaults.

Owns: the choice of EGL or OSMesa, the GL context of a process, the drawn objects. Does not know: tasks, robots, orientation of a camera.
On a CPU Mesa spends its time on vertices. Left out are, by gain: shadows, reflections and multisampling; objects outside the
camera's pyramid, which changes no pixel; triangles smaller than a pixel (coarse_mesh.py), on a grid for the largest camera of
the configuration: filming does not change the policy's pictures. Demonstrations and evaluation must render alike; both use the cameras in
the bundle. Only one thread of a process may render at a time: the GL context is made current for every picture.

    process ── one GL context ─┬─ Renderer(model A) ── off-screen buffer, grows to the largest picture requested
                               └─ Renderer(model B)
"""

import atexit
import ctypes
import ctypes.util
import functools
import importlib
import os
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pi0fm_client.errors import SimulationError

BACKENDS = ("egl", "osmesa")
FAST = "-fast"  # after a camera's source, where a simulator offers official pictures too
_HIDDEN_GROUP = 5  # the last of MuJoCo's six geom groups, which is not drawn
_INSTALL = "install one with `apt-get install libegl1 libgl1-mesa-dri` or `apt-get install libosmesa6`"


def choose_backend() -> str:
    """Choose the GL library: the user's MUJOCO_GL or PYOPENGL_PLATFORM, else EGL, else OSMesa. Raises SimulationError.

    Call it before mujoco is imported, which reads the variable MUJOCO_GL that this sets.
    """
    asked = os.environ.get("MUJOCO_GL", "").strip().lower() or os.environ.get("PYOPENGL_PLATFORM", "").strip().lower()
    if asked and asked not in (*BACKENDS, "glfw"):
        raise SimulationError(
            f"MUJOCO_GL (or PYOPENGL_PLATFORM) must be egl, osmesa or glfw to render, found {asked!r}; unset it to let pi0fm choose"
        )
    if not asked:
        if _egl_has_device():
            asked = "egl"
        elif ctypes.util.find_library("OSMesa"):
            asked = "osmesa"
        else:
            raise SimulationError(f"this machine has no off-screen renderer: neither EGL nor OSMesa was found; {_INSTALL}")
    os.environ["MUJOCO_GL"] = asked
    return asked


def load_mujoco() -> Any:
    """Choose the GL library and import mujoco, which loads it. Raises SimulationError when that fails."""
    backend = choose_backend()
    try:
        return importlib.import_module("mujoco")
    except (ImportError, RuntimeError, AttributeError, OSError) as error:
        raise _cannot_render(backend, error) from None


@functools.cache
def gl_context() -> Any:
    """Make the process's GL context on the first call; it is freed at exit. Raises SimulationError when the machine cannot render."""
    mujoco = load_mujoco()
    backend = choose_backend()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # GLFW warns of the error below
            context = importlib.import_module(f"mujoco.{backend}").GLContext(64, 64)
            context.make_current()
        # without a display GLFW returns an invalid context, which fails only in use
        mujoco.MjrContext(mujoco.MjModel.from_xml_string("<mujoco/>"), mujoco.mjtFontScale.mjFONTSCALE_50.value).free()
    except (ImportError, RuntimeError, AttributeError, OSError, TypeError, mujoco.FatalError) as error:
        raise _cannot_render(backend, error) from None
    atexit.register(context.free)
    return context


class Renderer:
    """Renderer of one MuJoCo model from its fixed cameras."""

    def __init__(self, model: Any, height: int, width: int, *, official: bool = False, hidden_groups: Sequence[int] = ()) -> None:
        """Make the scene and its buffers. model: mujoco.MjModel, whose quality settings and geom groups change; height, width: largest.

        official: with shadows, reflections and multisampling, as MuJoCo draws by itself. hidden_groups: of geoms that are not drawn.
        """
        gl_context().make_current()
        mujoco = load_mujoco()
        self._mujoco, self._model = mujoco, model
        self._official = official
        if not official:
            model.vis.quality.offsamples = 0
            model.vis.quality.shadowsize = 0
        model.vis.global_.offheight, model.vis.global_.offwidth = height, width
        self._size = (height, width)
        self._context = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_50.value)
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN.value, self._context)
        self._scene = mujoco.MjvScene(model, maxgeom=model.ngeom + model.nsite + 100)
        for flag in () if official else (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION):
            self._scene.flags[flag] = 0
        self._camera = mujoco.MjvCamera()
        self._camera.type = mujoco.mjtCamera.mjCAMERA_FIXED
        self._option, self._perturb = mujoco.MjvOption(), mujoco.MjvPerturb()
        for group in hidden_groups:
            self._option.geomgroup[group] = 0
        self._groups = model.geom_group.copy()

    def render(self, data: Any, camera: int, height: int, width: int) -> NDArray[np.uint8]:
        """Render uint8 [height, width, 3], row 0 at the top, as camera number `camera` sees `data` (mujoco.MjData after mj_forward)."""
        mujoco, model = self._mujoco, self._model
        gl_context().make_current()
        if height > self._size[0] or width > self._size[1]:
            self._size = (max(height, self._size[0]), max(width, self._size[1]))
            mujoco.mjr_resizeOffscreen(self._size[1], self._size[0], self._context)
        # another renderer of this process may have bound its buffer
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN.value, self._context)
        self._camera.fixedcamid = camera
        if not self._official:  # objects out of sight may throw a shadow into it
            unseen = outside_view(
                data.geom_xpos, model.geom_rbound, data.cam_xpos[camera], data.cam_xmat[camera], model.cam_fovy[camera], width / height
            )
            model.geom_group[:] = np.where(unseen, _HIDDEN_GROUP, self._groups)
        mujoco.mjv_updateScene(model, data, self._option, self._perturb, self._camera, mujoco.mjtCatBit.mjCAT_ALL.value, self._scene)
        model.geom_group[:] = self._groups
        pixels = np.empty((height, width, 3), np.uint8)
        rectangle = mujoco.MjrRect(0, 0, width, height)
        mujoco.mjr_render(rectangle, self._scene, self._context)
        mujoco.mjr_readPixels(pixels, None, rectangle, self._context)
        return pixels[::-1]  # GL's row 0 is at the bottom

    def close(self) -> None:
        """Free the model's textures and meshes on the GL side."""
        gl_context().make_current()
        self._context.free()


def outside_view(
    centres: NDArray[np.float64],
    radii: NDArray[np.float64],
    eye: NDArray[np.float64],
    rotation: NDArray[np.float64],
    fovy: float,
    aspect: float,
) -> NDArray[np.bool_]:
    """Find the bounding spheres that are wholly outside a camera's pyramid; leaving them out changes no pixel.

    centres [G, 3] and radii [G] in metres (radius 0 is unbounded: never outside); eye [3]; rotation [9], camera to world;
    fovy in degrees; aspect is width / height. The camera looks along its -z axis.
    """
    local = (centres - eye) @ rotation.reshape(3, 3)
    depth = -local[:, 2]
    outside: NDArray[np.bool_] = depth < -radii
    tangent = np.tan(np.deg2rad(fovy) / 2)
    for axis, slope in ((0, tangent * aspect), (1, tangent)):
        outside |= (np.abs(local[:, axis]) - slope * depth) / np.hypot(1.0, slope) > radii
    return outside & (radii > 0)


def _egl_has_device() -> bool:
    """Tell whether libEGL exists and names a device, such as Mesa's software renderer. A vendor's EGL without its GPU names none."""
    library = ctypes.util.find_library("EGL")
    if library is None:
        return False
    egl = ctypes.CDLL(library)
    egl.eglGetProcAddress.restype = ctypes.c_void_p
    address = egl.eglGetProcAddress(b"eglQueryDevicesEXT")
    if not address:
        return False
    query = ctypes.CFUNCTYPE(ctypes.c_uint, ctypes.c_int, ctypes.c_void_p, ctypes.POINTER(ctypes.c_int))(address)
    count = ctypes.c_int(0)
    return bool(query(0, None, ctypes.byref(count))) and count.value > 0


def _cannot_render(backend: str, error: Exception) -> SimulationError:
    # PyOpenGL reports a missing library as an attribute of None.
    reason = " ".join(str(error).split())[:160]
    return SimulationError(
        f"this machine cannot render with MUJOCO_GL={backend} ({reason}); {_INSTALL}, or set MUJOCO_GL to another of egl, osmesa"
    )
