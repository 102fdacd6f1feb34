"""A client against a node in the same process: the store's verbs, with the same meaning."""

from __future__ import annotations

import gc
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conformance.faulty import flip, where
from tests.node.making import CLOCK, GUARD_SECONDS, LAYOUT, MIB, PATIENT, Host, fetch, keep, tokens, until
from tests.store.making import BLOCK_BYTES, chain, content, contents, make_layout
from thermocline.engines.reuse import _window
from thermocline.node import client as client_module
from thermocline.node.client import NodeClient
from thermocline.store.receipt import Reason
from thermocline.tiers.tier import Outcome

PATH = chain("a", 12)
OTHER = make_layout("other")


def fds():
    """How many descriptors this process has."""
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """One node and one client for many examples."""
    with Host(tmp_path_factory.mktemp("shared"), blocks=1024) as host:
        yield host, host.client()


@settings(max_examples=25)
@given(data=st.data(), blocks=st.integers(1, 12))
def test_what_is_loaded_is_what_was_saved(shared, data, blocks):
    """However a block's bytes are cut into pieces, on the way in and on the way out, they are the same bytes."""
    host, client = shared
    cut = st.lists(st.integers(0, BLOCK_BYTES), max_size=5).map(sorted)
    keys = chain(f"cut {data.draw(st.integers(0, 40))}", blocks)
    pieces = [np.split(content(LAYOUT, key), data.draw(cut)) for key in keys]
    job = client.save(LAYOUT, keys, pieces)
    assert job.wait(GUARD_SECONDS)
    assert set(job.outcomes) == {Outcome.HIT}
    plan = client.match([LAYOUT], keys, prompt_tokens=tokens(keys))
    into = [np.split(np.zeros(BLOCK_BYTES, np.uint8), data.draw(cut)) for _ in keys]
    loaded = client.load(plan, 0, into)
    assert (loaded.blocks, loaded.by_tier, loaded.missing) == (blocks, {"memory": blocks}, ())
    assert all(np.array_equal(np.concatenate(got), content(LAYOUT, key)) for got, key in zip(into, keys, strict=True))
    client.release(plan.lease)
    host.check()


def test_tiers_are_named(make_host):
    """A load says which tier each block came from, though all of them came through memory."""
    host = make_host(disk=True)
    keep(host.client(), PATH[:8])
    host.restart()
    client = host.client()
    assert fetch(client, PATH) == (8, {"disk": 8})
    assert fetch(client, PATH) == (8, {"memory": 8})
    keep(client, PATH, start=8)
    host.restart()
    client = host.client()
    assert client.prefetch([LAYOUT], PATH[:5], CLOCK.now() + GUARD_SECONDS).wait(GUARD_SECONDS)
    assert fetch(client, PATH) == (12, {"memory": 5, "disk": 7})


def test_others_find_nothing(host):
    """Blocks under another salt's keys, or of another layout, are never found; every missing block has its reason."""
    client = host.client()
    keep(client, PATH)
    assert fetch(client, chain("pepper", 12))[0] == 0
    assert fetch(client, PATH, OTHER)[0] == 0
    assert fetch(client, PATH, LAYOUT, OTHER)[0] == 0
    plan = client.match([OTHER], PATH, prompt_tokens=tokens(PATH))
    assert [(part.start, part.stop, part.reason) for part in plan.missing] == [(0, 12, Reason.OTHER_LAYOUT)]


def test_two_clients_share(host):
    """What one engine saved another loads, and what both save is kept once."""
    one, two = host.client(), host.client()
    keep(one, PATH[:6])
    assert fetch(two, PATH) == (6, {"memory": 6})
    assert two.unsaved(LAYOUT, PATH) == 6
    assert set(keep(two, PATH).outcomes) == {Outcome.HIT}
    assert fetch(one, PATH) == (12, {"memory": 12})
    assert host.store.usage()["memory"].blocks == 12


