"""The chooser of production, without sockets: whatever happens to requests and instances, its books balance."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from array import array

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from thermocline.clock import ManualClock
from thermocline.fleet.books import Fleet
from thermocline.fleet.index import FleetIndex
from thermocline.fleet.instance import Instance
from thermocline.fleet.router import POLICIES
from thermocline.gateway.door import ASIDE_BYTES_MAX, Door
from thermocline.gateway.seam import Arrived, Decision, Trouble, Usage
from thermocline.metrics import Metrics
from thermocline.tokens.memo import Read
from thermocline.tokens.prompt import front_of
from thermocline.wire.events import Batch, BlockStored

PATHS = ("/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/embeddings")
SECRET = b"s" * 32


def _arrived(path="/v1/completions", prompt=(1, 2, 3), *, now=1.0, streamed=True, exclude=frozenset(), session=None):
    field = {"/v1/completions": "prompt", "/v1/chat/completions": "messages"}.get(path, "input")
    body = json.dumps({"model": "m", field: prompt}).encode()
    return Arrived(path, "m", body, b"", session, 8, streamed, exclude, now, front_of(body))


class Doors(RuleBasedStateMachine):
    """Requests and instances come and go in any order."""

    @initialize(policy=st.sampled_from(sorted(POLICIES)), count=st.integers(1, 3))
    def begin(self, policy, count):
        self.clock, self.index = ManualClock(100.0), FleetIndex(200)
        self.door = Door(self.index, Fleet(), policy=policy, secret=SECRET, clock=self.clock)
        self.there: set[int] = set()
        self.sent: list[tuple[Decision, bool]] = []
        for _ in range(count):
            self.join()

    @rule()
    def join(self):
        slot = next(number for number in range(len(self.there) + 1) if number not in self.there)
        if slot < 5:
            self.door.joined(slot, Instance(f"i{slot}", f"http://h:{slot + 1}", node="n" if slot % 2 else ""))
            self.there.add(slot)

    @precondition(lambda self: self.there)
    @rule(data=st.data(), path=st.sampled_from(PATHS), length=st.integers(1, 80), streamed=st.booleans())
    def choose(self, data, path, length, streamed):
        exclude = frozenset(data.draw(st.sets(st.sampled_from(sorted(self.there)))))
        prompt = list(range(length)) if path == PATHS[0] else [{"role": "user", "content": "x" * 40 * length}]
        session = data.draw(st.sampled_from([None, "one", "other"]))
        now = self.clock.now()
        asked = _arrived(path, prompt, now=now, streamed=streamed, exclude=exclude, session=session)
        if exclude == self.there:
            with pytest.raises(LookupError):
                self.door.choose(asked)
            return
        decision = self.door.choose(asked)
        assert decision.instance in self.there - exclude
        self.sent.append((decision, streamed))

    @rule(seconds=st.sampled_from([0.001, 0.1, 3.0, 100.0]))
    def late(self, seconds):
        self.clock.sleep(seconds)

    @precondition(lambda self: self.sent)
    @rule(data=st.data())
    def first_byte(self, data):
        self.door.first_byte(data.draw(st.sampled_from(self.sent))[0], self.clock.now())

    @precondition(lambda self: self.sent)
    @rule(data=st.data(), cached=st.sampled_from([None, 0, 16, 1 << 40]), again=st.booleans())
    def finish(self, data, cached, again):
        decision, streamed = self.sent.pop(data.draw(st.integers(0, len(self.sent) - 1)))
        usage = data.draw(st.sampled_from([None, Usage(100, cached, 3)]))
        outcome = self.door.finished(decision, self.clock.now(), usage)
        assert outcome is not None
        assert streamed or outcome.regret_seconds is None
        if again:
            assert self.door.finished(decision, self.clock.now(), usage) is None

    @precondition(lambda self: self.sent)
    @rule(data=st.data(), trouble=st.sampled_from(Trouble))
    def fail(self, data, trouble):
        decision, _ = self.sent.pop(data.draw(st.integers(0, len(self.sent) - 1)))
        self.door.failed(decision, self.clock.now(), trouble)

    @precondition(lambda self: self.there)
    @rule(data=st.data(), lost=st.booleans())
    def leave(self, data, lost):
        slot = data.draw(st.sampled_from(sorted(self.there)))
        if lost:
            self.door.lost(slot)
        else:
            self.door.left(slot)
            self.there.remove(slot)

    @precondition(lambda self: self.there)
    @rule(data=st.data(), sequence=st.integers(0, 5))
    def tell(self, data, sequence):
        event = BlockStored((sequence,), None, array("I", range(16)), 16)
        self.index.apply(data.draw(st.sampled_from(sorted(self.there))), Batch(1.0, (event,)), sequence)

    @invariant()
    def sound(self):
        self.index.check_integrity()

    def teardown(self):
        if hasattr(self, "door"):
            for decision, _ in self.sent:
                self.door.finished(decision, self.clock.now(), None)
            self.door.check_idle()
            self.door.close()


TestDoors = Doors.TestCase
TestDoors.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestDoors.__doc__ = (
    "Requests are sent, late, answered, failed; instances join, leave, are lost, and tell what they hold."
)
TestDoors.runTest.__doc__ = (
    "Whatever happens, nothing is sent where it may not be, and every booking is taken back once."
)


@pytest.fixture
def metrics():
    return Metrics()


@pytest.fixture
def make(metrics):
    made = []

    def make(**options):
        door = Door(FleetIndex(100), Fleet(), policy="least_loaded", secret=SECRET, metrics=metrics, **options)
        for slot in (0, 1):
            door.joined(slot, Instance(f"i{slot}", f"http://h:{slot + 1}"))
        made.append(door)
        return door

    yield make
    for door in made:
        door.close()


def test_what_cannot_be_learned(make, metrics, caplog):
    """An index that fails costs knowledge, not bookings, and is told of once."""
    door = make()
    door._index.learn = None  # no part of it can be made to fail from without
    with caplog.at_level(logging.ERROR):
        decisions = [door.choose(_arrived()) for _ in range(3)]
    assert len(caplog.records) == 1
    assert metrics.value("learning_failed_total") == 3
    for decision in decisions:
        door.finished(decision, 2.0, None)
    door.check_idle()


def test_early_events_teach_nothing(make):
    """The first byte of a stream of /v1/responses is no first token, so it is not taken for one."""
    door, text = make(), [{"role": "user", "content": "hello"}]
    for path, told in (("/v1/responses", None), ("/v1/chat/completions", 0.5)):
        decision = door.choose(_arrived(path, text, now=1.0))
        door.first_byte(decision, 1.5)
        assert door.finished(decision, 2.0, None).actual_seconds == told


class _Slow:
    """A reader that waits for a word."""

    def __init__(self):
        self.go_on = threading.Event()

    def read(self, prompt, grow, *, apart=()):
        self.go_on.wait(5)
        tokens = array("I", range(32))
        return Read(tokens, grow(None, tokens, 0))


def test_too_much_to_tokenise(make, metrics):
    """What waits to be tokenised is bounded, and what is late is not waited for: both are decided by their bytes."""

    async def main():
        reader = _Slow()
        door, long = make(reader=reader), _arrived(prompt="x" * (ASIDE_BYTES_MAX + 1))
        late = asyncio.ensure_future(door.choose(long))
        await asyncio.sleep(0)
        full = door.choose(long)
        assert isinstance(full, Decision)
        decisions = [full, await late]
        assert metrics.value("decisions_by_bytes_total", (("why", "full"),)) == 1
        assert metrics.value("decisions_by_bytes_total", (("why", "late"),)) == 1
        reader.go_on.set()
        for _ in range(1000):
            if not door._aside:
                break
            await asyncio.sleep(0.005)
        decisions.append(await door.choose(long))
        for decision in decisions:
            door.failed(decision, 2.0, Trouble.LOST)
        door.check_idle()

    asyncio.run(main())


def test_many_ids_are_read_aside(make):
    """A long list of token ids does not hold up the loop."""

    async def main():
        door = make()
        assert isinstance(door.choose(_arrived(prompt=[1] * 100)), Decision)
        aside = door.choose(_arrived(prompt=[1] * 50_000))
        assert not isinstance(aside, Decision)
        assert (await aside).instance in {0, 1}

    asyncio.run(main())


def _traced(door):
    return [json.loads(line) for line in door.recent.lines().splitlines()]


def test_answered_requests_are_a_trace(make):
    """Each answered request whose tokens are known is noted once: when it came, its length and its answer's."""
    clock = ManualClock(1000.0)
    door = make(clock=clock)
    prompts = ([*range(200)], [*range(128), 7, 8], [*range(200)])
    for number, prompt in enumerate(prompts):
        decision = door.choose(_arrived(prompt=prompt, now=clock.now()))
        clock.sleep(10.0)
        door.finished(decision, clock.now(), Usage(len(prompt), 0, 5 + number))
    rows = _traced(door)
    assert [(row["input_length"], row["output_length"]) for row in rows] == [(200, 5), (130, 6), (200, 7)]
    assert rows[0]["hash_ids"] == rows[2]["hash_ids"]
    assert rows[0]["hash_ids"][:2] == rows[1]["hash_ids"][:2]
    assert rows[0]["hash_ids"][2] != rows[1]["hash_ids"][2]
    assert [row["timestamp"] for row in rows] == [rows[0]["timestamp"] + 10_000 * at for at in range(3)]


