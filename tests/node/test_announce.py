"""What a node announces is what its tiers hold: from the start on, after every change, and to whoever comes late."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.node.making import MIB, keep, until
from tests.store.making import BLOCK_BYTES, LAYOUT, TOKENS_PER_BLOCK, chain, contents, make_layout, save
from thermocline.errors import SettingsError
from thermocline.node.announce import Announcer, open_announcer
from thermocline.node.server import NodeServer
from thermocline.settings import Settings
from thermocline.store.store import Store
from thermocline.tiers.disk import DiskTier
from thermocline.tiers.memory import MemoryTier
from thermocline.wire.events import BlockRemoved, BlockStored, read_batch
from thermocline.wire.subscriber import Subscriber

TOPIC = "kv@n@model"


class Picture:
    """What a router knows that hears everything: blocks by topic and medium. Behind an unknown parent it files none."""

    def __init__(self) -> None:
        self.held: dict[tuple[str, str], set[bytes]] = {}
        self.events: list[object] = []
        self.lock = threading.Lock()

    def __call__(self, source: str, _: int, payload: bytes) -> None:
        batch = read_batch(payload)
        assert not batch.skipped
        with self.lock:
            self.events += batch.events
            for event in batch.events:
                held = self.held.setdefault((source, event.medium), set())
                if isinstance(event, BlockStored):
                    assert event.block_tokens == TOKENS_PER_BLOCK
                    assert not event.tokens
                    if event.parent is None or event.parent in held:
                        held.update(event.hashes)
                else:
                    assert isinstance(event, BlockRemoved)
                    held.difference_update(event.hashes)

    def of(self, medium: str, topic: str = TOPIC) -> set[bytes]:
        with self.lock:
            return set(self.held.get((topic, medium), ()))


@pytest.fixture
def opened() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def place() -> str:
    return f"ipc://@kv-{os.urandom(6).hex()}"


@pytest.fixture
def hear(opened, place) -> Callable[[], Picture]:
    """Subscribe, as a router does that starts now."""

    def start() -> Picture:
        picture = Picture()
        subscriber = opened.enter_context(closing(Subscriber([place], picture)))
        opened.callback(lambda: none_failed(subscriber))
        return picture

    def none_failed(subscriber: Subscriber) -> None:
        assert subscriber.counts["failed"] == 0

    return start


def announced(opened: ExitStack, store: Store, place: str) -> Announcer:
    return opened.enter_context(closing(Announcer(store, "n", place)))


def in_tier(store: Store, name: str) -> set[bytes]:
    index = store._books.index
    return {key for key, node in index._by_key.get(LAYOUT.id, {}).items() if index.holds(node, name)}


def agrees(store: Store, picture: Picture) -> None:
    """The picture and the store's index are the same in the end."""
    until(lambda: picture.of("CPU") == in_tier(store, "memory"), "memory and its picture to be the same")
    if "disk" in store.usage():
        until(lambda: picture.of("STORAGE") == in_tier(store, "disk"), "disk and its picture to be the same")


def test_memory_and_disk_are_announced_as_they_change(opened, place, hear, make_host):
    """Saved, written down, evicted: a router that listens always knows what lies in memory and what on disk."""
    host = make_host(blocks=32, disk=True)
    picture = hear()
    announced(opened, host.store, place).declare(LAYOUT)
    for number in range(6):
        save(host.store, chain(f"text {number}", 10))
        agrees(host.store, picture)
    assert len(picture.of("STORAGE")) == 60
    assert 0 < len(picture.of("CPU")) <= 32
    assert any(isinstance(event, BlockRemoved) for event in picture.events)


def test_whoever_comes_late_is_told_all(opened, place, hear, make_host):
    """A router that starts after the blocks were stored learns all of them, parents first, also in many parts."""
    host = make_host(disk=True)
    announced(opened, host.store, place).declare(LAYOUT)
    keys = chain("long", 40)
    save(host.store, keys)
    for number in range(10):
        save(host.store, chain(f"branch {number}", 5, behind=keys[: 3 * number]), start=3 * number)
    agrees(host.store, hear())