def test_windows_of_a_plan(host):
    """A plan can be loaded in windows, as an engine with little memory of its own does."""
    client = host.client()
    keep(client, PATH)
    plan = client.match([LAYOUT], PATH, prompt_tokens=tokens(PATH))
    for start in range(0, 12, 5):
        window = _window(plan, start, min(12, start + 5), 0.0)
        into = [[np.zeros(BLOCK_BYTES, np.uint8)] for _ in range(window.blocks)]
        assert client.load(window, 0, into).by_tier == {"memory": window.blocks}
        assert all(np.array_equal(got[0], content(LAYOUT, key)) for got, key in zip(into, window.keys, strict=True))
    with pytest.raises(ValueError, match="12 blocks"):
        client.load(plan, 0, [])
    client.release(plan.lease)
    client.release(plan.lease)
    late = client.load(plan, 0, [[np.zeros(BLOCK_BYTES, np.uint8)] for _ in PATH])
    assert (late.blocks, late.missing[0].reason) == (0, Reason.LATE)


def test_prefetch(make_host):
    """A prefetch has in memory what the disk holds; what nobody holds is a miss."""
    host = make_host(disk=True)
    keep(host.client(), PATH[:8])
    host.restart()
    client = host.client()
    job = client.prefetch([LAYOUT], PATH, CLOCK.now() + GUARD_SECONDS)
    assert job.wait(GUARD_SECONDS)
    assert job.outcomes == [Outcome.HIT] * 8 + [Outcome.MISS] * 4
    assert client.unsaved(LAYOUT, PATH) == 8


@pytest.mark.parametrize("seconds", [float("inf"), float("nan"), -1.0, 1e300])
def test_a_prefetch_of_any_time_harms_no_tier(make_host, seconds):
    """However long a client wants a prefetch to take, the disk serves the next load."""
    host = make_host(disk=True)
    keep(host.client(), PATH)
    host.restart()
    client = host.client()
    assert client.prefetch([LAYOUT], PATH[:2], CLOCK.now() + seconds).wait(GUARD_SECONDS)
    assert fetch(client, PATH)[0] == 12
    assert host.store.is_well("disk")


def test_nothing_is_left(tmp_path):
    """When client and node are closed there are no leases, no slots, no descriptors and no threads left."""
    (tmp_path / "first").mkdir()
    with Host(tmp_path / "first") as host:  # what is made once for all is made here
        keep(host.client(), PATH)
    gc.collect()
    before, threads = fds(), threading.active_count()
    with Host(tmp_path, disk=True) as host:
        for _ in range(3):
            client = host.client()
            client.ready(LAYOUT, 8)
            keep(client, PATH)
            client.stage([LAYOUT], PATH, prompt_tokens=tokens(PATH)).wait(GUARD_SECONDS)
            staging = client.stage([LAYOUT], PATH, prompt_tokens=tokens(PATH))
            staging.cancel()
            client.match([LAYOUT], PATH, prompt_tokens=tokens(PATH))
            client.close()
            client.close()
        host.settle()
    del host, client, staging

    def gone():
        gc.collect()  # what was closed is unmapped with the last object that has seen it
        return fds() <= before and threading.active_count() <= threads

    until(gone, "descriptors and threads to be gone")


def test_staged_and_cancelled(host):
    """A staging that is cancelled, before or after its answer, holds no lease."""
    client = host.client()
    keep(client, PATH)
    early = client.stage([LAYOUT], PATH, prompt_tokens=tokens(PATH))
    early.cancel()
    late = client.stage([LAYOUT], PATH, prompt_tokens=tokens(PATH))
    assert late.wait(GUARD_SECONDS)
    assert late.plan().blocks == 12
    assert len(host.store._books.leases) >= 1
    late.cancel()
    until(lambda: len(host.store._books.leases) == 0, "leases to be released")


def test_pieces_that_are_no_block_cost_no_slot(host):
    """A save of pieces that do not fit raises, and the slots it would have taken serve the next save."""
    client = host.client()
    client.ready(LAYOUT, 4)
    for _ in range(40):
        with pytest.raises(ValueError, match="broadcast"):
            client.save(LAYOUT, PATH[:1], [[np.zeros(2 * BLOCK_BYTES, np.uint8)]])
    assert set(keep(client, PATH).outcomes) == {Outcome.HIT}
    assert client.commit(LAYOUT, PATH, []).wait(GUARD_SECONDS)
    assert client.flush(GUARD_SECONDS)


