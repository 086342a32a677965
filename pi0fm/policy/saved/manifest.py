"""Which files a bundle has: their sizes and hashes in manifest.json, and the one hash over all of them.

Owns: writing and reading a manifest, the comparison of a folder with it, the bundle's identity. Does not know: the files' content.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from pi0fm import files
from pi0fm_client.errors import BundleError

FORMAT = 3
MANIFEST, CONFIG, STATS, WEIGHTS = "manifest.json", "config.json", "norm_stats.json", "model.safetensors"
HOW_ONE_IS_MADE = "train one with pi0fm train, whose last line names the directory, or convert weights with pi0fm convert"
CALIBRATION = "calibration.json"  # outside the identity, which it names: it changes no action


def write_manifest(path: Path) -> None:
    """List every file below `path`; the last one that is written."""
    found = [file for file in sorted(path.rglob("*")) if file.is_file() and file not in (path / MANIFEST, path / CALIBRATION)]
    listed = {str(file.relative_to(path)): {"bytes": file.stat().st_size, "sha256": sha256(file)} for file in found}
    files.write_json(path / MANIFEST, {"format": FORMAT, "files": listed})


def listed_files(path: Path) -> dict[str, dict[str, Any]]:
    """Read size and hash of each file. Raises BundleError where there is no bundle, or no manifest that says them of files inside it."""
    if str(path).startswith(("ws:", "wss:")):
        raise BundleError(f"a bundle is a folder, found the address {path}; pi0fm eval and pi0fm doctor take a server")
    if not path.is_dir():
        raise BundleError(f"no bundle at {path}; {instead_of(path)}")
    if not any((path / name).exists() for name in (MANIFEST, CONFIG, STATS, WEIGHTS)):
        inside = next(iter(sorted(path.glob(f"*/{MANIFEST}"))), None)
        named = "the folder that the last line of pi0fm train names" if inside is None else str(inside.parent)
        raise BundleError(f"{path} is a folder, but no bundle: it has neither {MANIFEST} nor {WEIGHTS}; give {named}")
    listed = read_json(path / MANIFEST).get("files")
    if not isinstance(listed, dict) or not all(
        isinstance(entry, dict) and {"bytes", "sha256"} <= entry.keys() for entry in listed.values()
    ):
        raise BundleError(f"{path / MANIFEST} must say bytes and sha256 of each file; copy the bundle again")
    for name in (CONFIG, STATS, WEIGHTS, *listed):
        if name not in listed or not (path / name).resolve().is_relative_to(path.resolve()):
            raise BundleError(f"{path / MANIFEST} must list {name} inside the bundle; copy the bundle again")
    return listed


def instead_of(path: Path, otherwise: str = HOW_ONE_IS_MADE) -> str:
    """Advise on a folder of weights that is not there: the nearest path, the download of weights of the hub, else `otherwise`."""
    if path.is_file():
        return f"it is a file: give its folder, {path.parent}"
    near = files.nearest_path(path)
    if near is not None:
        return f"did you mean {near}?"
    if files.is_hub_name(str(path)):
        place = path.name
        return (
            f"for weights of Hugging Face's hub type hf download {path} --local-dir {place}, then pi0fm convert {place} --output_dir "
            f"{place}-bundle --tokenizer DIR, and give {place}-bundle"
        )
    return otherwise


def check_files(path: Path) -> None:
    """Raise BundleError for a file that is missing, cut, changed or not listed. The weights' bytes are checked when they are read."""
    listed = listed_files(path)
    for name, entry in listed.items():
        file = path / name
        if not file.is_file():
            raise BundleError(f"the bundle {path} lacks {name}; copy it again, all files")
        size = file.stat().st_size
        if size != entry["bytes"]:
            raise BundleError(f"{file} has {size} bytes, the manifest says {entry['bytes']}; it is cut: copy the bundle again")
        if name != WEIGHTS and sha256(file) != entry["sha256"]:
            raise BundleError(f"{file} differs from the manifest's SHA-256; it was changed or damaged: copy the bundle again")
    # A tokenizer reads every file in its folder. Hidden files are those of file managers and downloads.
    found = (file.relative_to(path) for file in path.rglob("*") if file.is_file())
    extra = sorted(
        str(name)
        for name in found
        if str(name) not in (*listed, MANIFEST, CALIBRATION) and not any(part.startswith(".") for part in name.parts)
    )
    if extra:
        raise BundleError(f"the bundle {path} holds {', '.join(extra[:5])}, which its manifest does not list; move it elsewhere")


def identity(path: Path) -> str:
    """One hash over weights, configuration, statistics, robots, tokenizer and versions: 16 hexadecimal digits of the manifest's SHA-256."""
    lines = sorted(f"{name} {entry['sha256']}\n" for name, entry in listed_files(path).items())
    return hashlib.sha256("".join(lines).encode()).hexdigest()[:16]


def sha256(file: Path) -> str:
    """Hash a file's bytes, as hexadecimal digits. Raises BundleError for a file that cannot be read."""
    try:
        with file.open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as error:
        raise BundleError(f"{file} is not readable ({error.strerror}); copy the bundle again") from None


def read_json(path: Path) -> dict[str, Any]:
    """Read the mapping in a JSON file. Raises BundleError that names it."""
    try:
        tree = json.loads(path.read_text())
    except FileNotFoundError:
        raise BundleError(f"{path.parent} lacks {path.name}; copy it again, all files") from None
    except (OSError, ValueError, RecursionError) as error:
        raise BundleError(f"{path} is not readable JSON ({' '.join(str(error).split()):.120}); copy it again") from None
    if not isinstance(tree, dict):
        raise BundleError(f"{path} must hold a mapping, found {type(tree).__name__}; copy it again")
    return tree
