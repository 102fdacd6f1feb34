"""Events on their way to the index, and what is said of them."""

from __future__ import annotations

import logging
from array import array
from collections import Counter

import pytest

from thermocline.clock import ManualClock
from thermocline.fleet.books import Fleet
from thermocline.fleet.index import FleetIndex
from thermocline.fleet.instance import Instance
from thermocline.fleet.wiring import EVIDENCE
from thermocline.gateway.door import Door
from thermocline.gateway.hearing import Hearing
from thermocline.gateway.observe import Observer
from thermocline.gateway.rules import Rules
from thermocline.gateway.standing import Standing
from thermocline.metrics import Metrics
from thermocline.wire.events import Batch, BlockStored, write_batch

A, B = Instance("a", "http://h:1", node="n"), Instance("b", "http://h:2/", node="n")
TOKENS = array("I", range(64))


def _stored(medium="GPU"):
    return write_batch(Batch(1.0, (BlockStored((1, 2, 3, 4), None, TOKENS, 16, medium),)))


@pytest.fixture
def index():
    return FleetIndex(1000)


@pytest.fixture
def hearing(index):
    hearing = Hearing(index, {"tcp://x:1": "b"})
    hearing.now_there([(0, A), (1, B)])
    return hearing


@pytest.mark.parametrize(
    ("source", "held"),
    [
        ("kv@a@m", [64, 0]),
        ("kv@http://h:2@m", [0, 64]),
        ("tcp://x:1", [0, 64]),
        ("kv@n@m", [64, 64]),
        ("kv@other@m", [0, 0]),
    ],
)
def test_whose_events(index, hearing, source, held):
    """A topic names its instance by name or URL, a socket of its own too; a node's events are true of all of it."""
    hearing.take(source, 0, _stored("CPU" if "@n@" in source else "GPU"))
    assert [sum(index.blocks_of(slot)) * 16 for slot in (0, 1)] == held
    assert hearing.counts == Counter({"batches": 1} if any(held) else {"unknown": 1})


def test_an_engine_is_lost_and_its_node_goes_on(index, hearing):
    """What a node told of an instance is true when its engine is gone, until the instance leaves for good."""
    door = Door(index, Fleet(), policy="least_loaded", secret=b"s" * 32)
    door.joined(0, A)
    hearing.take("kv@n@m", 0, _stored("CPU"))
    hearing.take("kv@a@m", 0, _stored())
    assert index.blocks_of(0) == (4, 4, 0)
    door.lost(0)
    assert index.blocks_of(0) == (0, 4, 0)
    hearing.take("kv@n@m", 1, _stored("STORAGE"))
    assert index.blocks_of(0) == (0, 4, 4)
    door.left(0)
    door.close()
    assert index.blocks_of(0) == (0, 0, 0)


def test_what_is_no_batch(index, hearing):
    """Bytes that are no batch are counted, and so is what was lost for good; the past of a newcomer is not lost."""
    hearing.take("kv@a@m", 0, b"\xc1")
    for sequence in (7, 11):
        hearing.take("kv@a@m", sequence, write_batch(Batch(1.0, ())))
    assert hearing.counts == Counter(malformed=1, batches=2, lost=3)


def test_those_that_left(index, hearing):
    """What an instance says that is gone is not taken for another's."""
    hearing.now_there([(0, B)])
    hearing.take("kv@a@m", 0, _stored())
    assert hearing.counts == Counter(unknown=1)
    assert index.blocks == 0


class _Listening:
    alive = True

    def __init__(self):
        self.counts = Counter(gaps=2)


def test_said_at_the_first_look(index, hearing, caplog):
    """An instance without events is told of once, at the first look already, and shows in /metrics."""
    observer, metrics = Observer(index), Metrics()
    standings = [Standing(slot, each, Rules(), ManualClock(1).now()) for slot, each in enumerate((A, B))]
    assert observer.wiring(standings[0]) == ""
    observer.hears(hearing.counts, _Listening())
    for _ in range(EVIDENCE):
        index.told(0, 0, 0)
    with caplog.at_level(logging.WARNING):
        observer.look(standings)
        observer.look(standings)
    assert [record.getMessage().split(":")[0] for record in caplog.records] == ["instance a"]
    assert [observer.wiring(each) for each in standings] == ["NO_EVENTS", "NEW"]
    observer.measure(metrics, standings)
    assert metrics.value("instance_wired", (("instance", "a"),)) == 0
    assert metrics.value("instance_wired", (("instance", "b"),)) == 1
    assert metrics.value("events_heard_total", (("stage", "socket"), ("outcome", "gaps"))) == 2
    assert metrics.value("events_listening") == 1
