"""Publisher and subscriber over real sockets: all arrives in order, what was missed comes again, nothing waits."""

from __future__ import annotations

import os
import threading
from array import array
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
import zmq

from thermocline.clock import ManualClock, until
from thermocline.errors import SettingsError
from thermocline.wire.events import Batch, BlockStored, read_batch, write_batch
from thermocline.wire.publisher import END, Endpoint, Publisher
from thermocline.wire.subscriber import Subscriber

TOPIC = "kv@one@m"
WAIT_SECONDS = 10.0


def stored(number: int) -> BlockStored:
    return BlockStored((number,), None, array("I", range(16)), 16)


class Taken:
    """What was handed over, as (source, sequence, hash)."""

    def __init__(self) -> None:
        self.all: list[tuple[str, int, int]] = []

    def __call__(self, source: str, sequence: int, payload: bytes) -> None:
        (event,) = read_batch(payload).events
        self.all.append((source, sequence, event.hashes[0]))

    def has(self, count: int) -> bool:
        return until(lambda: len(self.all) >= count, WAIT_SECONDS, pause_seconds=0.005)


class Raw:
    """A publisher of our own making that a test plays: it says what it likes, and answers replays or not."""

    def __init__(self, address: str, replay: str | None = None) -> None:
        self.context = zmq.Context()
        self.pub = self.context.socket(zmq.XPUB)
        self.pub.connect(address)
        assert self.pub.poll(5000)
        self.pub.recv()
        if replay:
            self.router = self.context.socket(zmq.ROUTER)
            self.router.bind(replay)

    def say(self, sequence: int, topic: str = TOPIC, payload: bytes | None = None) -> None:
        told = write_batch(Batch(0.0, (stored(sequence),))) if payload is None else payload
        self.pub.send_multipart((topic.encode(), sequence.to_bytes(8, "big"), told))

    def close(self) -> None:
        self.context.destroy(linger=0)


@pytest.fixture
def place() -> Iterator[str]:
    """Where sockets may be: an ipc path of the kernel's own name space, so that nothing is left behind."""
    return f"ipc://@kv-{os.urandom(6).hex()}"


@pytest.fixture
def opened() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def closing(opened: ExitStack, it):
    opened.callback(it.close)
    return it


def linked(opened: ExitStack, place: str, **options) -> tuple[Publisher, Taken]:
    """A publisher that is heard: what it says from now on arrives."""
    taken, there = Taken(), threading.Event()

    def tell_all() -> Iterator[None]:
        there.set()
        yield

    closing(opened, Subscriber([place], taken))
    publisher = closing(opened, Publisher(place, tell_all=tell_all, **options))
    assert there.wait(WAIT_SECONDS)
    return publisher, taken


def test_batches_arrive_in_order(opened, place):
    """What is published arrives once, in order and numbered, under the name that the topic gives."""
    publisher, taken = linked(opened, place)
    for number in range(500):
        assert publisher.publish(TOPIC, [stored(number)])
    assert taken.has(500)
    assert taken.all == [(TOPIC, number, number) for number in range(500)]


