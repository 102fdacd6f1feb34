"""What `ps` shows, of real nodes."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
from array import array
from contextlib import ExitStack

import pytest

from tests.store.making import LAYOUT, chain, content
from thermocline import cli
from thermocline.build import store_from
from thermocline.errors import UnreachableError
from thermocline.lens import ps
from thermocline.node import ask
from thermocline.node.client import NodeClient
from thermocline.node.server import NodeServer
from thermocline.settings import Settings
from thermocline.wire.events import Batch, BlockStored
from thermocline.wire.status import ClientStatus, NodeStatus, TierStatus

BLOCKS = 6


@pytest.fixture
def runtime(tmp_path, monkeypatch):
    """The folder where nodes of this user listen."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    folder = tmp_path / "thermocline"
    folder.mkdir(mode=0o700)
    return folder


@pytest.fixture
def node(runtime):
    """A node, with a client that saved six blocks and asked for them, and for two that nobody has."""
    with ExitStack() as stack:
        store = store_from(Settings(memory_bytes=8 << 20))
        stack.callback(store.close)
        server = NodeServer(store, runtime / "node.sock", lease_seconds=30)
        stack.callback(server.close)
        client = NodeClient(server.path, role="test engine", wait_seconds=5, save_wait_seconds=5)
        stack.callback(client.close)
        assert client.wait_up(5)
        keys = chain("a", BLOCKS + 2)
        client.save(LAYOUT, keys[:BLOCKS], [[content(LAYOUT, key)] for key in keys[:BLOCKS]])
        assert client.flush(5)
        assert client.match([LAYOUT], keys, prompt_tokens=LAYOUT.tokens_per_block * len(keys) + 1).blocks == BLOCKS
        yield server


def _run(capsys, *argv):
    with pytest.raises(SystemExit) as stopped:
        cli.main(argv)
    return stopped.value.code, *capsys.readouterr()


def test_ps(node, capsys):
    """`ps` shows each node of this user with its tiers, who is connected, and its hit rate; not who asks."""
    code, out, err = _run(capsys, "ps")
    assert (code, err) == (0, "")
    assert f"node {node.path}\n  pid {os.getpid()}, up " in out
    assert "  memory   host             6" in out
    assert "  test engine                  " in out
    assert "command" not in out
    assert out.endswith("so: 75% of 8 blocks asked for were found: 6 in memory\n")


def test_ps_as_json(node, runtime, capsys):
    """`ps --json` has the same as data, and the sockets at which nobody answers."""
    (runtime / "gone.sock").touch()
    code, out, _ = _run(capsys, "ps", "--json")
    told = json.loads(out)
    assert code == 0
    assert told["nodes"][0]["tiers"][0]["blocks"] == BLOCKS
    assert told["nodes"][0]["clients"][0] == {
        "role": f"test engine {os.getpid()}",
        "pid": os.getpid(),
        "layouts": 1,
        "leases": 1,
        "lent_slots": told["nodes"][0]["clients"][0]["lent_slots"],
    }
    assert [each["socket"] for each in told["silent"]] == [str(runtime / "gone.sock")]


def test_a_gateway(runtime, capsys):
    """`ps` shows each gateway with what its instances hold. A socket's name says nothing of who listens there."""
    pytest.importorskip("uvloop", reason="the gateway runs on uvloop")
    from tests.gateway.serving import World
    from thermocline.fleet.index import FleetIndex
    from thermocline.gateway.admin import admin, admin_socket
    from thermocline.gateway.observe import Observer

    index, path = FleetIndex(100), runtime / "front.sock"
    index.apply(1, Batch(1.0, (BlockStored((1, 2), None, array("I", range(32)), 16, "CPU"),)), 0)
    with World() as world, contextlib.closing(store_from(Settings(memory_bytes=1 << 20))) as store:
        gateway = world.gateway([world.good().port, world.good().port]).gateway
        gateway.observer = Observer(index)
        server = world.call(lambda: admin(gateway))
        world.run(server.start(admin_socket(path)))
        with contextlib.closing(NodeServer(store, runtime / "gateway-1.sock", lease_seconds=30)):
            code, out, err = _run(capsys, "ps")
            told = json.loads(_run(capsys, "ps", "--json", "--socket", str(path))[1])
        world.run(server.stop(0))
    assert (code, err) == (0, "")
    assert f"node {runtime / 'gateway-1.sock'}\n" in out
    rows = [" ".join(row.split()) for row in out.partition(f"gateway {path}\n")[2].splitlines()]
    assert rows == ["instance state in flight device host disk events", "i0 up 0 0 0 0 none", "i1 up 0 0 2 0 none"]
    assert told["gateways"][0]["instances"][1]["blocks"] == {"device": 0, "host": 2, "disk": 0}