def test_slots_that_arrive_late_are_not_lost(host, monkeypatch):
    """Slots lent to a client that has given the node up for the moment are there when it comes back."""
    client, lend, go = host.client(), host.store.lend, threading.Event()
    monkeypatch.setattr(host.store, "lend", lambda *asked: go.wait(GUARD_SECONDS) and lend(*asked))
    client.ready(LAYOUT, 8)
    client.late(CLOCK.now())
    assert not client.up
    go.set()
    until(lambda: client.up, "the client to be back")
    (session,) = host.server._sessions
    assert session.lent == 8
    assert len(client.lend(LAYOUT, 8)) == 8


def test_room_is_ready_after_a_restart(make_host):
    """What was to be kept ready for saves is, as soon as another life of the node is attached."""
    host = make_host(disk=True)
    client = host.client()
    client.ready(LAYOUT, 8)
    host.restart()
    until(lambda: len(client._room.get(LAYOUT.id, ())) == 8, "slots to be lent")


def test_a_full_share_is_no_end(make_host):
    """Saves of more blocks than a client may be lent at a time are taken, one part after the other."""
    host = make_host(blocks=512)
    path = chain("long", 300)
    client = host.client()
    assert set(keep(client, path).outcomes) == {Outcome.HIT}
    assert fetch(client, path)[0] == 300


def test_room_is_lent_anew_once_it_was_used(make_host):
    """A client that never waits has room again when its blocks were committed, also where it may hold no more."""
    host = make_host(blocks=64)
    client = host.client(save_wait_seconds=0.0)
    client.ready(LAYOUT, 4)
    path = chain("steps", 24)
    for start in range(0, 24, 4):
        until(lambda: len(client._room.get(LAYOUT.id, ())) >= 4, "room for a step's blocks")
        job = client.save(LAYOUT, path[: start + 4], contents(LAYOUT, path[start : start + 4]), start=start)
        assert job.wait(GUARD_SECONDS)
        assert set(job.outcomes) == {Outcome.HIT}


def test_room_for_a_layout_without_saves_goes_back(host):
    """Slots lent for a layout that is used no more are given back, and another layout has them."""
    client = host.client()
    client.ready(LAYOUT, 6)
    until(lambda: len(client._room.get(LAYOUT.id, ())) == 6, "room")
    assert client.unready(LAYOUT) == 6
    until(lambda: not host.store._warm._lent, "the slots to be back")
    client.ready(OTHER, client.unready(LAYOUT))
    job = client.save(OTHER, PATH, contents(OTHER, PATH))
    assert job.wait(GUARD_SECONDS)
    assert set(job.outcomes) == {Outcome.HIT}


def test_memory_that_is_too_small(make_host):
    """With memory for a few blocks saves are cut short and loads are right."""
    host = make_host(blocks=8)
    client = host.client()
    keep(client, PATH)
    assert fetch(client, PATH)[0] <= 8
    for number in range(5):
        keep(client, chain(str(number), 5))
    assert fetch(client, chain("4", 5))[0] == 5


def test_blocks_that_never_fit_push_nothing_out(make_host):
    """A layout whose blocks are larger than memory can hold costs others nothing."""
    host = make_host(blocks=64)
    client = host.client()
    keep(client, PATH)
    giant = make_layout("giant", block_bytes=65 * BLOCK_BYTES)
    hopeless = host.client(save_wait_seconds=0.2)
    job = hopeless.save(giant, PATH[:1], contents(giant, PATH[:1]))
    assert job.wait(GUARD_SECONDS)
    assert job.outcomes == [Outcome.LATE]
    assert fetch(client, PATH)[0] == 12


