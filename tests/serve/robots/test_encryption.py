"""Tests of TLS from files: the servers that a client trusts, the clients that a server accepts."""

import shutil
import socket
import ssl
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_hostile_clients import is_dropped
from test_policy_server import actions_of, observation_bytes, talk
from websockets.exceptions import WebSocketException

from pi0fm.cli import serve
from pi0fm.options import parse
from pi0fm.serve import limits
from pi0fm.serve.server import Certificates
from pi0fm_client import PolicyClient
from pi0fm_client.errors import ConfigError, ServingError


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1 that vouches for itself, and its key."""
    if shutil.which("openssl") is None:
        pytest.skip("no openssl on this machine")
    folder = tmp_path_factory.mktemp("tls")
    words = "req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=robot -addext subjectAltName=IP:127.0.0.1"
    subprocess.run(
        ["openssl", *words.split(), "-keyout", folder / "key.pem", "-out", folder / "chain.pem"], check=True, capture_output=True
    )
    return folder / "chain.pem", folder / "key.pem"


def trusting(chain: Path) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=chain)


def test_a_robot_speaks_wss(start_server: Any, pair: tuple[Path, Path]) -> None:
    server = start_server(certificates=Certificates(*pair))
    assert server.url.startswith("wss://127.0.0.1:")
    with talk(server.url, ssl=trusting(pair[0])) as robot:
        robot.recv()
        robot.send(observation_bytes(state=2.0))
        assert actions_of(robot.recv())[0, 0] == 2.0
    with pytest.raises(ssl.SSLError):
        talk(server.url).__enter__()


def test_a_client_without_a_certificate_is_kept_out_where_one_is_asked_for(start_server: Any, pair: tuple[Path, Path]) -> None:
    server = start_server(certificates=Certificates(*pair, clients=pair[0]))
    own = trusting(pair[0])
    with pytest.raises((OSError, WebSocketException)):
        talk(server.url, ssl=own).__enter__()
    own.load_cert_chain(*pair)
    with talk(server.url, ssl=own) as robot:
        robot.recv()
        robot.send(observation_bytes(state=2.0))
        assert actions_of(robot.recv())[0, 0] == 2.0


def test_a_silent_handshake_has_its_time(start_server: Any, pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "SILENT_SECONDS", 0.2)
    server = start_server(certificates=Certificates(*pair))
    assert is_dropped(socket.create_connection(("127.0.0.1", server.port)))


@pytest.fixture(scope="module")
def others(pair: tuple[Path, Path]) -> dict[str, Path]:
    """Files of each kind that does not fit: another key, the same key with a password, damage, text, nothing."""
    folder = pair[0].parent
    names = ("other", "password", "cut", "text", "missing")
    found = dict(zip(names, [folder / f"{name}.pem" for name in names], strict=True))
    subprocess.run(["openssl", "genrsa", "-out", found["other"], "2048"], check=True, capture_output=True)
    words = ["openssl", "rsa", "-aes256", "-passout", "pass:secret", "-in", pair[1], "-out", found["password"]]
    subprocess.run(words, check=True, capture_output=True)
    found["cut"].write_text("\n".join([*pair[0].read_text().splitlines()[:-4], "-----END CERTIFICATE-----"]))
    found["text"].write_text("no certificate")
    return found | {"chain": pair[0], "key": pair[1]}


@pytest.mark.parametrize(
    ("chain", "key", "clients", "line"),
    [
        ("missing", "key", None, "--tls_certificate must name a PEM file that can be read, found .*missing.pem: No such file"),
        ("chain", "missing", None, "--tls_key must name a PEM file that can be read, found .*missing.pem"),
        ("text", "key", None, "--tls_certificate must name a PEM file with a certificate .*found none in .*text.pem"),
        ("key", "key", None, "--tls_certificate must name a PEM file with a certificate"),
        ("chain", "chain", None, "--tls_key must name a PEM file with a private key"),
        ("chain", "other", None, "--tls_key must belong to the first certificate of .*chain.pem, found another in .*other.pem"),
        ("chain", "password", None, "--tls_key must be without a password, found .*password.pem with one"),
        ("cut", "key", None, "damage in one of .*cut.pem"),
        ("chain", "key", "key", "--tls_clients must name a PEM file with a certificate"),
        ("chain", "key", "cut", "damage in one of .*cut.pem"),
    ],
)
def test_files_that_do_not_fit_are_told_apart(others: dict[str, Path], chain: str, key: str, clients: str | None, line: str) -> None:
    with pytest.raises(ConfigError, match=line) as told:
        Certificates(others[chain], others[key], others[clients] if clients else None).context()
    assert "_ssl.c" not in str(told.value)


def test_files_that_are_no_certificate_are_refused_before_a_policy_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "a.pem").write_text("no certificate")
    with pytest.raises(ConfigError, match="--tls_certificate must name a PEM file with a certificate"):
        serve.run(parse(serve.Options, ["--bundle", "b", "--tls_certificate", str(tmp_path / "a.pem"), "--tls_key", "none"]))
    with pytest.raises(ConfigError, match="go together"):
        parse(serve.Options, ["--bundle", "b", "--tls_key", "none"])


def test_a_client_whose_tls_does_not_fit_says_so_at_once(start_server: Any, pair: tuple[Path, Path]) -> None:
    plain, tls, asks = (
        start_server(),
        start_server(certificates=Certificates(*pair)),
        start_server(certificates=Certificates(*pair, pair[0])),
    )
    own = trusting(pair[0])
    lines: list[tuple[str, ssl.SSLContext | None, str]] = [
        (plain.url.replace("ws://", "wss://"), None, "speaks no TLS: write ws://"),
        (tls.url.replace("wss://", "ws://"), None, "speaks TLS: write wss://"),
        (tls.url, None, r"not trusted here \(self-signed certificate\): put the file of its authority in \$SSL_CERT_FILE"),
        (asks.url, own, "asks for a client's certificate"),
    ]
    for url, context, line in lines:
        began = time.monotonic()
        with pytest.raises(ServingError, match=line) as told:
            PolicyClient(url, tls=context)
        assert time.monotonic() - began < 10 and "_ssl.c" not in str(told.value)
    own.load_cert_chain(*pair)
    with PolicyClient(asks.url, tls=own) as policy:
        observation = {"observation.images.front": np.zeros((8, 8, 3), np.uint8), "observation.state": np.zeros(3), "prompt": "x"}
        assert policy.infer(observation).actions.shape == (4, 3)
    with pytest.raises(ConfigError, match="tls= is for a wss:// address"):
        PolicyClient(plain.url, tls=own)


def test_the_name_in_a_certificate_and_the_file_of_authorities_are_told(
    start_server: Any, pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    url = start_server(certificates=Certificates(*pair)).url
    with pytest.raises(ServingError, match="has a certificate for another name than localhost"):
        PolicyClient(url.replace("127.0.0.1", "localhost"), tls=trusting(pair[0]))
    monkeypatch.setenv("SSL_CERT_FILE", "/nowhere/ca.pem")
    with pytest.raises(ServingError, match=r"\$SSL_CERT_FILE must name the PEM file .*, found no file /nowhere/ca\.pem"):
        PolicyClient(url)
    monkeypatch.setenv("SSL_CERT_FILE", str(pair[0]))
    PolicyClient(url).close()
