"""Tests of the picture of an evaluation whose videos differ in size."""

import json

import numpy as np
from PIL import Image

from pi0fm.eval.report import filmstrip, video


def test_films_of_different_sizes_stand_in_one_picture(tmp_path):
    rows = []
    for number, (task, side) in enumerate((("a", 256), ("b", 96), ("c", 0))):
        film = f"{task}.mp4" if side else None
        rows.append({"task": task, "seed": number, "outcome": "failure", "video": film})
        if film:
            frames = [np.full((side, side, 3), 20 * k, np.uint8) for k in range(9)]
            (tmp_path / film).write_bytes(video.encode(frames, 10))
    (tmp_path / "episodes.json").write_text(json.dumps(rows))
    target = filmstrip.write_filmstrip(tmp_path, tmp_path / "strip.png")
    with Image.open(target) as picture:
        pixels = np.asarray(picture.convert("L")).astype(int)
    line = filmstrip.SIDE + filmstrip.CAPTION + filmstrip.MARGIN
    assert pixels.shape == (2 * line + filmstrip.MARGIN, filmstrip.FRAMES * (filmstrip.SIDE + filmstrip.MARGIN) + filmstrip.MARGIN)
    for row in range(2):
        middle = filmstrip.MARGIN + filmstrip.CAPTION + row * line + filmstrip.SIDE // 2
        centres = [pixels[middle, filmstrip.MARGIN + k * (filmstrip.SIDE + filmstrip.MARGIN) + 128] for k in range(filmstrip.FRAMES)]
        np.testing.assert_allclose(centres, [20 * round(k) for k in np.linspace(0, 8, filmstrip.FRAMES)], atol=6)
