"""`pi0fm serve`: serve a bundle on a port.

Owns: the options, and the ready line. Does not know: the protocol, the contents of a bundle.
"""

import asyncio
import codecs
import gc
import json
import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from starlette.applications import Starlette

from pi0fm.cli import lerobot
from pi0fm.options import option, required
from pi0fm.policy.load_options import GUIDANCE, GUIDED, TOKEN_VARIABLE, LoadOptions
from pi0fm.progress import say
from pi0fm.serve import app as application
from pi0fm.serve import limits, server
from pi0fm.serve.keys import Keys, read_keys
from pi0fm.serve.records.request_log import RequestLog
from pi0fm_client.errors import ConfigError

HELP = "answer robots over the openpi WebSocket protocol"
ALIASES = lerobot.SERVE
POSITIONAL = "bundle"
ADMIN_VARIABLE = "PI0FM_ADMIN_TOKEN"  # the name, not the key


@dataclass(frozen=True)
class ServeConfig(LoadOptions, limits.ServingLimits):
    """Options of `pi0fm serve`: how the bundle is loaded, and where and for whom it is served."""

    bundle: Path = required("folder of the policy, as pi0fm train wrote it")
    host: str = option("127.0.0.1", "address to listen on; 0.0.0.0 opens it to every network, so give a token with it")
    port: int = option(8000, "port to listen on; 0 takes a free one, which the ready line names")
    token: str | None = option(
        None, f"key that clients must send; other users can read it in the process list, so prefer ${TOKEN_VARIABLE} or --tokens"
    )
    tokens: Path | None = option(None, "file of keys, one a line, any of which a client may send; a line that begins with # is a comment")
    tls_certificate: Path | None = option(None, "PEM file with the server's certificate chain; clients connect with wss://")
    tls_key: Path | None = option(None, "PEM file with the certificate's key")
    tls_clients: Path | None = option(None, "PEM file of the authorities that must have issued a client's certificate")
    log_format: str = option("text", "text, or json: one object per line with time, level, logger, message and the traceback of a fault")
    guidance: str = option(
        GUIDED,
        "real-time chunking: guided continues the robot's last chunk with a backward pass in each flow step; guided_no_jacobian does "
        "without it: cheaper, less accurate, works with --compile; hard_prefix keeps the rows that are executed meanwhile, at almost no "
        "cost, for a policy trained with --rtc.max_delay",
    )
    keys: Path | None = option(None, "YAML file: a robot's observation key -> a column of the bundle (format in serve/keys.py)")

    live: bool = option(
        False, "serve the page /live: pictures, actions and latency of each robot; its password is the key, if clients need one"
    )
    log_requests: Path | None = option(None, "folder for a log of inferences with pictures, for pi0fm replay")
    log_mb: int = option(1024, "most megabytes of that log; the oldest requests are removed first")

    replicas: int = option(0, "copies of the policy behind Ray Serve, each on a separate device; 0 serves in this process")
    most_replicas: int | None = option(None, "replicas that Ray Serve may add while more robots are connected; --replicas when not given")
    robots_per_replica: int = option(8, "robots connected to each replica above which a replica is added")

    def __post_init__(self) -> None:
        LoadOptions.__post_init__(self)
        limits.ServingLimits.__post_init__(self)
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"--port must be in 0..65535, found {self.port}: 8000 is the default, 0 takes a free one")
        if self.log_mb < 8:
            raise ConfigError(f"--log_mb must be >= 8, found {self.log_mb}: 1024 keeps two minutes of a robot with three cameras at 20 Hz")
        most = self.replicas if self.most_replicas is None else self.most_replicas
        if not 0 <= self.replicas <= most or self.robots_per_replica < 1:
            raise ConfigError(
                f"--replicas must be in 0..--most_replicas and --robots_per_replica be >= 1, found {self.replicas}, {self.most_replicas} "
                f"and {self.robots_per_replica}"
            )
        if self.log_format not in ("text", "json"):
            raise ConfigError(f"--log_format must be text or json, found {self.log_format!r}")
        if self.guidance not in GUIDANCE:
            raise ConfigError(f"--guidance must be one of {', '.join(GUIDANCE)}, found {self.guidance!r}")
        if (self.tls_certificate is None) != (self.tls_key is None) or (self.tls_clients is not None and self.tls_key is None):
            raise ConfigError("--tls_certificate and --tls_key go together, and --tls_clients with them: give both files")


Options = ServeConfig


