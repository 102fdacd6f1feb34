"""What a node does with clients that are of another version, say anything, never read, die or stop."""

from __future__ import annotations

import fcntl
import json
import math
import mmap
import os
import signal
import socket
import struct
import threading

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.node.making import CLOCK, GUARD_SECONDS, LAYOUT, PATIENT, Host, Raw, fetch, keep, process, tokens, until
from tests.store.making import BLOCK_BYTES, chain, contents, make_layout
from tests.wire.test_messages import CLIENT_MESSAGES
from thermocline.clock import ManualClock
from thermocline.errors import NodeError
from thermocline.node import ask, keeper
from thermocline.node import server as server_module
from thermocline.node.client import NodeClient
from thermocline.node.link import Link
from thermocline.store.receipt import Reason, Receipt
from thermocline.wire import messages as say

PATH = chain("a", 6)


def joined(keys):
    """Keys as they are sent."""
    return b"".join(keys)


@pytest.fixture
def others(host):
    """A node, and another client that must not notice anything."""
    client = host.client()
    keep(client, PATH)
    yield host
    assert fetch(client, PATH)[0] == len(PATH), "another client was harmed"
    client.close()
    host.settle()


# -- who is served -----------------------------------------------------------------------------------------------------


def test_another_version_is_refused(host, monkeypatch, caplog):
    """A client of another version is refused at once, with the reason and what to do; it does without the node."""
    monkeypatch.setattr(say, "PROTOCOL", say.PROTOCOL + 1)
    hello = say.encode(say.Hello(say.PROTOCOL - 1, "0.1", "old engine"))
    with Raw(host.socket, hello=hello) as raw:
        refused = raw.hear()
        assert isinstance(refused, say.Refused)
        assert "0.1" in refused.reason
        assert "same version" in refused.hint
        assert raw.hear() is None