def test_every_layout_gets_a_slot(make_host):
    """A client that saves many small blocks can save large ones too."""
    host = make_host(blocks=16384)
    client = host.client()
    large = make_layout("large", block_bytes=1 * MIB)
    client.ready(LAYOUT, 16384)
    until(lambda: client._room.get(LAYOUT.id), "slots for small blocks")
    assert set(keep(client, PATH[:1], large).outcomes) == {Outcome.HIT}


def test_half_of_memory_is_never_lent(make_host):
    """However many clients want slots, half of the memory holds blocks."""
    host = make_host(blocks=64)
    clients = [host.client() for _ in range(12)]
    for client in clients:
        client.ready(LAYOUT, 64)
        assert client.unsaved(LAYOUT, PATH) == 0  # answered after the slots
    assert 0 < len(host.store._warm._lent) <= 32


def test_plans_that_nobody_releases(make_host, clock):
    """Plans that an engine forgets cost neither client nor node anything once their leases ran out."""
    host = make_host(clock=clock)
    client = host.client(clock=clock)
    keep(client, PATH)
    for _ in range(20):
        assert client.match([LAYOUT], PATH, prompt_tokens=tokens(PATH)).blocks == 12
        clock.sleep(61.0)
    (session,) = host.server._sessions
    assert (len(client._held), session.leases) == (1, 1)


def test_a_lease_is_over_for_the_client_first(make_host, clock):
    """The client never counts on a lease for longer than the node keeps it."""
    host = make_host(clock=clock)
    client = host.client(clock=clock)
    keep(client, PATH)
    plan = client.match([LAYOUT], PATH, prompt_tokens=tokens(PATH))
    assert client.places(plan, 0).deadline <= min(lease.deadline for lease in host.store._books.leases._leases.values())
    clock.sleep(60.5)
    loaded = client.load(plan, 0, [[np.zeros(BLOCK_BYTES, np.uint8)] for _ in PATH])
    assert (loaded.blocks, loaded.missing[0].reason) == (0, Reason.LATE)


def test_a_node_that_is_gone(host, monkeypatch):
    """With nobody at the socket every verb answers at once, with its reason; what was staged is still read."""
    client = host.client()
    keep(client, PATH)
    plan = client.match([LAYOUT], PATH, prompt_tokens=tokens(PATH))
    places = client.places(plan, 0)
    memory = client.memory_of(places.incarnation)
    assert memory is not None
    monkeypatch.setattr(client_module, "LIFE_SECONDS", 4.0)  # time enough for what follows on a busy machine
    host.stop()
    until(lambda: not client.up, "the client to notice")
    assert client.load(plan, 0, [[np.zeros(BLOCK_BYTES, np.uint8)] for _ in PATH]).blocks == 12
    away = client.match([LAYOUT], PATH, prompt_tokens=tokens(PATH))
    assert (away.blocks, away.missing[0].reason) == (0, Reason.TIER_DOWN)
    assert set(keep(client, PATH).outcomes) == {Outcome.FAILED}  # slots that were lent may be tried yet
    assert client.unsaved(LAYOUT, PATH) == 0
    assert client.prefetch([LAYOUT], PATH, CLOCK.now() + 1).done
    client.damaged(LAYOUT, PATH)
    client.release(plan.lease)
    until(lambda: client.memory_of(places.incarnation) is None, "its memory to be let go")


def test_places_of_a_stranger(host):
    """Places that lie outside of memory, or of a life that nobody knows, are a miss."""
    client = host.client()
    keep(client, PATH)
    plan = client.match([LAYOUT], PATH, prompt_tokens=tokens(PATH))
    places, into = client.places(plan, 0), [[np.zeros(BLOCK_BYTES, np.uint8)] for _ in PATH]
    assert client.fetch(replace(places, incarnation=1), into).missing[0].reason is Reason.TIER_DOWN
    for offset in (-1, 1 << 60, host.store.memory_bytes - 1):
        wrong = replace(places, offsets=(offset,) * 12)
        assert client.fetch(wrong, into).missing[0].reason is Reason.CORRUPT
    shifted = replace(places, offsets=places.offsets[1:] + places.offsets[:1])
    assert client.fetch(shifted, into).blocks == 0
    client.release(plan.lease)


