"""A node in a process of its own that is killed, frozen, restarted, damaged or full; its clients come back.

Each verb returns within its deadline, and what is loaded is what was saved.
"""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from tests.faults.test_full import _fill_up, _small_file_system
from tests.node.making import CLOCK, LAYOUT, MIB, fetch, keep, tokens, until
from tests.store.making import BLOCK_BYTES, TOKENS_PER_BLOCK, chain, content, contents
from tests.vllm.node import Node
from thermocline.errors import NodeError
from thermocline.node import ask
from thermocline.node.client import NodeClient
from thermocline.node.server import NodeServer
from thermocline.store.receipt import Reason
from thermocline.tiers.tier import Outcome

WAIT_SECONDS = 2.0
PATIENCE_SECONDS = 20.0
"""No verb may take longer, whatever happened to the node: a deadline of two seconds on a machine that is busy."""


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """A node with memory and a disk."""
    folder = tmp_path_factory.mktemp("node")
    with Node(folder, memory_bytes=f"{16 * MIB}", disk_path=folder / "disk", disk_bytes=f"{64 * MIB}") as node:
        yield node


@pytest.fixture
def node(one):
    """The same, running, whatever the last test did to it."""
    if one._process is None:
        one.start()
    return one


@pytest.fixture
def path(request):
    """A path of this test's own."""
    return chain(request.node.name, 8)


@pytest.fixture
def client(node):
    """A client of it, of which loading always pays."""
    with contextlib.closing(attached(node)) as client:
        yield client


def attached(node):
    """A client that has told the node that computing takes long: nothing is declined."""
    client = NodeClient(node.socket, wait_seconds=WAIT_SECONDS, save_wait_seconds=WAIT_SECONDS)
    assert client.wait_up(60)
    for tokens_of in (TOKENS_PER_BLOCK, 4 * TOKENS_PER_BLOCK, 16 * TOKENS_PER_BLOCK):
        client.costs.recomputed(tokens_of, 0, tokens_of / 10, LAYOUT.computed_by)
    return client


def all_verbs(client, path):
    """Every verb, each within its deadline; loaded bytes are right. How many blocks were loaded."""
    into = [[np.zeros(BLOCK_BYTES, np.uint8)] for _ in path]
    loaded = 0

    def load():
        nonlocal loaded
        plan = client.match([LAYOUT], path, prompt_tokens=tokens(path))
        loaded = client.load(plan, 0, into).blocks
        client.release(plan.lease)

    verbs = {
        "load": load,
        "unsaved": lambda: client.unsaved(LAYOUT, path),
        "save": lambda: client.save(LAYOUT, path, contents(LAYOUT, path)),
        "prefetch": lambda: client.prefetch([LAYOUT], path, CLOCK.now() + 1),
        "stage": lambda: client.stage([LAYOUT], path, prompt_tokens=tokens(path)).cancel(),
        "damaged": lambda: client.damaged(LAYOUT, path[:1]),
        "measure": client.measure,
    }
    for name, verb in verbs.items():
        started = CLOCK.now()
        verb()
        assert CLOCK.now() - started < PATIENCE_SECONDS, f"{name} took longer than it may"
    for key, pieces in zip(path[:loaded], into, strict=False):
        assert np.array_equal(pieces[0], content(LAYOUT, key))
    return loaded


@contextlib.contextmanager
def busy(client, path, *, threads):
    """Threads that go through all verbs, again and again. What one of them raises is raised at the end."""
    done = threading.Event()

    def work():
        while not done.is_set():
            all_verbs(client, path)

    with ThreadPoolExecutor(threads) as pool:
        working = [pool.submit(work) for _ in range(threads)]
        try:
            yield
        finally:
            done.set()
    for each in working:
        each.result()


def comes_back(client):
    """The client is attached again by itself, saves, and finds what it saved."""
    until(lambda: client.up, "the client to attach again", 60)
    path = chain(f"fresh {CLOCK.now()}", 4)
    until(lambda: set(keep(client, path).outcomes) == {Outcome.HIT}, "a save to be taken", 60)
    until(lambda: fetch(client, path)[0] == 4, "what was saved", 60)