def test_another_node_is_refused(tmp_path, caplog):
    """A client that is refused says why in its log, once, and every verb goes on without the node."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "other.sock"))
        listener.listen()
        listener.settimeout(GUARD_SECONDS)
        client = NodeClient(tmp_path / "other.sock", **PATIENT)
        accepted, _ = listener.accept()
        accepted.sendall(say.encode(say.Refused("too old", "update")))
        until(lambda: "too old; hint: update" in caplog.text, "the reason in the log")
        assert client.match([LAYOUT], PATH, prompt_tokens=tokens(PATH)).blocks == 0
        client.close()
        accepted.close()


@pytest.mark.parametrize("answer", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"", b"\x01\x00\x00\x00\xc1", b"\x00" * 4])
def test_whatever_listens_there(tmp_path, monkeypatch, answer):
    """A client that meets something else at the socket survives it, and attaches when a node is there."""
    monkeypatch.setattr(keeper, "REFUSED_SECONDS", 0.05)
    path = tmp_path / "node.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        listener.settimeout(GUARD_SECONDS)
        client = NodeClient(path, **PATIENT)
        for _ in range(2):
            accepted, _ = listener.accept()
            accepted.sendall(answer)
            accepted.close()
    path.unlink()
    with Host(tmp_path):
        assert client.wait_up(GUARD_SECONDS)
        client.close()


def test_another_user_is_refused(host, monkeypatch):
    """A process of another user is refused, should it ever get at the socket."""
    monkeypatch.setattr(server_module.os, "getuid", lambda: 12345)
    with pytest.raises(NodeError, match="serves user 12345 only") as refused:
        Link(host.socket, "stranger", wait_seconds=1.0, on_end=lambda _: None)
    assert refused.value.hint


def test_too_many_clients(host, monkeypatch):
    """There is an end to the clients of a node; who comes then is told."""
    monkeypatch.setattr(server_module, "CLIENTS_MAX", 2)
    host.client()
    host.client()
    with pytest.raises(NodeError, match="2 clients are connected"):
        ask.status(host.socket)


def test_who_does_not_say_hello(others, monkeypatch):
    """Connections that say nothing, or drip, are closed soon; meanwhile there are not more of them than may be."""
    before = threading.active_count()
    silent = []
    for _ in range(100):
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(GUARD_SECONDS)
        sock.connect(str(others.socket))
        silent.append(sock)
        assert threading.active_count() <= before + server_module.GREETED_MAX
    for sock in silent:
        assert sock.recv(1) == b""
        sock.close()


def test_a_hello_that_drips(others):
    """Whoever says hello one byte at a time is not waited for."""

    def drips():
        try:
            raw.sock.sendall(b"\x01")
        except OSError:
            return False
        CLOCK.sleep(0.02)
        return True

    with Raw(others.socket, hello=b"") as raw:
        assert not all(drips() for _ in range(500))


# -- what clients say --------------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(data=st.binary(max_size=300), hello=st.booleans())
def test_bytes_that_are_nothing(fuzzed, data, hello):
    """Any bytes, before or after the handshake, end a connection at most, and nothing of it is left."""
    with Raw(fuzzed.socket, hello=None if hello else data) as raw:
        if hello:
            raw.sock.sendall(data)
        raw.sock.shutdown(socket.SHUT_WR)
        while raw.hear() is not None:
            pass
    fuzzed.settle()


GIANT = make_layout("giant", block_bytes=1 << 50)
small = st.integers(-1, 3)
keys_of_some = st.builds(lambda name, count: joined(chain(name, count)), st.sampled_from("abc"), st.integers(0, 5))
numbers = st.lists(small, max_size=3).map(tuple)
MEANT = st.one_of(
    st.builds(say.Stage, small, numbers, keys_of_some, st.integers(-1, 100)),
    st.builds(say.Release, numbers),
    st.builds(say.Damaged, small, keys_of_some),
    st.builds(say.Lend, small, small, st.integers(-5, 1 << 40)),
    st.builds(say.GiveBack, numbers),
    st.builds(
        lambda keys, start, slots: say.Commit(1, 1, keys, start, slots, bytes(16 * len(slots))),
        keys_of_some, small, numbers,
    ),
    st.builds(say.Unsaved, small, small, keys_of_some),
    st.builds(say.Prefetch, small, numbers, keys_of_some, st.floats()),
    st.builds(say.Computed, small, small, st.floats(), st.text(max_size=3)),
    st.builds(say.Receipts, small, st.text(max_size=3), st.integers(-5, 5)),
    st.builds(say.Trace, small),
    st.builds(say.Declare, small, st.sampled_from([LAYOUT, GIANT]).map(msgspec.msgpack.encode)),
)  # fmt: skip


@settings(max_examples=150)
@given(messages=st.lists(MEANT | CLIENT_MESSAGES, max_size=12))
def test_messages_in_any_order(fuzzed, messages):
    """Well-formed messages in any order end a connection at most, and the next client finds all in order."""
    with Raw(fuzzed.socket) as raw:
        raw.declare()
        raw.say(say.Lend(1, 1, 3), *messages)
        raw.sock.shutdown(socket.SHUT_WR)
        while raw.hear() is not None:
            pass
    fuzzed.settle()


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory):
    """One node for many strange clients."""
    with Host(tmp_path_factory.mktemp("fuzzed"), blocks=64, disk=True) as host:
        yield host
        client = host.client()
        # A strange client may have committed other bytes under these keys: each such block is a miss, once.
        assert any(keep(client, PATH) and fetch(client, PATH)[0] == len(PATH) for _ in (*PATH, "and then all of it"))


RECEIPT = Receipt(
    request="a", prompt_tokens=128, tokens_per_block=16, loaded_tokens=0, computed_tokens=128, by_tier={}, missing=(),
    match_seconds=0.0, load_seconds=0.0, prefill_seconds=0.1, planned_load_seconds=0.0, planned_recompute_seconds=0.0,
    planned_cold_seconds=0.1,
)  # fmt: skip


def record(request, *since):
    """A receipt of a prompt that is always the same."""
    receipt = msgspec.msgpack.encode(msgspec.structs.replace(RECEIPT, request=request))
    return say.Record(receipt, np.arange(128, dtype=np.uint32).tobytes(), bytes(32), *since)


def remembered(host, clients):
    """The node's last requests, as a trace, and the time that it is asked at."""
    for client in clients:
        client.ask(say.Ping(1))
    now = 1000 * host.clock.wall()
    return [json.loads(line) for line in ask.trace(host.socket).splitlines()], now


