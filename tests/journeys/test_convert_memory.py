"""Tests of the memory of a conversion in every direction: little more than the largest tensor."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import small_tokenizer

from pi0fm.convert.shapes import parts, unread_shapes
from pi0fm.processes import in_fresh_process, peak_resident

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="a process's peak is set back through /proc"),
    pytest.mark.skipif(importlib.util.find_spec("tensorstore") is None, reason="tensorstore, extra jax, is not installed"),
]
# The embedding is the largest single tensor, 128 MiB; gating_einsum, all layers in one chunk as a single device saves it, is 192 MiB.
SIZES = {
    "B": 512, "F": 2048, "E": 128, "G": 256, "L": 24, "N": 4, "K": 1, "H": 64, "W": 65_536, "A": 8, "S": 8,
    "D": 128, "M": 256, "T": 2, "X": 2, "Y": 64, "P": 14, "V": 256,
}  # fmt: skip
LARGEST = 4 * SIZES["W"] * SIZES["B"]
HEADS = {"num_heads": 4, "vision_heads": 2}


def write_jax(root: Path) -> None:
    """A pi0 as orbax writes it, with numbers that cannot be packed."""
    import tensorstore

    random = np.random.default_rng(0)
    shapes = {part.name: part.shape for group in parts("jax", "pi0", SIZES).values() for part in group} | unread_shapes("jax", "pi0", SIZES)
    store = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{root}/params/"}}
    for name, shape in shapes.items():
        metadata = {"shape": shape, "chunks": shape, "dtype": "<f4", "compressor": {"id": "zstd", "level": 1}}
        place = {**store, "path": f"params.{name.replace('/', '.')}/"}
        array = tensorstore.open({"driver": "zarr", "kvstore": place, "metadata": metadata}, create=True).result()
        array.write(random.standard_normal(shape, dtype=np.float32)).result()


def convert_all(root: Path) -> dict[str, float]:
    """Memory above what the process held before: of each conversion over the largest tensor, of loading over the weights' file."""
    from pi0fm.convert.config import ConvertConfig
    from pi0fm.convert.conversion import convert
    from pi0fm.data.columns.embodiment import Embodiment
    from pi0fm.policy.saved import bundle

    said = {
        "embodiment": Embodiment(cameras={"base": "observation.images.base"}),
        "tokenizer": str(root / "tokenizer"),
        "norm_stats": root / "stats.json",
    }
    fixture = Path(__file__).resolve().parents[1] / "convert" / "orbax" / "pi0"
    convert(ConvertConfig(source=fixture, output_dir=root / "imports", **said))  # all libraries are in memory from here on
    runs = {
        "JAX to bundle": {"source": root / "jax", "output_dir": root / "bundle", **said},
        "bundle to openpi": {"source": root / "bundle", "output_dir": root / "openpi", "to": "openpi", "any_size": True},
        "openpi to bundle": {"source": root / "openpi", "output_dir": root / "from_openpi", **said, **HEADS},
        "bundle to LeRobot": {"source": root / "bundle", "output_dir": root / "lerobot", "to": "lerobot", "any_size": True},
        "LeRobot to bundle": {"source": root / "lerobot", "output_dir": root / "from_lerobot", **HEADS},
    }
    found = {}
    for name, options in runs.items():
        Path("/proc/self/clear_refs").write_text("5")  # the peak is what is held now
        before = peak_resident()
        convert(ConvertConfig(**options, **({"prompt_dialect": "lerobot"} if options.get("to") == "lerobot" else {})))
        found[name] = (peak_resident() - before) / LARGEST
    bundle.load(fixture.parents[2] / "policy/saved/format_2/bundle", device="cpu")
    bytearray(31 * 2**20)  # let go at once: from here on the C library serves pieces up to this size from its heap, where holes stay
    Path("/proc/self/clear_refs").write_text("5")
    before = peak_resident()
    bundle.load(root / "bundle", device="cpu", precision="float32")
    found["loading, of the file"] = (peak_resident() - before) / (root / "bundle/model.safetensors").stat().st_size
    return found


def test_the_largest_tensor_and_little_beside_it(tmp_path):
    small_tokenizer.write(tmp_path / "tokenizer")
    statistics = {name: [1.0] * 5 for name in ("mean", "std", "q01", "q99", "min", "max")}
    (tmp_path / "stats.json").write_text(json.dumps({"state": statistics, "action": statistics}))
    write_jax(tmp_path / "jax")
    found = in_fresh_process(convert_all, tmp_path)
    print({name: f"{peak:.2f}" for name, peak in found.items()})
    loading = found.pop("loading, of the file")
    assert {name: peak for name, peak in found.items() if not 0.2 < peak <= 1.3} == {}
    assert loading <= 1.3
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("bundle", "from_openpi", "from_lerobot")]
    assert weights[0] == weights[1] == weights[2]
