"""Control an arm at 50 Hz with a policy server: python examples/robot_at_50hz.py ws://HOST:8000 [SECONDS]. Replace `Arm` by your driver."""

import sys

import numpy as np

from pi0fm_client import Executor, Pi0fmError, PolicyClient

UNITS = "rad"  # of the positions and commands, as in the training data; SO-101 often has "deg"
LIMITS = {"rad": {"velocity": 0.05, "acceleration": 0.02}, "deg": {"velocity": 3.0, "acceleration": 1.2}}  # of one control step


class Arm:
    """Placeholder for a robot's driver: pictures uint8 [height, width, 3], positions and commands in the units of the training data."""

    def __init__(self, facts):
        self.facts, self.position = facts, np.zeros(facts["robot_action_dim"])

    def observe(self):
        pictures = {key: np.zeros((*self.facts["image_size"], 3), np.uint8) for key in self.facts["cameras"].values()}
        return {**pictures, self.facts["state_key"]: np.zeros(self.facts["state_dim"], np.float32), "prompt": "pick up the cup"}

    def apply(self, command):
        self.position = command


def drive(url, seconds):
    with PolicyClient(url, timeout_seconds=1.0) as policy:
        arm = Arm(policy.metadata)
        limits = LIMITS[UNITS] | {"units": UNITS}  # or the path of the robot's limits file
        with Executor(policy, control_hz=50, initial_command=arm.position, limits=limits, state_check="warn") as executor:
            for _ in range(round(50 * seconds)):
                executor.observe(arm.observe)
                arm.apply(executor.next())
                executor.pace()
            print(executor.report)


try:
    drive(sys.argv[1], float(sys.argv[2] if len(sys.argv) > 2 else 10))
except (Pi0fmError, KeyboardInterrupt) as error:
    sys.exit(str(error) or "interrupted")