def test_requests_are_remembered_as_they_came(folder):
    """A request is in the trace at the time it came, not when its answer ended; what cannot be is taken for now."""
    with Host(folder, clock=ManualClock(1000.0)) as host, Raw(host.socket) as raw:
        since = [(60.0, 7), (math.nan, 1), (math.inf, 1), (-1.0, 1), (1e300, 1), (0.0, -1), (0.0, 1 << 60), ()]
        raw.say(*(record(str(at), *each) for at, each in enumerate(since)))
        rows, now = remembered(host, [raw])
        assert [round(now - row["timestamp"]) for row in rows] == [60_000, *([0] * 7)]
        assert [row["output_length"] for row in rows] == [7, *([0] * 7)]


def test_other_models_share_no_prefix(folder):
    """Equal prompts share blocks if they are for one model, whichever of its engines they came to, and else none."""
    with Host(folder) as host, Raw(host.socket) as one, Raw(host.socket) as two, Raw(host.socket) as other:
        one.declare()
        two.declare(msgspec.structs.replace(LAYOUT, tp_rank=1, tp_size=2))
        other.declare(msgspec.structs.replace(LAYOUT, model="another"))
        for raw, request in ((one, "a"), (two, "b"), (other, "c")):
            raw.say(record(request))
            rows, _ = remembered(host, [raw])
        first, second, third = (row["hash_ids"] for row in rows)
        assert first == second
        assert not set(first) & set(third)


@pytest.mark.parametrize(
    "wrong",
    [
        say.Hello(say.PROTOCOL, "again", "again"),
        say.Stage(7, (9,), joined(PATH), 100),
        say.Stage(7, (), joined(PATH), 100),
        say.Stage(7, (1,) * 5000, joined(PATH), 100),
        say.Stage(7, (1,), b"short", 100),
        say.Declare(2, b"no layout"),
        say.Declare(2, bytes(1 << 20)),
        say.Record(b"no receipt", b"", bytes(32)),
        say.Commit(7, 1, joined(PATH[:1]), 0, (77,), bytes(16)),
        say.Commit(7, 1, joined(PATH[:2]), 0, (1, 1), bytes(32)),
        say.Commit(7, 2, joined(PATH[:1]), 0, (1,), bytes(16)),
        say.Commit(7, 1, joined(PATH[:1]), -1, (1,), bytes(16)),
        say.Commit(7, 1, joined(PATH[:1]), 0, (1,), bytes(15)),
    ],
    ids=lambda message: type(message).__name__,
)
def test_what_no_client_may_say(others, wrong):
    """Undeclared layouts, slots that were never lent, numbers that do not fit: the connection ends, nothing leaks."""
    with Raw(others.socket) as raw:
        raw.declare()
        raw.declare(make_layout("two"), 2) if isinstance(wrong, say.Commit) else None
        raw.ask(say.Lend(1, 1, 4))
        raw.ask(say.Stage(2, (1,), joined(PATH), 100))
        assert raw.ask(wrong) is None
        until(lambda: len(others.store._books.leases) == 0, "its leases to be released")


def test_a_length_that_nobody_may_send(others):
    """A client that announces more than may be sent is let go before the node keeps any of it."""
    with Raw(others.socket) as raw:
        raw.sock.sendall(struct.pack("<I", say.MESSAGE_BYTES_MAX + 1))
        assert raw.hear() is None


def test_slots_of_others(others):
    """No client can commit or give back what was lent to another, nor commit a slot twice."""
    with Raw(others.socket) as one, Raw(others.socket) as two:
        for raw in (one, two):
            raw.declare()
        lent = one.ask(say.Lend(1, 1, 2))
        two.say(say.GiveBack(lent.slots))
        assert two.ask(say.Commit(2, 1, joined(chain("b", 1)), 0, lent.slots[:1], bytes(16))) is None
        committed = one.ask(say.Commit(3, 1, joined(chain("c", 1)), 0, lent.slots[:1], bytes(16)))
        assert committed.outcomes == ("hit",)
        assert one.ask(say.Commit(4, 1, joined(chain("d", 1)), 0, lent.slots[:1], bytes(16))) is None