def test_what_is_no_part_of_the_trace(make):
    """Not noted: what failed or was no success, and text without a tokenizer, whose tokens nobody knows."""
    door = make()
    door.failed(door.choose(_arrived()), 2.0, Trouble.LOST)
    door.finished(door.choose(_arrived()), 2.0, None)
    door.finished(door.choose(_arrived(prompt="text " * 100)), 2.0, Usage(100, 0, 1))
    assert _traced(door) == []
    door.finished(door.choose(_arrived()), 2.0, Usage(3, 0, 1))
    assert len(_traced(door)) == 1


def test_streams_that_tell_no_usage_are_part_of_the_trace(make):
    """Most clients do not ask for it: their prompts are noted, with answers of a length that is not known."""
    door = make()
    door.finished(door.choose(_arrived(prompt=[*range(100)])), 2.0, Usage(None, None, None))
    assert [(row["input_length"], row["output_length"]) for row in _traced(door)] == [(100, 0)]


def test_the_trace_keeps_salts_apart(make):
    """Equal prompts of two tenants share no number."""
    door = make()
    for salt in (b"one", b"two"):
        asked = msgspec.structs.replace(_arrived(prompt=[*range(100)]), salt=salt)
        door.finished(door.choose(asked), 2.0, Usage(100, 0, 1))
    first, second = _traced(door)
    assert not set(first["hash_ids"]) & set(second["hash_ids"])
