"""`pi0fm serve` up to the point where a bundle is loaded: ports, options, keys."""

import asyncio
import socket
import sys
import types
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from pi0fm.cli import serve as command
from pi0fm.cli.main import main
from pi0fm.options import parse
from pi0fm.policy.load_options import LoadOptions
from pi0fm.serve import server
from pi0fm.serve.app import create_app
from pi0fm.serve.limits import ServingLimits
from pi0fm_client.errors import BundleError, ConfigError, ServingError


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Every call of the bundle's `load`, which finds no bundle."""
    calls: list[dict[str, Any]] = []

    def load(path: Path, options: LoadOptions, guidance: str) -> None:
        calls.append({"path": path, "guidance": guidance, **{field.name: getattr(options, field.name) for field in fields(LoadOptions)}})
        raise BundleError(f"no bundle at {path}")

    stand_in = types.ModuleType("pi0fm.policy.saved.bundle")
    stand_in.load = load  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pi0fm.policy.saved.bundle", stand_in)
    return calls


def test_a_port_in_use_is_one_line_before_anything_is_loaded(loads: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        assert main(["serve", "--bundle", "run/bundle", "--port", str(port)]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert f"port {port} on 127.0.0.1 is in use" in err and "--port" in err
    assert loads == []


def test_options_reach_the_bundle_and_its_fault_the_user(loads: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--policy.path", "b", "--port", "0", "--num_flow_steps", "5", "--robot", "arm", "--solver", "heun"]
    words += ["--device", "cpu", "--threads", "1", "--guidance", "hard_prefix"]
    assert main(["serve", *words]) == 1
    wanted = {
        "guidance": "hard_prefix",
        "robot": "arm",
        "num_flow_steps": 5,
        "solver": "heun",
        "noise_level": None,
        "device": "cpu",
        "precision": "auto",
        "threads": 1,
        "compile": "off",
    }
    assert loads == [{"path": Path("b"), **wanted}]
    assert "no bundle at b" in capsys.readouterr().err


def test_a_wrong_file_of_keys_is_told_before_the_weights_are_loaded(loads: list[Any], monkeypatch: Any, tmp_path: Path) -> None:
    columns = {"cameras": {"base": "observation.images.base"}, "state_key": "observation.state"}
    monkeypatch.setattr(sys.modules["pi0fm.policy.saved.bundle"], "metadata", lambda path, robot: columns, raising=False)
    (tmp_path / "keys.yaml").write_text("observation.images.base:\n")
    with pytest.raises(ConfigError, match="leaves every camera out"):
        command.run(parse(command.Options, ["--bundle", "b", "--port", "0", "--keys", str(tmp_path / "keys.yaml")]))
    assert loads == []


def test_the_bundle_comes_first_in_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--help"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines() if "--" in line][1] == "--bundle"


def test_the_port_is_free_again_after_a_fault(loads: list[Any]) -> None:
    with server.bind("127.0.0.1", 0) as probe:
        port = probe.getsockname()[1]
    for _ in range(2):
        assert main(["serve", "--bundle", "b", "--port", str(port)]) == 1
    assert len(loads) == 2


@pytest.mark.parametrize(
    "option", ["port", "max_batch_size", "max_queue", "max_connections", "max_frame_bytes", "idle_seconds", "num_flow_steps", "threads"]
)
def test_numbers_out_of_range_are_refused(option: str) -> None:
    with pytest.raises(ConfigError, match=f"{option} must"):
        parse(command.Options, ["--bundle", "b", f"--{option}", "-1"])


def test_a_bundle_must_be_named() -> None:
    with pytest.raises(ConfigError, match="bundle is required"):
        parse(command.Options, [])


@pytest.mark.parametrize(("words", "variable"), [(["--token", "two words"], None), ([], ""), ([], "two words")])
def test_a_key_that_protects_nothing_is_refused(
    loads: list[Any], monkeypatch: pytest.MonkeyPatch, words: list[str], variable: str | None
) -> None:
    if variable is not None:
        monkeypatch.setenv(command.TOKEN_VARIABLE, variable)
    with pytest.raises(ConfigError, match="must be printable ASCII without blanks and not empty"):
        command.run(parse(command.Options, ["--bundle", "b", "--port", "0", *words]))
    assert loads == []


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (
            b"good\ntwo words\n",
            "keys.txt, line 2: a token must be printable ASCII without blanks and not empty, found U+0020 as character 4",
        ),
        (b"# mine\n\nk\xc3\xa4se\n", "keys.txt, line 3: a token must be printable ASCII without blanks and not empty, found U+00E4"),
        (b"good\nb\xe4d\n", "keys.txt, line 2: keys are printable ASCII, found other bytes; save the file as UTF-8"),
        ("good\n".encode("utf-16"), "keys.txt, line 1: keys are printable ASCII, found other bytes"),
        (b"# none\n", "found none in"),
        (None, "keys.txt: No such file or directory"),
    ],
)
def test_a_file_of_keys_with_a_fault_is_told_with_its_line_and_no_key(tmp_path: Path, content: bytes | None, line: str) -> None:
    file = tmp_path / "keys.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError) as told:
        command.known_tokens(parse(command.Options, ["--bundle", "b", "--tokens", str(file)]))
    assert line in str(told.value) and "good" not in str(told.value) and "words" not in str(told.value)


def test_a_file_of_keys_from_windows_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(command.TOKEN_VARIABLE, raising=False)
    (tmp_path / "keys.txt").write_bytes(b"\xef\xbb\xbffirst\r\n  second \r\n# third\r\n")
    assert command.known_tokens(parse(command.Options, ["--bundle", "b", "--tokens", str(tmp_path / "keys.txt")])) == ["first", "second"]


def test_a_port_for_everyone_without_a_key_is_told(loads: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    main(["serve", "--bundle", "b", "--port", "0", "--host", "0.0.0.0"])
    assert "anyone who reaches 0.0.0.0" in capsys.readouterr().err


def test_addresses_that_this_machine_does_not_have_are_refused() -> None:
    with pytest.raises(ServingError, match=r"cannot listen on 192\.0\.2\.1"):
        server.bind("192.0.2.1", 0)
    with pytest.raises(ServingError, match="is no address of this machine"):
        server.bind("no such host", 0)


def test_two_servers_that_warm_up_for_one_port_end_as_one(fake_policy: Any, start_server: Any) -> None:
    """Two sockets may be bound to one port while neither listens; the later listener is told as if it had looked at once."""
    with server.bind("127.0.0.1", 0) as late:
        port = late.getsockname()[1]
        start_server(port=port)
        policy = fake_policy()
        app = create_app(policy, ServingLimits())
        with pytest.raises(ServingError, match=f"port {port} on 127.0.0.1 is in use"):
            asyncio.run(server.serve(server.make_server(app, ServingLimits()), app, late, lambda seconds: pytest.fail("announced")))


def test_the_url_is_one_that_this_machine_reaches() -> None:
    with server.bind("0.0.0.0", 0) as bound:
        assert server.url_of(bound) == f"ws://127.0.0.1:{bound.getsockname()[1]}"