def test_a_node_that_starts_announces_its_disk(opened, place, hear, make_host):
    """After a restart what was on disk is announced as soon as an engine says what its layout is."""
    host = make_host(disk=True)
    keys = chain("kept", 20)
    save(host.store, keys)
    host.restart()
    picture = hear()
    announcer = announced(opened, host.store, place)
    announcer.declare(LAYOUT)
    until(lambda: picture.of("STORAGE") == set(keys), "the disk to be announced")


def test_clients_declare_what_they_compute(opened, place, hear, make_host, tmp_path):
    """A client's saves are announced under its model's name, those of a second rank are not, each model has a topic."""
    host = make_host()
    host.server.close()
    announcer = announced(opened, host.store, place)
    host.server = NodeServer(host.store, host.socket, lease_seconds=60, announcer=announcer)
    picture, client = hear(), host.client()
    one, two = make_layout("one"), make_layout("two@v2")
    keys = chain("text", 4)
    for layout in (one, two, make_layout("three", rank=1)):
        keep(client, keys, layout)
    until(lambda: len(picture.held) == 2, "two models to be announced")
    until(lambda: picture.of("CPU", "kv@n@one") == picture.of("CPU", "kv@n@two@v2") == set(keys), "all of both")


def test_damage_is_announced(opened, place, hear, make_host):
    """A block that does not verify leaves the picture, at once."""
    host = make_host()
    picture = hear()
    announced(opened, host.store, place).declare(LAYOUT)
    keys = chain("text", 4)
    save(host.store, keys)
    agrees(host.store, picture)
    host.store._warm.block(LAYOUT.id, keys[3])[0][7] ^= 1
    host.store.found_damaged(LAYOUT, keys[3:])
    until(lambda: picture.of("CPU") == set(keys[:3]), "the damaged block to be gone")


STEPS = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 12), st.integers(1, 12)), max_size=12)


@settings(max_examples=12, deadline=None)
@given(STEPS)
def test_any_history_gives_the_same_picture(tmp_path_factory, steps):
    """After any saves and evictions a router that was there all along, and one that came late, know what is held."""
    place = f"ipc://@kv-{os.urandom(6).hex()}"
    with ExitStack() as opened, pytest.MonkeyPatch.context() as patch:
        patch.setattr("thermocline.wire.publisher.TELL_ALL_SECONDS", 0.01)
        patch.setattr("thermocline.node.announce.TOLD_AT_ONCE", 3)
        cold = DiskTier(tmp_path_factory.mktemp("disk"), 32 * MIB)
        store = opened.enter_context(closing(Store(MemoryTier(24 * BLOCK_BYTES), [cold])))
        early, late = Picture(), Picture()
        first = opened.enter_context(closing(Subscriber([place], early)))
        announced(opened, store, place).declare(LAYOUT)
        for number, shared, more in steps:
            keys = chain(f"text {number}", more, behind=chain("shared", shared))
            store.save(LAYOUT, keys, contents(LAYOUT, keys))
        assert store.flush(30)
        agrees(store, early)
        first.close()
        opened.enter_context(closing(Subscriber([place], late)))
        agrees(store, late)


def test_nothing_is_announced_unasked(make_host):
    """Without an endpoint there is no announcer; one that cannot be had is a mistake in the settings."""
    host = make_host()
    assert open_announcer(Settings(), host.store) is None
    with pytest.raises(SettingsError):
        open_announcer(Settings(events_endpoint="@tcp://*:5557"), host.store)


def test_a_node_process_announces(tmp_path, place, hear):
    """`thermocline node` with an events endpoint tells a router what its clients save."""
    from tests.vllm.node import Node

    picture = hear()
    with Node(tmp_path, memory_bytes=16 * MIB, events_endpoint=place, events_name="n") as node:
        from thermocline.node.client import NodeClient

        with closing(NodeClient(node.socket)) as client:
            assert client.wait_up(30)
            keys = chain("text", 4)
            keep(client, keys)
            until(lambda: picture.of("CPU") == set(keys), "the save to be announced")