def test_a_damaged_slot_is_found_and_dropped(host):
    """A block that does not verify is CORRUPT, the node drops it, and the next save brings it back."""
    client = host.client()
    keep(client, PATH)
    host.store._warm.block(LAYOUT.id, PATH[4])[0][7] ^= 1
    plan = client.match([LAYOUT], PATH, prompt_tokens=tokens(PATH))
    loaded = client.load(plan, 0, [[np.zeros(BLOCK_BYTES, np.uint8)] for _ in PATH])
    client.release(plan.lease)
    assert (loaded.blocks, loaded.missing[0].reason) == (4, Reason.CORRUPT)
    until(lambda: fetch(client, PATH) == (4, {"memory": 4}), "the node to drop it")
    host.check()
    keep(client, PATH)
    assert fetch(client, PATH)[0] == 12


def test_damage_on_disk_is_the_reason(make_host):
    """What does not verify on its way up is CORRUPT in the receipt, not late, and what lies before it is loaded."""
    host = make_host(disk=True)
    keep(host.client(), PATH)
    host.restart()
    segment, offset, _ = where(host.store._books.tier("disk"), LAYOUT.id, PATH[5])
    flip(segment, offset + 4096)
    plan = host.client().match([LAYOUT], PATH, prompt_tokens=tokens(PATH))
    assert (plan.blocks, plan.missing[0].start, plan.missing[0].reason) == (5, 5, Reason.CORRUPT)


def test_a_slow_disk_is_no_sick_node(make_host, monkeypatch):
    """A promotion that takes longer than it may leaves its request without, and the node in use."""
    host = make_host(disk=True)
    keep(host.client(), PATH)
    host.restart()
    monkeypatch.setattr("thermocline.store.store.LOAD_SECONDS_MAX", 0.1)
    host.store._load_seconds_max = 0.1
    load, go = host.store._mover._load, threading.Event()
    host.store._mover._load = lambda *asked: go.wait(GUARD_SECONDS) and load(*asked)
    client = NodeClient(host.socket, **{**PATIENT, "wait_seconds": 0.3})
    host.clients.append(client)
    assert client.wait_up(GUARD_SECONDS)
    plan = client.match([LAYOUT], PATH, prompt_tokens=tokens(PATH))
    assert (plan.blocks, plan.missing[0].reason) == (0, Reason.LATE)
    assert client.up
    go.set()


@pytest.fixture
def slow(host, monkeypatch):
    """A client of a node that takes twice as long as is usual, and what the client suspected it of."""
    client = host.client(wait_seconds=0.1)
    keep(client, PATH)
    until(lambda: fetch(client, PATH)[0] == 12, "the client to know what computing costs")
    match, suspected = host.store.match, []
    monkeypatch.setattr(host.store, "match", lambda *asked, **more: CLOCK.sleep(0.2) or match(*asked, **more))
    monkeypatch.setattr(client._keeper, "suspect", suspected.append)
    return client, suspected


def test_a_slow_answer_is_waited_for_where_that_is_worth_it(slow):
    """For a prompt that takes minutes to compute a hit may come later than is usual, and the node stays in use."""
    client, suspected = slow
    assert fetch(client, PATH) == (12, {"memory": 12})
    assert not suspected


def test_a_slow_answer_that_brings_nothing_is_one_too_many(slow):
    """A node that took longer than is usual and has nothing is left alone: no request pays for that again and again."""
    client, suspected = slow
    assert fetch(client, chain("stranger", 12))[0] == 0
    assert len(suspected) == 1


def test_patience_is_never_more_than_was_measured(host):
    """What a short prompt costs to compute says nothing about a long one: the node is not waited for any longer."""
    client = host.client(wait_seconds=0.001)
    client._computing = (100, 2.0)
    assert client._patience(100) == client._patience(100_000) == pytest.approx(0.1)
    assert client._patience(50) == pytest.approx(0.05)
    client._computing = (100, 1000.0)
    assert client._patience(100) == 1.0
    assert client._patience(1) == pytest.approx(0.5)
