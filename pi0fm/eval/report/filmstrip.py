"""Picture of an evaluation, with a row of frames for each task.

Owns: the picture. Does not know: how episodes ran; it reads their videos.
"""

import io
import json
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from pi0fm import files

FRAMES, MARGIN, CAPTION, SIDE = 6, 8, 26, 256


def write_filmstrip(output_dir: Path, target: Path) -> Path:
    """Write a PNG with the first filmed episode of each task of the evaluation in `output_dir`, if there is one; return `target`."""
    rows = json.loads((output_dir / "episodes.json").read_text())
    filmed: dict[str, dict[str, str]] = {}
    for row in rows:
        if row["video"]:
            filmed.setdefault(row["task"], row)
    strips = [(f"{task}, seed {row['seed']}: {row['outcome']}", _frames(output_dir / row["video"])) for task, row in filmed.items()]
    if not strips:
        return target
    height = max(frames[0].height for _, frames in strips)
    canvas = Image.new("RGB", (FRAMES * (SIDE + MARGIN) + MARGIN, len(strips) * (height + CAPTION + MARGIN) + MARGIN), "white")
    draw = ImageDraw.Draw(canvas)
    for row, (caption, frames) in enumerate(strips):
        top = MARGIN + row * (height + CAPTION + MARGIN)
        draw.text((MARGIN, top), caption, fill="black", font=ImageFont.load_default(16))
        for column, frame in enumerate(frames):
            canvas.paste(frame, (MARGIN + column * (SIDE + MARGIN), top + CAPTION))
    held = io.BytesIO()
    canvas.save(held, "PNG", optimize=True)
    files.write_bytes(target, held.getvalue())
    return target


def _frames(video: Path) -> list[Image.Image]:
    """Return FRAMES frames, SIDE pixels wide, evenly spaced from the first to the last."""
    with av.open(str(video)) as container:
        frames = [Image.fromarray(frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]
    return [ImageOps.contain(frames[round(index)], (SIDE, SIDE)) for index in np.linspace(0, len(frames) - 1, FRAMES)]
