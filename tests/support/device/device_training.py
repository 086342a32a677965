"""Program: train a little on synthetic batches with asynchronous checkpoints, continuing from the newest.

    python device_training.py cuda FOLDER STEPS_MORE_THAN_NEEDED

Prints on its last line the step that it began from, the step it ended at, the loss, and the norm of all weights.
"""

import sys
from pathlib import Path

import torch
from device_cases import FLOW, Synthetic, configuration
from small_pi0 import network

from pi0fm.train.checkpoint.checkpoints import Checkpoints
from pi0fm.train.components import OptimizerConfig
from pi0fm.train.parallel.accelerate import Parallel
from pi0fm.train.parallel.context import Context
from pi0fm.train.state import StateConfig, TrainState
from pi0fm.train.step import train_step

BATCH, EVERY, STEPS = 4, 4, 24


def main(kind: str, place: Path, more: int) -> None:
    """Train to the next multiple of STEPS behind what is there, or `more` steps beyond it."""
    device, config = torch.device(kind), configuration("pi0", "small")
    parallel = Parallel(Context(), "float32", 1, allow_cuda=device.type == "cuda")
    state = TrainState(network(config).to(device), StateConfig(optimizer=OptimizerConfig(learning_rate=1e-3), ema_decay=0.9))
    checkpoints, collator = Checkpoints(place, parallel, keep=2), Synthetic(config)
    index = checkpoints.restore(state.tensors(), lambda _: None)
    first = state.step = 0 if index is None else int(index.facts["step"])
    state.prepare(parallel)
    last, loss = STEPS * (1 + first // STEPS) + more, torch.zeros(())
    for step in range(first, last):
        batch = collator(step * BATCH, BATCH)
        valid = int(batch.action_mask.sum())
        loss, _ = train_step(state.trained, FLOW, state.optimizer, parallel.accelerator, iter([batch]), valid, 1.0)
        state.advance()
        if state.step % EVERY == 0:
            checkpoints.save(state.step, state.tensors(), {"step": state.step})
    checkpoints.close()
    norm = torch.stack([value.norm() for value in state.average.weights().values()]).norm()
    sys.stdout.write(f"{first} {last} {float(loss)} {float(norm)}\n")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
