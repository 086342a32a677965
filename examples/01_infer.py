"""Ask a bundle for one action chunk: python examples/01_infer.py BUNDLE. Pictures, state and prompt are yours to replace."""

import sys

import numpy as np

import pi0fm

policy = pi0fm.load(sys.argv[1])
facts = policy.metadata  # cameras, widths, rate, horizon: all that a caller must know
observation = {column: np.zeros((*facts["image_size"], 3), np.uint8) for column in facts["cameras"].values()}
observation |= {facts["state_key"]: np.zeros(facts["state_dim"], np.float32), "prompt": "pick up the cup"}

chunk = policy.infer(observation, noise_seed=0)  # the same seed, the same chunk; without one it is drawn
for row, action in enumerate(chunk.actions[: facts["execution_horizon"]]):
    print(f"{row / facts['fps']:6.3f} s", np.round(action, 3))