def test_what_is_neither(runtime, capsys):
    """What answers, and is neither node nor gateway, is told as what it is not."""
    with socket.create_server(str(runtime / "x.sock"), family=socket.AF_UNIX) as listener:
        answering = threading.Thread(target=_answer_wrongly, args=(listener,))
        answering.start()
        code, out, _ = _run(capsys, "ps")
        answering.join()
    assert code == 0
    assert out.startswith(f"what listens at {runtime / 'x.sock'} is no node of this version")


def _answer_wrongly(listener):
    for _ in range(2):
        with listener.accept()[0] as link:
            link.recv(1 << 16)
            link.sendall(b"220 smtp\r\n\r\n")


def test_no_node(runtime, capsys):
    """Without a node, `ps` says how to start one; a node that is named must answer."""
    code, out, _ = _run(capsys, "ps")
    assert (code, out) == (
        0,
        "no node of this user runs here\nhint: start one with `thermocline node`, or name its --socket\n",
    )
    code, out, err = _run(capsys, "ps", "--socket", str(runtime / "other.sock"))
    assert (code, out) == (1, "")
    assert f"no node answers at {runtime / 'other.sock'}" in err
    assert "hint: start one with `thermocline node`" in err


def test_an_open_folder_is_refused(runtime, capsys):
    """Where others may write into the runtime folder, nothing there is believed."""
    runtime.chmod(0o777)
    code, out, err = _run(capsys, "ps")
    assert (code, out) == (1, "")
    assert "hint: remove it" in err


def test_a_node_that_is_gone(tmp_path):
    """A socket without a node is shown as such, beside the others."""
    seen = ps.look([tmp_path / "none.sock"], ask.status)
    assert not seen.nodes
    assert "no node answers at" in ps.render(seen)
    with pytest.raises(UnreachableError):
        ps.look([tmp_path / "none.sock"], ask.status, must_answer=True)


def test_rendered():
    """Sizes and times are in units for people, tiers set aside are marked, and bars are drawn where asked for."""
    tiers = [
        TierStatus("memory", "host", 1234, 3 << 29, 2 << 30, 5, set_aside=False),
        TierStatus("redis", "remote", 1, 100, 4 << 30, 0, set_aside=True),
    ]
    clients = [ClientStatus("vllm worker 0 77", 77, 1, 2, 16)]
    node = NodeStatus("0.1.0", 7, "/run/node.sock", 90061.5, tiers, clients, 10, {"memory": 4, "redis": 0})
    assert ps.render(ps.Seen((node,)), bars=True).splitlines() == [
        "node /run/node.sock",
        "  pid 7, up 1 d 1 h, thermocline 0.1.0",
        "  tier     medium      blocks       used         of     found",
        "  memory   host         1,234    1.5 GiB    2.0 GiB         4  " + 15 * "\u2588",
        "  redis    remote           1      100 B    4.0 GiB         0  set aside after failures  \u2588",
        "  engine                            pid  layouts  leases   lent",
        "  vllm worker 0                      77        1       2     16",
        "so: 40% of 10 blocks asked for were found: 4 in memory",
    ]