def test_topics_are_numbered_apart(opened, place):
    """A node speaks of several models: each topic has numbers of its own, so no gap is seen in either."""
    publisher, taken = linked(opened, place)
    for number in range(10):
        publisher.publish(f"kv@node@m{number % 2}", [stored(number)])
    assert taken.has(10)
    assert taken.all == [(f"kv@node@m{number % 2}", number // 2, number) for number in range(10)]


def test_a_plain_topic_is_known_by_its_socket(opened, place):
    """A topic that names nobody is of the endpoint over which it came."""
    publisher, taken = linked(opened, place)
    publisher.publish("kv", [stored(1)])
    assert taken.has(1)
    assert taken.all == [(place, 0, 1)]


def test_what_was_said_before_comes_in_a_replay(opened, place):
    """Who comes late gets everything from the first batch on, in order, if told where to ask."""
    replay = place + "-replay"
    publisher = closing(opened, Publisher(place, replay))
    for number in range(50):
        publisher.publish(TOPIC, [stored(number)])
    taken = Taken()
    subscriber = closing(opened, Subscriber([place], taken))
    subscriber.replay_from("one", replay)  # the name in the topic
    sent = iter(range(50, 10_000))
    assert until(
        lambda: publisher.publish(TOPIC, [stored(next(sent))]) and taken.all, WAIT_SECONDS, pause_seconds=0.005
    )
    count = next(sent)
    assert until(lambda: len(taken.all) == count, WAIT_SECONDS, pause_seconds=0.005)
    assert taken.all == [(TOPIC, number, number) for number in range(count)]
    assert subscriber.counts["replays"] == subscriber.counts["replayed"] == 1
    assert subscriber.counts["gaps"] == 0


def test_who_subscribes_is_told_all_that_is_held(opened, place):
    """A router that comes late, or a second one, learns at once what is held now; no replay is needed."""
    clock = ManualClock()
    held = [1, 2, 3]
    told: list[int] = []

    def tell_all() -> Iterator[None]:
        told.append(len(held))
        for number in tuple(held):  # it may still be under way when more is held
            publisher.publish(TOPIC, [stored(number)])
            yield

    publisher = closing(opened, Publisher(place, tell_all=tell_all, clock=clock))
    first = Taken()
    subscriber = Subscriber([place], first)
    assert first.has(3)
    subscriber.close()
    held.append(4)
    clock.sleep(5)
    second = Taken()
    closing(opened, Subscriber([place], second))
    assert second.has(4)
    assert [number for _, _, number in second.all] == held
    assert told == [3, 4]


def test_a_full_queue_drops_and_shows_it_as_a_gap(opened, place):
    """Nobody ever waits to publish: what finds no room is dropped, counted, and missing in the numbers."""
    gate, entered = threading.Event(), threading.Event()

    def tell_all() -> Iterator[None]:
        entered.set()
        gate.wait(WAIT_SECONDS)
        yield

    taken = Taken()
    subscriber = closing(opened, Subscriber([place], taken))
    publisher = closing(opened, Publisher(place, tell_all=tell_all, queued_max=4))
    assert entered.wait(WAIT_SECONDS)
    kept = [publisher.publish(TOPIC, [stored(number)]) for number in range(6)]
    gate.set()
    assert kept == [True] * 4 + [False] * 2
    assert publisher.dropped == 2
    assert taken.has(4)
    assert publisher.publish(TOPIC, [stored(6)])
    assert taken.has(5)
    assert [sequence for _, sequence, _ in taken.all] == [0, 1, 2, 3, 6]
    assert subscriber.counts["gaps"] == 1


def test_the_replay_is_vllms(opened, place):
    """A plain DEALER that follows vLLM's protocol gets what is kept, then the end; a malformed request gets nothing."""
    replay = place + "-replay"
    publisher = closing(opened, Publisher(place, replay, kept_max=3))
    for number in range(5):
        publisher.publish(TOPIC, [stored(number)])
    context = zmq.Context()
    opened.callback(context.destroy, linger=0)
    asker = context.socket(zmq.DEALER)
    opened.callback(asker.close, linger=0)
    asker.connect(replay)

    def answers() -> list[int]:
        asker.send_multipart((b"", (3).to_bytes(8, "big")))
        sequences = []
        while asker.poll(5000):
            empty, topic, sequence, _ = asker.recv_multipart()
            assert empty == b""
            if sequence == END:
                return sequences
            assert topic == TOPIC.encode()
            sequences.append(int.from_bytes(sequence, "big"))
        raise AssertionError("no end")

    asker.send_multipart((b"", b"bad"))
    asker.send_multipart((b"only one frame",))
    assert until(lambda: answers() == [3, 4], WAIT_SECONDS, pause_seconds=0.01)


def test_a_gap_is_closed_before_what_came_after_it(opened, place):
    """What was lost on the way is asked for, and what came meanwhile is handed on behind it."""
    replay = place + "-replay"
    taken = Taken()
    subscriber = closing(opened, Subscriber([place], taken, replays={TOPIC: replay}))
    raw = closing(opened, Raw(place, replay))
    for sequence in (0, 1, 5, 6):
        raw.say(sequence)
    assert raw.router.poll(5000)
    asker, _, first = raw.router.recv_multipart()
    assert int.from_bytes(first, "big") == 2
    raw.say(7)
    for sequence in (2, 3, 4, 5):
        payload = write_batch(Batch(0.0, (stored(sequence),)))
        raw.router.send_multipart((asker, b"", TOPIC.encode(), sequence.to_bytes(8, "big"), payload))
    raw.router.send_multipart((asker, b"", b"", END, b""))
    assert taken.has(8)
    assert [number for _, _, number in taken.all] == list(range(8))
    assert subscriber.counts["gaps"] == 0


def test_a_replay_that_does_not_come_is_not_waited_for(opened, place):
    """Where nobody answers, what is there is handed on after a moment, and the gap is counted."""
    taken, clock = Taken(), ManualClock()
    subscriber = closing(opened, Subscriber([place], taken, replays={TOPIC: place + "-nobody"}, clock=clock))
    raw = closing(opened, Raw(place))
    for sequence in (0, 3, 4):
        raw.say(sequence)
    assert until(lambda: subscriber.counts["replays"] == 1, WAIT_SECONDS, pause_seconds=0.005)
    clock.sleep(5)
    assert taken.has(3)
    assert [sequence for _, sequence, _ in taken.all] == [0, 3, 4]
    assert subscriber.counts["late"] == subscriber.counts["gaps"] == 1


def test_a_number_that_goes_back_is_a_new_life(opened, place):
    """An instance that starts again begins at 0, and is heard at once."""
    taken = Taken()
    subscriber = closing(opened, Subscriber([place], taken))
    raw = closing(opened, Raw(place))
    for sequence in (0, 1, 2, 0, 1):
        raw.say(sequence)
    assert taken.has(5)
    assert [sequence for _, sequence, _ in taken.all] == [0, 1, 2, 0, 1]
    assert subscriber.counts["gaps"] == 0


def test_garbage_and_a_failing_taker_end_nothing(opened, place):
    """Frames that are no message are counted; a batch that its taker cannot take in does not stop the next."""
    taken = Taken()
    subscriber = closing(opened, Subscriber([place], taken))
    raw = closing(opened, Raw(place))
    raw.pub.send_multipart((b"kv",))
    raw.pub.send_multipart((b"kv", b"short", b""))
    raw.pub.send_multipart((b"x" * 600, bytes(8), b""))
    raw.say(0, payload=b"\xc1")
    raw.say(1)
    assert taken.has(1)
    assert taken.all == [(TOPIC, 1, 1)]
    assert (subscriber.counts["malformed"], subscriber.counts["failed"]) == (3, 1)


def test_sources_are_bounded(opened, place, monkeypatch):
    """Topics without end do not fill the memory: of the oldest it is forgotten how far they were, and all are heard."""
    monkeypatch.setattr("thermocline.wire.subscriber.SOURCES_MAX", 4)
    taken = Taken()
    subscriber = closing(opened, Subscriber([place], taken))
    raw = closing(opened, Raw(place))
    for number in range(10):
        raw.say(0, topic=f"kv@n{number}@m")
    assert taken.has(10)
    assert subscriber.counts["forgotten"] == 6
    assert len(subscriber._streams) == 4


def test_closed_is_closed(opened, place):
    """After close nothing is taken any more, nothing raises, and a second close does nothing."""
    publisher, _ = linked(opened, place)
    publisher.close()
    publisher.close()
    publisher.tell_again()
    assert not publisher.publish(TOPIC, [stored(1)])


@pytest.mark.parametrize(
    ("text", "binds"),
    [
        ("tcp://127.0.0.1:5557", False),
        ("@tcp://127.0.0.1:5557", True),
        ("@tcp://[::1]:5557", True),
        ("@!tcp://10.0.0.5:5557", True),
        ("tcp://10.0.0.5:5557", False),
        (">ipc:///run/kv", False),
    ],
)
def test_endpoints(text, binds):
    """A leading @ binds, a leading > connects, and ! means an address that other machines reach."""
    assert Endpoint.parse(text, binds=False) == Endpoint(text.lstrip("@>!"), binds)


@pytest.mark.parametrize("mark", ["", "!"])
@pytest.mark.parametrize("text", ["tcp://*:5557", "tcp://0.0.0.0:1", "tcp://[::]:1", "tcp://eth0:1"])
def test_nobody_listens_to_the_world(text, mark):
    """Binding to every address is refused with a hint: events tell token ids, and ask nobody who they are."""
    with pytest.raises(SettingsError) as refused:
        Endpoint.parse(f"@{mark}{text}", binds=False)
    assert refused.value.hint


@pytest.mark.parametrize("text", ["tcp://10.0.0.5:5557", "tcp://[fd00::5]:5557", "tcp://192.0.2.7:5557"])
def test_a_network_is_trusted_only_where_it_is_said(text):
    """An address that other machines reach is bound where a ! says that it is meant, and refused without."""
    assert Endpoint.parse(f"!{text}", binds=True) == Endpoint(text, binds=True)
    with pytest.raises(SettingsError) as refused:
        Endpoint.parse(text, binds=True)
    assert "@!tcp://" in refused.value.hint


@pytest.mark.parametrize(
    "text", ["", "tcp://", "tcp://host", "http://127.0.0.1:1", "127.0.0.1:1", "tcp://:1", "ipc://"]
)
def test_what_is_no_endpoint_is_refused(text):
    """A mistyped endpoint is a mistake in the settings, told at the start."""
    with pytest.raises(SettingsError):
        Endpoint.parse(text, binds=True)


def test_an_endpoint_in_use_is_refused(opened, place):
    """Two that bind at one place: the second one is told, and leaves nothing open."""
    closing(opened, Subscriber([place], Taken()))
    with pytest.raises(SettingsError):
        Subscriber([place], Taken())
    with pytest.raises(SettingsError):
        Publisher("@" + place)
