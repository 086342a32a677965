"""A data set for measurements of loading, when none is given: pictures that compress as a simulator's do, no simulator.

Owns: drawing the episodes and writing them in LeRobot's format v3.0. Does not know: what is measured.
A gripper of two dark bars follows a slow curve over a lit table with a few blocks on it. Nothing is noisy: noise would cost the decoder
time, and so make everything that avoids decoding look better. Shape letters: T frames of one episode.
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pi0fm import progress
from pi0fm.demos.demonstration import Demonstration
from pi0fm.demos.encoding import EncodedDemonstration, encode
from pi0fm.demos.lerobot_writer import Contents, Layout, write_segment

FPS = 50
EPISODE_FRAMES = 100
SEGMENT_EPISODES = 10
DISTINCT_EPISODES = 40  # encoded once and written again and again: a decoder works as much on a picture that it has seen
WIDTH = 4
PROMPT = "push the block to the edge"


def write_dataset(root: Path, frames: int, size: int) -> None:
    """At least `frames` frames of one camera, size x size (even), in whole episodes of EPISODE_FRAMES; `root` must not exist."""
    names = tuple(f"x{number}" for number in range(WIDTH))
    layout = Layout(FPS, "drawn", names, names, {"base": (size, size)})
    episodes = -(-frames // EPISODE_FRAMES)
    written = Contents()
    pending: list[EncodedDemonstration] = []
    encoded: list[EncodedDemonstration] = []
    with progress.step("write a data set", episodes) as bar:
        for seed in range(episodes):
            if seed < DISTINCT_EPISODES:
                encoded.append(encode(draw_episode(seed, size), FPS))
            pending.append(encoded[seed % DISTINCT_EPISODES])
            bar.advance()
            if len(pending) == SEGMENT_EPISODES or seed + 1 == episodes:
                written = write_segment(root, layout, written, pending)
                pending = []


def draw_episode(seed: int, size: int) -> Demonstration:
    """One episode, a function of its seed."""
    random = np.random.default_rng(seed)
    time = np.arange(EPISODE_FRAMES) / FPS
    path = 0.5 + 0.3 * np.sin(2 * np.pi * random.uniform(0.1, 0.6, (1, 2)) * time[:, None] + random.uniform(0, 6, (1, 2)))
    table = _table(random, size)
    pictures = np.stack([_with_gripper(table, point) for point in path])
    state = np.concatenate([path, np.gradient(path, axis=0)], axis=1).astype(np.float32)
    action = np.roll(state, -1, axis=0)
    return Demonstration("push", PROMPT, seed, {"base": pictures}, state, action)


def _table(random: np.random.Generator, size: int) -> NDArray[np.uint8]:
    rows, columns = np.mgrid[0:size, 0:size] / size
    light = 0.55 + 0.35 * np.exp(-((rows - 0.4) ** 2 + (columns - 0.6) ** 2) * 3)
    grain = 0.03 * np.sin(columns * 60 + 4 * np.sin(rows * 9))
    picture = (light + grain)[..., None] * np.array([210.0, 190.0, 160.0])
    for _ in range(5):
        top, left = random.uniform(0.1, 0.8, 2)
        inside = (rows > top) & (rows < top + 0.12) & (columns > left) & (columns < left + 0.12)
        picture[inside] = random.uniform(30, 230, 3) * light[inside, None]
    return picture.clip(0, 255).astype(np.uint8)


def _with_gripper(table: NDArray[np.uint8], point: NDArray[np.float64]) -> NDArray[np.uint8]:
    picture = table.copy()
    size = len(table)
    row, column = (point * size).astype(int)
    bar, gap = max(size // 24, 1), max(size // 12, 2)
    for left in (column - gap, column + gap - bar):
        picture[max(row - 3 * bar, 0) : row + 3 * bar, max(left, 0) : max(left + bar, 0)] = 40
    picture[max(row - 5 * bar, 0) : max(row - 3 * bar, 0), max(column - gap, 0) : column + gap] = 70
    return picture
