"""A program: a small training on synthetic batches, with asynchronous checkpoints; goes on from the newest.

    python device_training.py cuda FOLDER STEPS_MORE_THAN_NEEDED

Prints on its last line the step that it began from, the step it ended at, the loss, and the norm of all weights.
"""

import sys
from pathlib import Path

import torch
from device_cases import FLOW, Synthetic, configuration
from small_pi0 import network

from pi0fm.train import state
from pi0fm.train.checkpoint.checkpoints import Checkpoints
from pi0fm.train.ema import Ema
from pi0fm.train.optim import OptimizerConfig, make_optimizer
from pi0fm.train.parallel.accelerate import Context, make_accelerator
from pi0fm.train.step import train_step

BATCH, EVERY, STEPS = 4, 4, 24


def main(kind: str, place: Path, more: int) -> None:
    """Train to the next multiple of STEPS behind what is there, or `more` steps beyond it."""
    device, config = torch.device(kind), configuration("pi0", "small")
    model = network(config).to(device).train()
    accelerator = make_accelerator("float32", 1, allow_cuda=device.type == "cuda")
    optimizer, ema = make_optimizer(OptimizerConfig(learning_rate=1e-3), model), Ema(model, 0.9)
    checkpoints, collator = Checkpoints(place, Context(), keep=2), Synthetic(config)
    index = checkpoints.restore(state.tensors(model, optimizer, ema), lambda _: None)
    first = 0 if index is None else int(index.facts["step"])
    last, loss = STEPS * (1 + first // STEPS) + more, torch.zeros(())
    for step in range(first, last):
        batch = collator(step * BATCH, BATCH)
        loss, _ = train_step(model, FLOW, optimizer, accelerator, iter([batch]), int(batch.action_mask.sum()), 1.0)
        ema.update(step)
        if (step + 1) % EVERY == 0:
            checkpoints.save(step + 1, state.tensors(model, optimizer, ema), {"step": step + 1})
    checkpoints.close()
    norm = torch.stack([value.norm() for value in ema.weights().values()]).norm()
    sys.stdout.write(f"{first} {last} {float(loss)} {float(norm)}\n")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