def test_a_slot_goes_to_nobody_while_its_client_may_write(host):
    """A client that was let go but has not closed yet can write into its slots: no other block lies there."""
    with Raw(host.socket) as raw:
        raw.declare()
        lent = raw.ask(say.Lend(1, 1, 4))
        with mmap.mmap(raw.fd, host.store.memory_bytes) as mapped:
            raw.say(say.Stage(2, (9,), b"", 0))
            assert raw.hear() is None
            client = host.client()
            paths = [chain(f"fill {number}", 40) for number in range(8)]
            for path in paths:
                keep(client, path)
            for offset in lent.offsets:
                mapped[offset : offset + BLOCK_BYTES] = bytes(BLOCK_BYTES)
            assert fetch(client, paths[-1])[0] == 40
            client.close()
        assert [session.lent for session in host.server._sessions if session.role == "raw"] == [4]


def test_a_link_that_ends_during_a_copy(host):
    """A client whose link ends while it copies into a slot does no harm: the slot is its own until the copy is over."""
    client = host.client()
    client.ready(LAYOUT, 4)
    lent = []
    until(lambda: lent.extend(client.lend(LAYOUT, 2)) or lent, "slots to be lent")
    first = client._keeper.link
    first.end()
    until(lambda: client.up and client._keeper.link is not first, "another link")
    paths = [chain(f"fill {number}", 40) for number in range(8)]
    for path in paths:
        keep(client, path)
    for slot in lent:
        slot.view[:] = 0xA5
    assert fetch(client, paths[-1])[0] == 40
    assert client.commit(LAYOUT, chain("late", len(lent)), lent).wait(GUARD_SECONDS)
    until(lambda: host.server.clients == 1, "the first link to be gone")
    client.close()
    host.settle()


# -- clients that do not read, die, or stop ------------------------------------------------------------------------


def test_who_never_reads(others):
    """A client that asks and asks and never reads is let go, whatever else it has asked; others are served."""
    with Raw(others.socket) as raw:
        raw.declare()
        raw.ask(say.Lend(1, 1, 4))
        flood = b"".join(say.encode(say.Status(number)) for number in range(20_000))
        raw.sock.sendall(flood)
        (session,) = [each for each in others.server._sessions if each.role == "raw"]
        until(lambda: session._mute, "the node to give it up")
        assert session.leases == 0
        assert session.lent == 4
        heard = 0
        while raw.hear() is not None:
            heard += 1
        assert heard < 20_000


def test_a_client_that_is_killed(others):
    """What a killed client held is given back, though it was in the middle of a copy."""
    with process("hold", others.socket) as (child, said):
        assert said()["holds"] == 2
        assert len(others.store._books.leases) == 1
        child.kill()
        child.wait()
        until(lambda: others.server.clients == 1, "the node to notice")
        (left,) = others.server._sessions
        until(lambda: len(others.store._warm._lent) == left.lent, "slots to be given back")
        assert not others.store._books.leases


@pytest.mark.parametrize("lease_seconds", [0.2])
def test_a_client_that_is_stopped(tmp_path, lease_seconds):
    """A client that stops past its lease gets LATE or a miss, never other bytes, and writes into no block of others."""
    with Host(tmp_path, blocks=128, lease_seconds=lease_seconds) as host:
        client = host.client()
        with process("stopped", host.socket) as (child, said):
            said()
            until(lambda: os.waitid(os.P_PID, child.pid, os.WSTOPPED | os.WNOHANG | os.WNOWAIT), "it to stop")
            CLOCK.sleep(2 * lease_seconds)
            paths = [chain(f"fill {number}", 40) for number in range(6)]
            for path in paths:
                keep(client, path)
            assert client.unsaved(LAYOUT, chain("held", 4)) == 0
            child.send_signal(signal.SIGCONT)
            told = said()
            assert (told["loaded"], told["reasons"], told["right"], told["again"]) == (0, ["late"], True, 0)
            assert fetch(client, paths[-1])[0] == 40
            assert child.wait(GUARD_SECONDS) == 0
        client.close()
        host.settle()


