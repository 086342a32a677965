"""TLS by files: whom a client may trust, and which clients a server lets in."""

import shutil
import socket
import ssl
import subprocess
from pathlib import Path
from typing import Any

import pytest
from test_hostile_clients import is_dropped
from test_policy_server import actions_of, observation_bytes, talk
from websockets.exceptions import WebSocketException

from pi0fm.cli import serve
from pi0fm.options import parse
from pi0fm.serve import limits
from pi0fm.serve.server import Certificates
from pi0fm_client.errors import ConfigError


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


def test_files_that_are_no_certificate_are_refused_before_a_policy_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "a.pem").write_text("no certificate")
    with pytest.raises(ConfigError, match="TLS needs a certificate and its key"):
        serve.run(parse(serve.Options, ["--bundle", "b", "--tls_certificate", str(tmp_path / "a.pem"), "--tls_key", "none"]))
    with pytest.raises(ConfigError, match="go together"):
        parse(serve.Options, ["--bundle", "b", "--tls_key", "none"])