def run(options: ServeConfig) -> None:
    """Serve until SIGINT or SIGTERM; SIGHUP loads the bundle again, as POST /swap with the key $PI0FM_ADMIN_TOKEN does.

    The only line on standard output is the JSON ready line, for which a parent process may wait.
    """
    tokens, admin = known_tokens(options), os.environ.get(ADMIN_VARIABLE)
    if admin is not None:
        application.check_token(admin, f"${ADMIN_VARIABLE}")
    if not tokens and options.host not in ("127.0.0.1", "localhost", "::1"):
        say(f"anyone who reaches {options.host} can use this policy: set {TOKEN_VARIABLE} to ask for a key")
    if options.replicas:
        if admin is not None:
            raise ConfigError(f"${ADMIN_VARIABLE} is for POST /swap of a single server, found it with --replicas: unset it")
        _serve_replicas(options, tokens)
        return
    limits.log_to_standard_error(options.log_format)
    limits.fit_descriptors(options.max_connections)
    certificates = None
    if options.tls_certificate is not None and options.tls_key is not None:
        certificates = server.Certificates(options.tls_certificate, options.tls_key, options.tls_clients)
        certificates.context()  # reports a wrong file before a policy is loaded
    with server.until_stopped(), server.bind(options.host, options.port) as bound:
        url = server.url_of(bound, encrypted=certificates is not None)
        keys = _keys(options)
        say(f"loading {options.bundle}")
        # Imported here: torch takes seconds, and a port in use should be reported at once.
        from pi0fm.policy.local import LocalPolicy
        from pi0fm.policy.saved.bundle import load

        descriptions: dict[str | None, dict[str, Any]] = {}

        def opened(bundle: str | Path | None = None) -> LocalPolicy:
            path = options.bundle if bundle is None else Path(bundle)
            policy = load(path, options, guidance=options.guidance)
            if options.log_requests is not None:
                from pi0fm.serve.records.replay import describe

                how = {field.name: getattr(options, field.name) for field in fields(LoadOptions)}
                descriptions[policy.metadata.get("identity")] = describe(policy, path, LoadOptions(**how))
            return policy

        log = None
        if options.log_requests is not None:
            log = RequestLog(options.log_requests, options.log_mb * 1_000_000, descriptions.__getitem__)
        policy = opened()
        app = application.create_app(
            policy,
            options,
            tokens=tokens,
            admin_token=admin,
            load=opened,
            log=log,
            live=options.live,
            keys=keys,
        )

        def announce(seconds: float) -> None:
            # a garbage collection would visit a million objects of the libraries: a third of a second without an answer to any robot
            gc.collect()
            gc.freeze()
            known = {name: policy.metadata[name] for name in ("identity", "robot") if name in policy.metadata}
            ready = {"ready": True, "url": url, "bundle": str(options.bundle), **known, "warm_up_seconds": round(seconds, 3)}
            print(json.dumps(ready), flush=True)
            named = "".join(f", {name} {value}" for name, value in known.items())
            say(f"serving {options.bundle}{named} on {url}; ^C stops it")
            if options.live:
                say(f"live page: {url.replace('ws', 'http', 1)}/live")

        made = server.make_server(app, options, certificates)
        asyncio.run(server.serve(made, app, bound, announce))
    say("stopped serving")


def _serve_replicas(options: ServeConfig, tokens: list[str]) -> None:
    """Serve behind Ray Serve until SIGINT or SIGTERM."""
    from pi0fm.cluster import serving
    from pi0fm.policy.device import choose_device
    from pi0fm.policy.saved.bundle import metadata

    serving.refuse_single_server_options(options)
    metadata(options.bundle, options.robot)  # reports a fault before Ray starts
    keys = _keys(options)

    def build() -> Starlette:
        from pi0fm.policy.saved.bundle import load

        policy = load(options.bundle.resolve(), options, guidance=options.guidance)
        return application.create_app(policy, options, tokens=tokens, keys=keys)

    def announce() -> None:
        url = f"ws://{'127.0.0.1' if options.host == '0.0.0.0' else options.host}:{options.port}"  # noqa: S104 - compared, not bound
        print(json.dumps({"ready": True, "url": url, "bundle": str(options.bundle), "replicas": options.replicas}), flush=True)
        say(f"serving {options.bundle} in {options.replicas} replicas on {url}; ^C stops it")

    each = {"GPU": 1.0} if choose_device(options.device).type == "cuda" else {}
    replicas = serving.Replicas(options.replicas, options.most_replicas or options.replicas, options.robots_per_replica, each)
    serving.serve_replicas(build, application.fault_of, replicas, options.host, options.port, announce)
    say("stopped serving")


def _keys(options: ServeConfig) -> Keys | None:
    """Read the file of keys with the bundle's metadata, so that a fault is reported before weights are loaded."""
    if options.keys is None:
        return None
    from pi0fm.policy.saved.bundle import metadata

    return read_keys(options.keys, metadata(options.bundle, options.robot))


def known_tokens(options: ServeConfig) -> list[str]:
    """Return the key of the option or else of the environment, and those of the file. Raises ConfigError for an invalid or empty key."""
    token, where = options.token, "--token"
    if token is None:
        token, where = os.environ.get(TOKEN_VARIABLE), f"${TOKEN_VARIABLE}"
    tokens = {} if token is None else {where: token}
    if options.tokens is not None:
        file = {f"{options.tokens}, line {number}:": line for number, line in _lines(options.tokens) if line and not line.startswith("#")}
        if not file:
            raise ConfigError(f"--tokens must name a file with one key or more, found none in {options.tokens}: write one a line")
        tokens |= file
    for where, each in tokens.items():
        application.check_token(each, f"{where} a token" if where.endswith(":") else where)
    return list(tokens.values())


def _lines(file: Path) -> list[tuple[int, str]]:
    """Return the lines of a key file with their numbers, stripped, without the byte order mark that editors on Windows write."""
    try:
        raw = file.read_bytes()
    except OSError as error:
        raise ConfigError(f"--tokens must name a text file, found {file}: {error.strerror}") from None
    found = []
    for number, line in enumerate(raw.removeprefix(codecs.BOM_UTF8).splitlines(), 1):
        try:
            found.append((number, line.decode().strip()))
        except UnicodeDecodeError:
            raise ConfigError(f"{file}, line {number}: keys are printable ASCII, found other bytes; save the file as UTF-8") from None
    return found
