"""`thermocline doctor` as it is typed: what it looks at, what it prints, and how it ends."""

from __future__ import annotations

import json
from contextlib import ExitStack

import pytest

from tests.gateway.fleet import Light, Route
from tests.lens.test_doctor import CLOCK, ask_light
from tests.store.test_receipts import text
from tests.vllm.node import Node
from thermocline import cli
from thermocline.clock import until
from thermocline.lens import observe
from thermocline.lens.diagnosis import HEALTHY


@pytest.fixture
def runtime(tmp_path, monkeypatch):
    """The folder where nodes and gateways of this user listen; nobody answers at the default address."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setattr(observe, "DEFAULT_URL", "http://127.0.0.1:1")
    folder = tmp_path / "thermocline"
    folder.mkdir(mode=0o700)
    return folder


@pytest.fixture
def started():
    """What is ended after the test."""
    with ExitStack() as stack:
        yield stack


def _run(capsys, *argv):
    with pytest.raises(SystemExit) as stopped:
        cli.main(("doctor", "--seconds", "0", *argv))
    return stopped.value.code, *capsys.readouterr()


def test_nothing_runs(runtime, capsys):
    """Where nothing runs that could be looked at, it says so, and what to name."""
    status, out, err = _run(capsys)
    assert (status, out) == (1, "")
    assert "no node or gateway of this user runs here" in err
    assert "--url" in err


def test_a_server_that_nobody_asked(tmp_path, capsys, started):
    """Of a server that has answered nothing it is said that nothing is known of its reuse, beside what is not wrong."""
    light = started.enter_context(Light(tmp_path, "a", f"ipc://{tmp_path / 'events'}", 64))
    status, out, _ = _run(capsys, "--url", light.url)
    assert status == 0
    assert f"{light.url}: whether anything is reused: needs requests: none was answered so far" in out


def test_what_runs_here_is_found(runtime, capsys, started):
    """Without flags, the node and the gateway of this user are looked at, and the gateway's instances."""
    node = started.enter_context(Node(runtime, memory_bytes=64 << 20))
    light = started.enter_context(Light(runtime, "a", f"ipc://{runtime / 'events'}", 64))
    route = started.enter_context(Route(runtime, [light], "--events-listen", f"ipc://{runtime / 'events'}"))
    assert until(lambda: route.instances()["a"]["state"] == "up", 10.0, pause_seconds=0.02)
    ask_light(light, text(int(CLOCK.wall()), 100))
    status, out, _ = _run(capsys, "--json", "--checklist")
    told = json.loads(out)
    assert (status, told["diagnosis"]["findings"]) == (0, [])
    assert light.url in {each["where"] for each in told["diagnosis"]["hits"]}
    assert len(told["checklist"]) == 7
    assert node.socket.exists()


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "http://[::1", "nowhere"])
def test_servers_that_do_not_answer(runtime, capsys, url):
    """Where no server that was named answers, that is an error and no all-clear."""
    status, out, err = _run(capsys, "--url", url, "--checklist")
    assert (status, out) == (1, "")
    assert "hint:" in err


def test_a_finding_is_the_exit_code(runtime, capsys):
    """A finding ends with 1, and its action is the last line."""
    status, out, _ = _run(capsys, "--node", str(runtime / "node.sock"))
    assert status == 1
    assert "INSTANCE DOWN" in out
    assert out.splitlines()[-1].startswith("so: read its log")


def test_json_says_what_the_text_says(runtime, capsys):
    """Each finding has its meaning, its action and what would refute it, and the whole has its conclusion."""
    node = ("--node", str(runtime / "node.sock"))
    _, out, _ = _run(capsys, *node)
    told = json.loads(_run(capsys, *node, "--json")[1])["diagnosis"]
    (finding,) = told["findings"]
    for words in (finding["meaning"], f"do: {finding['action']}", f"not so, if: {finding['refuted_by']}"):
        assert words in out
    assert out.splitlines()[-1] == f"so: {told['so']}"


def test_well_is_said_plainly(runtime, capsys, started):
    """A system that is well ends with 0, and the last line says that nothing was found."""
    light = started.enter_context(Light(runtime, "a", f"ipc://{runtime / 'events'}", 64))
    ask_light(light, text(1, 100))
    status, out, _ = _run(capsys, "--url", light.url, "--events", f"ipc://{runtime / 'events'}")
    assert (status, out.splitlines()[-1]) == (0, f"so: {HEALTHY}")
