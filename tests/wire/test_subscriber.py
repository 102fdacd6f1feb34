"""Whatever is lost on the way, and whenever an instance starts again, its taker gets every batch once and in order."""

from __future__ import annotations

import os
import threading
from contextlib import closing

import pytest
import zmq
from hypothesis import given, settings
from hypothesis import strategies as st

from thermocline.clock import until
from thermocline.wire.publisher import END
from thermocline.wire.subscriber import Subscriber

TOPIC = b"kv@one@m"
WAIT_SECONDS = 10.0
ARRIVES, LOST, RESTART = "arrives", "lost", "restart"


class Instance:
    """Numbers what it says, sends it unless it is to be lost, and keeps it all for replays of this life."""

    def __init__(self, place: str) -> None:
        self._context = zmq.Context()
        self._pub = self._context.socket(zmq.XPUB)
        self._pub.connect(place)
        self._router = self._context.socket(zmq.ROUTER)
        self._router.bind(place + "-replay")
        assert self._pub.poll(5000)
        self._pub.recv()
        self.life, self.said = 0, 0
        self.closing = False
        self._thread = threading.Thread(target=self._answer)
        self._thread.start()

    def payload(self, number: int) -> bytes:
        return b"%d %d" % (self.life, number)

    def say(self, *, lost: bool) -> None:
        number, self.said = self.said, self.said + 1
        if not lost:
            self._pub.send_multipart((TOPIC, number.to_bytes(8, "big"), self.payload(number)))

    def restart(self) -> None:
        self.life, self.said = self.life + 1, 0

    def _answer(self) -> None:
        while not self.closing:
            if self._router.poll(5):
                asker, empty, first = self._router.recv_multipart()
                for number in range(int.from_bytes(first, "big"), self.said):
                    frames = (asker, empty, TOPIC, number.to_bytes(8, "big"), self.payload(number))
                    self._router.send_multipart(frames)
                self._router.send_multipart((asker, empty, b"", END, b""))

    def close(self) -> None:
        self.closing = True
        self._thread.join()
        self._context.destroy(linger=0)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.sampled_from([ARRIVES, ARRIVES, LOST, RESTART]), max_size=40))
def test_nothing_is_missed_and_nothing_comes_twice(steps):
    """With a replay to ask, a taker gets all batches of every life whose start it hears, each once, in their order."""
    place = f"ipc://@kv-{os.urandom(6).hex()}"
    taken: list[tuple[int, int]] = []

    def take(source: str, sequence: int, payload: bytes) -> None:
        assert source.encode() == TOPIC
        life, number = map(int, payload.split())
        assert number == sequence
        taken.append((life, number))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("thermocline.wire.subscriber.REPLAY_SECONDS", WAIT_SECONDS)
        subscriber = Subscriber([place], take, replays={TOPIC.decode(): place + "-replay"})
        with closing(subscriber), closing(Instance(place)) as instance:
            expected: list[tuple[int, int]] = []

            def settled() -> bool:
                return until(lambda: taken == expected, WAIT_SECONDS, pause_seconds=0.002)

            for step in (*steps, ARRIVES):
                if step == RESTART:
                    # the last batch of a life has to be heard, or nobody could know of it
                    instance.say(lost=False)
                    expected = [*expected[: _lives(expected, instance.life)], *_life(instance)]
                    assert settled(), (taken, expected)
                    instance.restart()
                    instance.say(
                        lost=False
                    )  # a life that is first heard of further on than the last one went on with it
                else:
                    instance.say(lost=step == LOST)
            expected = [*expected[: _lives(expected, instance.life)], *_life(instance)]
            assert settled(), (taken, expected)
            assert subscriber.counts["gaps"] == subscriber.counts["late"] == subscriber.counts["failed"] == 0


def _life(instance: Instance) -> list[tuple[int, int]]:
    return [(instance.life, number) for number in range(instance.said)]


def _lives(expected: list[tuple[int, int]], life: int) -> int:
    return sum(each[0] < life for each in expected)


def test_a_replay_that_is_quicker_than_what_comes_live(monkeypatch):
    """What a replay has brought comes once more over the slower way: that is no new life, and is passed over."""
    monkeypatch.setattr("thermocline.wire.subscriber.REPLAY_SECONDS", WAIT_SECONDS)  # a busy machine answers late
    place = f"ipc://@kv-{os.urandom(6).hex()}"
    taken: list[int] = []
    replays = {TOPIC.decode(): place + "-replay"}
    subscriber = Subscriber([place], lambda _, number, __: taken.append(number), replays=replays)
    with closing(subscriber), closing(Instance(place)) as instance:
        for number in range(6):
            instance.say(lost=number != 2)  # the replay brings 0 to 5
        settled = until(lambda: taken == [0, 1, 2, 3, 4, 5], WAIT_SECONDS, pause_seconds=0.002)
        assert settled, (taken, subscriber.counts)
        for number in (3, 4, 5, 6):  # as if they had waited in the socket
            instance.said = number
            instance.say(lost=False)
        assert until(lambda: taken == [0, 1, 2, 3, 4, 5, 6], WAIT_SECONDS, pause_seconds=0.002), taken
        assert subscriber.counts["gaps"] == 0


def test_what_a_taker_says_is_not_logged(caplog):
    """A batch that cannot be taken in is told once, by the error's type and place; the next one is taken in."""
    place = f"ipc://@kv-{os.urandom(6).hex()}"
    taken: list[int] = []

    def take(_: str, number: int, __: bytes) -> None:
        taken.append(number)
        if number < 2:
            raise KeyError("the name of a block")

    with closing(Subscriber([place], take)), closing(Instance(place)) as instance:
        for _ in range(3):
            instance.say(lost=False)
        assert until(lambda: taken == [0, 1, 2], WAIT_SECONDS, pause_seconds=0.002)
    (told,) = [record.getMessage() for record in caplog.records if record.name == "thermocline.events"]
    assert "KeyError in take, line " in told
    assert "name of a block" not in caplog.text
