"""Infer an action chunk with a bundle: python examples/01_infer.py BUNDLE. Replace pictures, state and prompt by your own."""

import sys

import numpy as np

import pi0fm

policy = pi0fm.load(sys.argv[1])
facts = policy.metadata  # cameras, widths, rate, horizon: everything that a caller needs
observation = {column: np.zeros((*facts["image_size"], 3), np.uint8) for column in facts["cameras"].values()}
observation |= {facts["state_key"]: np.zeros(facts["state_dim"], np.float32), "prompt": "pick up the cup"}

chunk = policy.infer(observation, noise_seed=0)  # the chunk is a function of observation and seed; without a seed the noise is random
for row, action in enumerate(chunk.actions[: facts["execution_horizon"]]):
    print(f"{row / facts['fps']:6.3f} s", np.round(action, 3))
