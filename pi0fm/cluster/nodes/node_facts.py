"""What is installed on the computer that runs this: versions of Python and of what training needs, and pi0fm's own code.

Owns: one function and what it needs, of the standard library alone: it is sent to nodes by value, where pi0fm may be another or missing.
Does not know: Ray, what the facts are compared with.
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
    """Versions by name; `host` and `interpreter` say where."""
    found = {"host": socket.gethostname(), "interpreter": sys.executable, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "missing"
    return found | {CODE: code_of("pi0fm", "pi0fm_client")}


def code_of(*packages: str) -> str:
    """Twelve digits that any change of a module changes; `missing` where a package cannot be found."""
    digest = hashlib.sha256()
    for package in packages:
        try:
            spec = util.find_spec(package)
        except ValueError:  # of a name that was made unimportable
            spec = None
        if spec is None or spec.origin is None:
            return "missing"
        root = Path(spec.origin).parent
        for path in sorted(root.rglob("*.py")):
            digest.update(f"{package}/{path.relative_to(root).as_posix()}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:12]
