"""Versions of Python and of training's libraries on this computer, and a digest of pi0fm's code.

Owns: `node_facts` and its helpers, with the standard library only: it is sent to nodes by value, where pi0fm may differ or be missing.
Does not know: Ray, how the facts are compared.
"""

import hashlib
import platform
import socket
import sys
from importlib import metadata, util
from pathlib import Path

CODE = "code of pi0fm"
PACKAGES = ("torch", "ray", "transformers", "accelerate")


def node_facts() -> dict[str, str]:
    """Versions by name, and `host` and `interpreter` of this computer."""
    found = {"host": socket.gethostname(), "interpreter": sys.executable, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "missing"
    return found | {CODE: code_of("pi0fm", "pi0fm_client")}


def code_of(*packages: str) -> str:
    """Digest of 12 hexadecimal digits of all modules; `missing` if a package cannot be found."""
    digest = hashlib.sha256()
    for package in packages:
        try:
            spec = util.find_spec(package)
        except ValueError:  # for a name that was made unimportable
            spec = None
        if spec is None or spec.origin is None:
            return "missing"
        root = Path(spec.origin).parent
        for path in sorted(root.rglob("*.py")):
            digest.update(f"{package}/{path.relative_to(root).as_posix()}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:12]