def test_memory_cannot_be_cut(host):
    """No process can cut the memory that others map: touching what is gone would end them."""
    client = host.client()
    keep(client, PATH)
    with pytest.raises(OSError, match="not permitted"):
        os.ftruncate(host.store.memory_fd, 4096)
    assert fetch(client, PATH)[0] == len(PATH)


def test_a_node_whose_memory_could_be_cut(tmp_path, caplog):
    """A client does not map memory that might be cut under it."""
    fd = os.memfd_create("memory", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, 1 << 20)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "node.sock"))
        listener.listen()
        listener.settimeout(GUARD_SECONDS)
        client = NodeClient(tmp_path / "node.sock", **PATIENT)
        accepted, _ = listener.accept()
        socket.send_fds(accepted, [say.encode(say.Welcome(say.PROTOCOL, "test", 1, 1 << 20))], [fd])
        until(lambda: "not what it says" in caplog.text, "the reason in the log")
        client.close()
        accepted.close()
    os.close(fd)


def test_links_that_end_at_once_are_made_with_pauses(tmp_path):
    """A node that lets its client go at once, time after time, is not asked a thousand times a second."""
    with Host(tmp_path) as host:
        served = []
        admit = host.server._admit

        def admit_and_end(sock, inbox):
            served.append(1)
            admit(sock, inbox)
            sock.shutdown(socket.SHUT_RDWR)

        host.server._admit = admit_and_end
        client = NodeClient(host.socket, **PATIENT)
        until(lambda: served, "the first")
        CLOCK.sleep(0.5)
        client.close()
        assert len(served) < 10
        host.server._sessions.clear()


def test_large_answers_are_no_end(host, monkeypatch):
    """An answer that is too long to be sent is a failure of that question, not of the client."""
    client = host.client()
    ranks = [make_layout(rank=rank) for rank in range(4)]
    for layout in (LAYOUT, *ranks):
        keep(client, PATH, layout)
    monkeypatch.setattr(say, "MESSAGE_BYTES_MAX", 400)
    plan = client.match(ranks, PATH, prompt_tokens=tokens(PATH))
    assert (plan.blocks, plan.missing[0].reason) == (0, Reason.TIER_DOWN)
    monkeypatch.undo()
    assert client.up
    assert fetch(client, PATH)[0] == len(PATH)


def test_a_thousand_saves_leave_nothing(host):
    """After many small saves of two clients with the same blocks all slots are free or in use once."""
    one, two = host.client(), host.client()
    jobs = []
    for number in range(60):
        path = chain(f"{number}", 4)
        jobs += [client.save(LAYOUT, path, contents(LAYOUT, path)) for client in (one, two)]
    assert all(job.wait(GUARD_SECONDS) for job in jobs)
    one.close()
    two.close()
    host.settle()
    assert np.mean([len(job.outcomes) for job in jobs]) == 4


def test_nothing_follows_half_a_message(tmp_path):
    """When a message could be sent only in part, no other is sent behind it: a node would read both as one."""
    fd = os.memfd_create("memory", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, 1 << 20)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "node.sock"))
        listener.listen()
        listener.settimeout(GUARD_SECONDS)
        links = []
        asking = threading.Thread(
            target=lambda: links.append(
                Link(tmp_path / "node.sock", "test", wait_seconds=0.05, on_end=lambda link: None)
            )
        )
        asking.start()
        accepted, _ = listener.accept()
        accepted.recv(1 << 16)
        socket.send_fds(accepted, [say.encode(say.Welcome(say.PROTOCOL, "test", 1, 1 << 20))], [fd])
        asking.join()
        os.close(fd)
    (link,) = links
    messages = [say.Record(bytes([number]) * (1 << 20), b"", b"") for number in range(65, 73)]
    threads = [threading.Thread(target=link.tell, args=(message,)) for message in messages]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sent = bytearray()
    while received := accepted.recv(1 << 16):
        sent += received
    accepted.close()
    inbox = say.Inbox()
    assert all(say.client_says(body) in messages for body in inbox.feed(bytes(sent)))
    rest = bytes(inbox._bytes)
    assert any(say.encode(message).startswith(rest) for message in messages), "two messages are mixed"