def stands_still(node):
    """Wait until every thread of a node that was stopped has stopped."""

    def state(task):
        return (task / "stat").read_text().rpartition(") ")[2][0]

    until(lambda: {state(task) for task in Path(f"/proc/{node.pid}/task").iterdir()} == {"T"}, "the node to stop")


def durable(node):
    """Wait until all that was saved is on disk too."""

    def on_disk():
        tiers = {tier.name: tier for tier in ask.status(node.socket).tiers}
        return tiers["disk"].blocks >= tiers["memory"].blocks

    until(on_disk, "saves to be durable")


def test_killed_and_started_again(node, client, path):
    """A node that is killed costs nothing but its memory: another life of it serves from disk what was durable."""
    keep(client, path)
    durable(node)
    node.kill()
    until(lambda: not client.up, "the client to notice")
    assert all_verbs(client, path) == 0
    node.start()
    until(lambda: client.up, "the client to attach again", 60)
    until(lambda: fetch(client, path) == (8, {"disk": 8}) or fetch(client, path) == (8, {"memory": 8}), "all from disk")
    comes_back(client)


def test_restarted_in_good_order(node, client, path):
    """A node that is stopped keeps what only memory held; the next one has it."""
    keep(client, path)
    node.restart()
    until(lambda: client.up, "the client to attach again", 60)
    until(lambda: fetch(client, path)[0] == 8, "all from disk")


def test_frozen(node, client, path):
    """A frozen node costs one deadline, then nothing; when it thaws its client trusts it again by itself."""
    keep(client, path)
    with node.frozen():
        stands_still(node)
        for _ in range(3):
            assert all_verbs(client, path) == 0
        assert not client.up
        started = CLOCK.now()
        for _ in range(100):
            client.match([LAYOUT], path, prompt_tokens=tokens(path))
        assert CLOCK.now() - started < WAIT_SECONDS * 10
    comes_back(client)
    until(lambda: fetch(client, path)[0] == 8, "what it held")


def test_frozen_while_much_is_saved(node, client, path):
    """A node that freezes while its client saves more than sockets hold keeps no verb longer than its deadline."""
    client.ready(LAYOUT, 64)
    keep(client, path)
    long = chain("long", 3000)
    with node.frozen():
        for _ in range(8):
            started = CLOCK.now()
            client.stage([LAYOUT], long, prompt_tokens=tokens(long)).cancel()
            client.save(LAYOUT, long, contents(LAYOUT, long[:4]))
            client.prefetch([LAYOUT], long, CLOCK.now())
            assert CLOCK.now() - started < PATIENCE_SECONDS
    comes_back(client)


def test_killed_at_any_moment(node, client, path):
    """Whatever client threads are at when the node is killed, every answer is right or a miss."""
    keep(client, path)
    durable(node)
    with busy(client, path, threads=3):
        for _ in range(2):
            node.kill()
            node.start()
            until(lambda: client.up, "the client to attach again", 60)
    comes_back(client)


def test_socket_removed_and_started_again(node, client, path):
    """With the socket's file removed clients stay attached; a second node there serves whoever comes next."""
    keep(client, path)
    node.socket.unlink()
    until(lambda: fetch(client, path)[0] == 8, "all of it")
    node.kill()
    node.start()
    comes_back(client)


def test_a_second_node_is_refused(node, client, path):
    """A second node at the same socket is refused with the reason, and the first goes on."""
    keep(client, path)
    argv = [sys.executable, "-m", "thermocline", "node", "--socket", str(node.socket), "--memory-bytes", "16MiB"]
    second = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    assert second.returncode != 0
    assert f"another node listens at {node.socket}" in second.stderr
    assert "hint" in second.stderr
    until(lambda: fetch(client, path)[0] == 8, "all of it")


def test_the_socket_is_ours_alone(node):
    """Nobody but this user may connect."""
    assert stat.S_IMODE(node.socket.stat().st_mode) == 0o600


