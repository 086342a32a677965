"""Exit code 0 when MuJoCo can draw a picture on this machine with the MUJOCO_GL that is set, and one line that says why when not."""

import sys

SCENE = "<mujoco><worldbody><light pos='0 0 3'/><geom size='1'/></worldbody></mujoco>"


def main() -> int:
    """Draw a lit sphere; a renderer that starts and draws nothing counts as none."""
    try:
        import mujoco

        model = mujoco.MjModel.from_xml_string(SCENE)
        data = mujoco.MjData(model)
        mujoco.mj_forward(model, data)
        with mujoco.Renderer(model, 32, 32) as renderer:
            renderer.update_scene(data)
            drawn = int(renderer.render().max())
    except Exception as error:  # noqa: BLE001 -- every library on the way to the screen raises its own class
        print(f"no renderer: {type(error).__name__}: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    if drawn == 0:
        print("no renderer: the picture of a lit sphere is black", file=sys.stderr)
    return 0 if drawn else 1


if __name__ == "__main__":
    sys.exit(main())
