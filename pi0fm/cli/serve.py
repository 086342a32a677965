"""`pi0fm serve`: serve a bundle on a port.

Owns: the options, and the line that says ready. Does not know: the protocol, the content of a bundle.
"""

import asyncio
import gc
import json
import logging
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from pi0fm.options import option, required
from pi0fm.policy.load_options import LoadOptions
from pi0fm.progress import say
from pi0fm.serve import app as application
from pi0fm.serve import server
from pi0fm_client.errors import ConfigError

HELP = "answer robots over the openpi WebSocket protocol"
ALIASES = {"policy.path": "bundle"}
TOKEN_VARIABLE = "PI0FM_TOKEN"  # noqa: S105 - the name, not the key


@dataclass(frozen=True)
class ServeConfig(LoadOptions):
    """Options of `pi0fm serve`: how the bundle is loaded, and where and for whom it is served."""

    bundle: Path = required("folder of the policy, as pi0fm train wrote it")
    host: str = option("127.0.0.1", "address to listen on; 0.0.0.0 opens it to every network, so give a token with it")
    port: int = option(8000, "port to listen on; 0 takes a free one, which the ready line names")
    token: str | None = option(
        None, f"key that clients must send; others can read it in the list of processes, so prefer ${TOKEN_VARIABLE}"
    )
    max_batch_size: int = option(8, "most observations in one inference")
    max_queue: int = option(64, "most requests that wait; a further one is refused")
    max_connections: int = option(64, "most robots that are connected at a time; a further one is refused")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"--port must lie in 0..65535, found {self.port}: 8000 is the default, 0 takes a free one")
        for name in ("max_batch_size", "max_queue", "max_connections"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name} must be >= 1, found {getattr(self, name)}")


Options = ServeConfig


def run(options: ServeConfig) -> None:
    """Serve until SIGINT or SIGTERM. The only line on standard output is the JSON that says ready; a parent process may wait for it."""
    token = options.token if options.token is not None else os.environ.get(TOKEN_VARIABLE)
    application.check_token(token)
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    with server.until_stopped(), server.bind(options.host, options.port) as bound:
        url = server.url_of(bound)
        if token is None and options.host not in ("127.0.0.1", "localhost", "::1"):
            say(f"anyone who reaches {options.host} can use this policy: set {TOKEN_VARIABLE} to ask for a key")
        say(f"loading {options.bundle}")
        # Imported here: torch takes seconds, and a port in use should be told at once.
        from pi0fm.policy.bundle import load

        policy = load(options.bundle, options)
        app = application.create_app(
            policy,
            to_observation=policy.observation,
            metadata=policy.metadata,
            token=token,
            max_batch_size=options.max_batch_size,
            max_queue=options.max_queue,
            max_connections=options.max_connections,
        )

        def announce(seconds: float) -> None:
            # a collection of garbage would look at a million objects of the libraries, a third of a second in which no robot is answered
            gc.collect()
            gc.freeze()
            known = {name: policy.metadata[name] for name in ("identity", "robot") if name in policy.metadata}
            ready = {"ready": True, "url": url, "bundle": str(options.bundle), **known, "warm_up_seconds": round(seconds, 3)}
            print(json.dumps(ready), flush=True)
            named = "".join(f", {name} {value}" for name, value in known.items())
            say(f"serving {options.bundle}{named} on {url}; ^C stops it")

        asyncio.run(server.serve(server.make_server(app), app, bound, announce))
    say("stopped serving")