def test_what_is_no_socket_stays(tmp_path):
    """A file that is no socket is not replaced by one, and a stale socket is."""
    path = tmp_path / "node.sock"
    path.write_text("mine")
    with pytest.raises(NodeError, match="is no socket"):
        NodeServer(None, path, lease_seconds=1.0)
    assert path.read_text() == "mine"
    path.unlink()
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))
    NodeServer(None, path, lease_seconds=1.0).close()
    assert not path.exists()


def test_of_many_nodes_one_listens(tmp_path):
    """Nodes that are started at once over a stale socket: one has the place, and its socket stays there."""
    path = tmp_path / "node.sock"
    for _ in range(10):
        with socket.socket(socket.AF_UNIX) as stale:
            stale.bind(str(path))
        servers, refused = [], []

        def start(servers=servers, refused=refused):
            try:
                servers.append(NodeServer(None, path, lease_seconds=1.0))
            except NodeError as error:
                refused.append(error)

        threads = [threading.Thread(target=start) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert (len(servers), len(refused)) == (1, 3)
        servers[0].close()
        assert not path.exists()


def test_a_slot_is_damaged(node, client, path):
    """A block whose slot was overwritten is CORRUPT; the node drops it, serves what is intact, and takes it again."""
    keep(client, path)
    durable(node)
    slab, *_ = node.slabs()
    damaged = content(LAYOUT, path[3]).tobytes()
    with slab.open("r+b", buffering=0) as memory:
        at = memory.read().index(damaged)
        os.pwrite(memory.fileno(), b"\xff\x00" * 8, at)
    plans = []

    def whole():
        plans.append(client.match([LAYOUT], path, prompt_tokens=tokens(path)))
        return plans[-1].blocks == 8

    until(whole, "a plan for all of it")  # a node may be late on a busy machine
    plan = plans[-1]
    loaded = client.load(plan, 0, [[np.zeros(BLOCK_BYTES, np.uint8)] for _ in path])
    client.release(plan.lease)
    assert (loaded.blocks, loaded.missing[0].reason) == (3, Reason.CORRUPT)
    until(lambda: fetch(client, path)[0] == 8, "the block from disk")


@pytest.mark.parametrize("name", ["index.log", "*.segment"])
def test_the_disk_is_damaged_while_nobody_looks(node, client, path, name):
    """A node whose disk was damaged starts, serves what verifies or nothing, and takes what is saved again."""
    keep(client, path)
    node.stop()
    damaged = list((node.socket.parent / "disk").glob(name))
    assert damaged
    for file in damaged:
        data = bytearray(file.read_bytes())
        data[:: max(1, len(data) // 64)] = bytes(len(data[:: max(1, len(data) // 64)]))
        file.write_bytes(data)
    node.start()
    until(lambda: client.up, "the client to attach again", 60)
    all_verbs(client, path)
    comes_back(client)


def test_the_disk_is_full(tmp_path):
    """A node whose disk is full serves from memory."""
    with (
        _small_file_system(tmp_path / "small", 24 * MIB) as folder,
        Node(tmp_path, memory_bytes=f"{16 * MIB}", disk_path=folder / "disk", disk_bytes=f"{64 * MIB}") as node,
        contextlib.closing(attached(node)) as client,
    ):
        _fill_up(folder / "filler")
        for number in range(60):
            path = chain(f"{number}", 40)
            keep(client, path)
        until(lambda: fetch(client, path)[0] == 40, "all of it")
        comes_back(client)
        tiers = {tier.name: tier for tier in ask.status(node.socket).tiers}
        assert tiers["disk"].blocks < tiers["memory"].blocks, "the disk was not full"


@pytest.mark.faults_long
@pytest.mark.parametrize("fault", ["kill", "freeze", "stop"])
def test_ten_times(node, client, path, fault):
    """Ten times in a row, at moments of any kind, the node is killed, frozen or stopped: no answer is wrong."""
    random = np.random.default_rng(sum(fault.encode()))
    with busy(client, path, threads=1):
        for _ in range(10):
            CLOCK.sleep(random.random())
            if fault == "freeze":
                with node.frozen():
                    CLOCK.sleep(3 * random.random())
            else:
                getattr(node, fault)()
                node.start()
            until(lambda: client.up, "the client to attach again", 60)
    comes_back(client)
