"""The doctor on planted conditions: real stores and light instances with one fault each, recordings of real vLLMs."""

from __future__ import annotations

import dataclasses
import http.client
import inspect
import json
import math
import random
import re
import threading
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conformance.faulty import Fault
from tests.gateway.fleet import Light, Route
from tests.lens.recordings import recorded
from tests.store.making import BLOCK_BYTES, LAYOUT, TOKENS_PER_BLOCK, flip_on_disk
from tests.store.test_planted import DISK_BYTES, OTHER, SLOW_DISK, TTL_SECONDS, World
from tests.store.test_receipts import joined, keys_of, serve, text
from thermocline.blocks.key import block_keys, root_key
from thermocline.clock import ManualClock, SystemClock, until
from thermocline.lens import checklist, doctor, observe
from thermocline.lens.diagnosis import HEALTHY, Condition, Diagnosis, render
from thermocline.lens.doctor import ENOUGH, diagnose
from thermocline.lens.observe import Ear, Kind, Watched, named, parse, watch
from thermocline.lens.ps import Routed
from thermocline.node import ask
from thermocline.store.receipt import Missing, Reason, Receipt
from thermocline.store.store import Store
from thermocline.tiers.memory import MemoryTier
from thermocline.wire.events import BlockStored, Event, Topic, write_topic
from thermocline.wire.publisher import Publisher
from thermocline.wire.subscriber import Subscriber

CLOCK = SystemClock()
PROMPT_TOKENS = 8 * TOKENS_PER_BLOCK + 1
SMALL_BYTES = 48 * BLOCK_BYTES


def conditions(found: Diagnosis) -> set[Condition]:
    """What was claimed."""
    return {each.condition for each in found.findings}


def prompts(count: int, *, first: int = 1000, tokens: int = PROMPT_TOKENS) -> list[np.ndarray]:
    """Prompts that share nothing."""
    return [text(first + at, tokens) for at in range(count)]


def watched(store: Store, receipts: Sequence[Receipt]) -> Watched:
    """A node with this store, as it is seen from outside."""
    store.measure()
    return Watched(kind=Kind.NODE, name="node", scrapes=(parse(store.metrics.text()),), receipts=tuple(receipts))


# -- stores with one fault each ----------------------------------------------------------------------------------------


@pytest.fixture
def world(tmp_path) -> Iterator[World]:
    """Memory of 64 blocks and a disk of 16 MiB, whose clock stands still and whose disk fails when told to."""
    world = World(tmp_path / "disk", ttl_seconds=TTL_SECONDS)
    yield world
    world.store.close(30)


@pytest.fixture
def memory_only() -> Iterator[Callable[..., Store]]:
    """A store without a colder tier."""
    with ExitStack() as stack:

        def make(memory_bytes: int = SMALL_BYTES, **options: object) -> Store:
            clock = ManualClock(1000.0)
            warm = MemoryTier(memory_bytes, clock=clock)
            warm.wait_ready()
            return stack.enter_context(closing(Store(warm, [], clock=clock, **options)))

        yield make


def short_ttl(world: World) -> None:
    """Sessions pause for longer than their blocks live."""
    for each in prompts(10):
        world.ask(each)
    world.clock.sleep(TTL_SECONDS + 1)
    for each in prompts(10):
        world.ask(each)


def stamped(world: World) -> None:
    """Each prompt begins with another time."""
    rest = prompts(1)[0]
    for at in range(10):
        world.ask(joined(text(2, 4), text(10 + at, 3), rest))


def too_large(world: World) -> None:
    """More conversations in turn than the disk holds."""
    turns = [text(5000 + at, 64 * TOKENS_PER_BLOCK + 1) for at in range(DISK_BYTES // BLOCK_BYTES // 64 + 8)]
    for _ in range(2):
        for each in turns:
            world.ask(each)


def damaged(world: World) -> None:
    """A bit of one block on disk is another one."""
    kept = prompts(4)
    for each in kept:
        world.ask(each)
    world.press()
    assert flip_on_disk(world.folder, keys_of(kept[0])[0])
    for each in kept:
        world.ask(each)


def dead_disk(world: World) -> None:
    """Every load from the disk fails."""
    kept = prompts(6)
    for each in kept:
        world.ask(each)
    world.press()
    for each in kept:
        world.ask(each, save=False, fault=Fault.FAIL)


def slow_answers(world: World) -> None:
    """The disk is late now and then, never so often that it is set aside."""
    kept = prompts(8)
    for at, each in enumerate(kept):
        world.ask(each)
        world.press()
        world.ask(each, save=False, fault=Fault.LATE if at % 2 else None)


def slow_disk(world: World) -> None:
    """What the disk holds is computed sooner than it is loaded."""
    kept = prompts(6)
    for each in kept:
        world.ask(each)
    world.press()
    world.store.costs = SLOW_DISK
    for each in kept:
        world.ask(each, save=False)


def other_model(world: World) -> None:
    """What is held is another model's."""
    for each in prompts(6):
        world.ask(each, OTHER)
    for each in prompts(6):
        world.ask(each)


def at_once(world: World) -> None:
    """The same prompts come again while they are saved."""
    for each in prompts(4):
        world.ask_while_saving(each)


def full_queue(world: World) -> None:
    """The disk takes no save."""
    world.schedule.chances = {Fault.DROP: 1.0}
    for each in prompts(12):
        world.save(each)
    world.schedule.chances = {}
    for each in prompts(12):
        world.ask(each, save=False)


def nothing_again(world: World) -> None:
    """Every prompt is new."""
    for each in prompts(ENOUGH):
        world.ask(each)


PLANTED: dict[Condition, Callable[[World], None]] = {
    Condition.TTL_TOO_SHORT: short_ttl,
    Condition.FRONT_DIFFERS: stamped,
    Condition.CAPACITY: too_large,
    Condition.CORRUPTION: damaged,
    Condition.TIER_DOWN: dead_disk,
    Condition.TIER_LATE: slow_answers,
    Condition.TIER_TOO_SLOW: slow_disk,
    Condition.LAYOUT_CHANGED: other_model,
    Condition.SAVED_TOO_LATE: at_once,
    Condition.SAVES_DROPPED: full_queue,
    Condition.NO_REUSE: nothing_again,
}


@pytest.mark.parametrize("condition", PLANTED, ids=str)
def test_a_fault_of_a_store_is_named(world, condition):
    """One fault planted in a real store of memory and disk is what the doctor finds, and nothing else."""
    PLANTED[condition](world)
    found = diagnose([watched(world.store, world.receipts)])
    assert conditions(found) == {condition}, render(found)
    (finding,) = found.findings
    assert finding.evidence
    assert render(found).endswith(f"so: {finding.action}")


def test_memory_alone_is_too_small(memory_only):
    """Without a colder tier, what is dropped and asked for again is named as a tier that is missing."""
    store = memory_only()
    receipts = [serve(store, f"{turn} {at}", each) for turn in range(3) for at, each in enumerate(prompts(8))]
    assert conditions(diagnose([watched(store, receipts)])) == {Condition.NO_OFFLOAD}


def test_plans_that_nobody_releases(memory_only):
    """A client that asks and never releases is found by the leases that ran out."""
    store = memory_only(1 << 20, lease_seconds=30.0)
    for at, each in enumerate(prompts(5)):
        serve(store, str(at), each)
    for each in prompts(5):
        assert store.match([LAYOUT], keys_of(each), prompt_tokens=len(each)).lease
    store._clock.sleep(31.0)
    receipts = [serve(store, f"again {at}", each) for at, each in enumerate(prompts(5))]
    assert conditions(diagnose([watched(store, receipts)])) == {Condition.LEAK}


def test_memory_full_of_what_nobody_comes_back_to(memory_only):
    """Where all returns come at once and memory is full of what is long idle, sessions hold it."""
    store, receipts = memory_only(), []
    for at, each in enumerate(prompts(ENOUGH)):
        receipts += [serve(store, f"{at} {again}", each) for again in range(2)]
        store._clock.sleep(60.0)
    assert conditions(diagnose([watched(store, receipts)])) == {Condition.IDLE_SESSIONS}


def test_blocks_larger_than_prompts(memory_only):
    """Prompts that end within their first block are always computed, and the block is named as the reason."""
    store = memory_only()
    receipts = [serve(store, str(at), text(1, TOKENS_PER_BLOCK - 2)) for at in range(ENOUGH)]
    assert conditions(diagnose([watched(store, receipts)])) == {Condition.BLOCKS_TOO_LARGE}


SLOW = Receipt(
    request="",
    prompt_tokens=1000,
    tokens_per_block=16,
    loaded_tokens=992,
    computed_tokens=8,
    by_tier={"disk": 992},
    missing=(Missing(62, 63, Reason.TAIL),),
    match_seconds=0.0,
    load_seconds=0.040,
    prefill_seconds=0.004,
    planned_load_seconds=0.005,
    planned_recompute_seconds=0.004,
    planned_cold_seconds=0.020,
)


def test_loads_that_take_longer_than_computing():
    """Loads measured to take longer than computing are named, where the plan had hoped for better."""
    few = [msgspec.structs.replace(SLOW, request=str(at)) for at in range(3)]
    quick = [msgspec.structs.replace(each, load_seconds=0.002) for each in few]
    at = Watched(kind=Kind.NODE, name="node", receipts=tuple(few))
    assert conditions(diagnose([at])) == {Condition.LOAD_SLOWER}
    assert conditions(diagnose([dataclasses.replace(at, receipts=tuple(quick))])) == set()


def test_a_store_that_is_well(world):
    """Conversations that grow and come back within what the tiers hold: nothing is found, and it is said plainly."""
    talks = prompts(20)
    for turn in range(4):
        for at, each in enumerate(talks):
            world.clock.sleep(1.0)
            world.ask(each)
            talks[at] = joined(each, text(100 * turn + at, 30))
    found = diagnose([watched(world.store, world.receipts)])
    assert not found.findings, render(found)
    assert render(found).endswith(HEALTHY)


def test_what_was_mended_is_not_held_against_it(world):
    """After as many good requests as are looked at, what was wrong before is not found any more."""
    stamped(world)
    assert conditions(diagnose([watched(world.store, world.receipts)])) == {Condition.FRONT_DIFFERS}
    for _ in range(ENOUGH):
        world.clock.sleep(1.0)
        world.ask(prompts(1)[0])
    assert not diagnose([watched(world.store, world.receipts)]).findings


def test_a_young_store_is_no_patient(memory_only):
    """After a few new prompts nothing is claimed, and it is said what would have to be known."""
    store = memory_only()
    found = diagnose([watched(store, [serve(store, str(at), each) for at, each in enumerate(prompts(5))])])
    assert not found.findings
    assert [each.question for each in found.unknown] == ["whether anything is reused"]


def test_a_node_that_does_not_answer(tmp_path):
    """A node or gateway that is not there is found; of a server, which may only have no metrics, it is unknown."""
    sources = named(["http://127.0.0.1:1"], [str(tmp_path / "node.sock")], [str(tmp_path / "route.sock")], None, ask)
    found = diagnose(watch(sources, 0.0, CLOCK))
    assert conditions(found) == {Condition.INSTANCE_DOWN}
    assert {each.where for each in found.findings} == {str(tmp_path / "node.sock"), str(tmp_path / "route.sock")}
    assert len(found.unknown) == len(sources)
    assert "healthy" not in render(diagnose(watch(sources[:1], 0.0, CLOCK)))


# -- recorded from real vLLMs ------------------------------------------------------------------------------------------

RECORDED = {
    "memory": {Condition.KV_MEMORY_BOUND},
    "no_prefix_cache": {Condition.PREFIX_CACHE_OFF},
    "evicted": {Condition.NO_OFFLOAD},
    "idle": {Condition.IDLE_SESSIONS},
    "overload": {Condition.OVERLOAD},
    "salted": {Condition.SALTED},
    "healthy": set(),
    "tiers": set(),
}


@pytest.mark.parametrize("name", RECORDED)
def test_what_a_real_vllm_recorded(name):
    """Metrics and KV events that a real vLLM gave under one condition lead to that condition, and nothing else."""
    found = diagnose(recorded(name))
    assert conditions(found) == RECORDED[name], render(found)


def test_a_node_that_no_engine_asks(memory_only):
    """A vLLM that computes beside a node that nobody asks is not wired to it."""
    node = watched(memory_only(), [])
    assert conditions(diagnose([*recorded("healthy"), node])) == {Condition.NOT_WIRED}


def test_without_events_a_vllm_does_not_say_why(memory_only):
    """Of misses in vLLM's own cache nothing is claimed without its KV events: what they need is named."""
    (server, _) = recorded("evicted")
    found = diagnose([server])
    assert not found.findings
    assert ["its KV events" in each.needs for each in found.unknown] == [True]


# -- light instances ---------------------------------------------------------------------------------------------------


class Mute(Light):
    """An instance whose own events nobody hears, also not afterwards."""

    @property
    def routed(self) -> str:
        return f"{self.name}={self.url}"


class Fleet:
    """Two light instances behind a gateway, and somebody who asks."""

    def __init__(
        self, folder: Path, stack: ExitStack, *flags: str, listens: bool = True, tells: bool = True, **light: float
    ) -> None:
        self.endpoint = f"ipc://{folder / 'events'}"
        told = self.endpoint if tells else f"ipc://{folder / 'nobody'}"
        blocks = int(light.pop("blocks", 4096))
        kind = Light if tells else Mute
        self.lights = [stack.enter_context(kind(folder, name, told, blocks, **light)) for name in ("a", "b")]
        listens = ("--events-listen", self.endpoint) if listens else ()
        self.route = stack.enter_context(Route(folder, self.lights, *listens, *flags))
        self.admin = folder / "route.sock"
        assert until(self._is_ready if listens and tells else self._is_up, 10.0, pause_seconds=0.02)

    def _is_up(self) -> bool:
        return all(each["state"] == "up" for each in self.route.instances().values())

    def _is_ready(self) -> bool:
        """Events of both arrive, too."""
        for each in self.lights:
            ask_light(each, text(int(CLOCK.wall() * 1e6), 33))
        return self._is_up() and all(each["blocks"]["device"] for each in self.route.instances().values())

    def ask(self, tokens: Sequence[int], *, session: str = "", salt: str = "", port: int = 0) -> None:
        body = {"model": "light", "prompt": [int(each) for each in tokens], "max_tokens": 1}
        headers = {"Content-Type": "application/json", **({"x-session-id": session} if session else {})}
        body |= {"cache_salt": salt} if salt else {}
        with closing(http.client.HTTPConnection("127.0.0.1", port or self.route.port, timeout=30)) as link:
            link.request("POST", "/v1/completions", json.dumps(body), headers)
            link.getresponse().read()

    def look(self, seconds: float = 0.0) -> Diagnosis:
        return diagnose(watch(named([], [], [str(self.admin)], None, ask), seconds, CLOCK))


@pytest.fixture
def make_fleet(tmp_path):
    """Fleets, ended after the test."""
    with ExitStack() as stack:
        yield lambda *flags, **light: Fleet(tmp_path, stack, *flags, **light)


def talk(fleet: Fleet, turns: int = 4, talks: int = 8) -> None:
    """Conversations that grow."""
    texts = [[*each] for each in prompts(talks, tokens=200)]
    for turn in range(turns):
        for at, each in enumerate(texts):
            fleet.ask(each)
            each += [*text(9000 + 100 * turn + at, 64)]


def test_a_fleet_that_is_well_until_one_is_gone(make_fleet):
    """Of two light instances that tell their events nothing is found; once one is killed, it is that alone."""
    fleet = make_fleet()
    talk(fleet)
    found = fleet.look()
    assert not found.findings, render(found)
    assert found.hits
    fleet.lights[1].kill()

    def is_found() -> bool:
        fleet.ask(text(int(CLOCK.wall() * 1e6), 33))
        return fleet.route.instances()["b"]["state"] != "up"

    assert until(is_found, 10.0, pause_seconds=0.02)
    found = fleet.look()
    assert conditions(found) == {Condition.INSTANCE_DOWN}
    assert any("metrics" in each.needs for each in found.unknown)


def test_a_fleet_without_events(make_fleet):
    """A gateway that hears no events is found, though its guesses from what it sent are good."""
    fleet = make_fleet(listens=False)
    talk(fleet)
    assert conditions(fleet.look()) == {Condition.EVENTS_MISSING}


def test_a_policy_that_ignores_what_is_held(make_fleet):
    """Round robin sends conversations away from what is held of them."""
    fleet = make_fleet("--policy", "round_robin")
    talk(fleet, talks=7)
    assert conditions(fleet.look()) == {Condition.ROUTED_AWAY}


def announcing(fleet: Fleet, events: Callable[[int], list[Event]], count: int = 50) -> None:
    """Events in the name of both instances, whose own nobody hears; and requests for texts of these numbers."""
    with closing(Publisher(fleet.endpoint)) as publisher:

        def tell(at: int, seconds: float = 10.0) -> bool:
            before = heard()
            for each in fleet.lights:
                publisher.publish(write_topic(Topic(each.name, "light")), events(at))
            return until(lambda: heard() >= before + 2, seconds, pause_seconds=0.005)

        def heard() -> float:
            return fleet.route.counted('events_heard_total{stage="index",outcome="batches"}')

        assert until(lambda: tell(0, 0.2), 10.0, pause_seconds=0.0)  # what is said before somebody listens is lost
        assert all(tell(at) for at in range(1, count))
    for at in range(count):
        fleet.ask(text(at, 65))


def stored(tokens: np.ndarray, block_tokens: int = 16) -> list[Event]:
    """The event of the whole blocks of a text."""
    keys = block_keys(tokens.data, root=root_key(), tokens_per_block=16)
    return [BlockStored(tuple(keys), None, array("I", tokens[: 16 * len(keys)].tolist()), block_tokens)]


def test_events_that_cannot_be_filed(make_fleet):
    """Blocks of ten tokens cannot be filed, and the instances that announce them are named."""
    fleet = make_fleet(tells=False)
    announcing(fleet, lambda at: stored(text(at, 65), block_tokens=10))
    assert conditions(fleet.look()) == {Condition.EVENTS_UNUSABLE}


def test_events_of_blocks_that_are_not_there(make_fleet):
    """Instances that hold less than their events announced are found by what they report as cached."""
    fleet = make_fleet(tells=False, blocks=1)
    announcing(fleet, lambda at: stored(text(at, 65)))
    found = conditions(fleet.look())
    assert found == {Condition.EVENTS_STALE}


def test_events_of_other_texts(make_fleet):
    """Instances that find cached what no event explains do not speak of the texts that are routed."""
    fleet = make_fleet(tells=False)
    for at in range(60):
        for each in fleet.lights:
            ask_light(each, text(at, 65))
    announcing(fleet, lambda at: stored(text(500 + at, 65)))
    assert conditions(fleet.look()) == {Condition.EVENTS_MISMATCH}


def asked_meanwhile(fleet: Fleet, seconds: float, ask_one: Callable[[int], None], clients: int = 4) -> Diagnosis:
    """The diagnosis of some seconds in which clients ask all the time."""
    over = threading.Event()

    def client(at: int) -> None:
        for count in range(10_000):
            if over.is_set():
                return
            ask_one(at * 10_000 + count)

    threads = [threading.Thread(target=client, args=(at,)) for at in range(clients)]
    for each in threads:
        each.start()
    try:
        CLOCK.sleep(0.3)
        return fleet.look(seconds)
    finally:
        over.set()
        for each in threads:
            each.join()


def test_one_instance_that_gets_everything(make_fleet):
    """Where one session's instance has a queue while the other one is idle, that is imbalance, and overload there."""
    fleet = make_fleet("--policy", "session_hash", token_seconds=2e-4)
    shared = [*text(1, 320)]
    found = asked_meanwhile(fleet, 0.8, lambda at: fleet.ask([*shared, *text(at, 256)], session="one"))
    assert conditions(found) - {Condition.OVERLOAD} == {Condition.IMBALANCE}, render(found)


def test_a_queue_that_is_no_imbalance(make_fleet):
    """Waiting for the one instance that holds a long context is right; where all have queues, that is overload."""
    fleet = make_fleet(token_seconds=2e-4)
    context = [*text(1, 4800)]
    fleet.ask(context)
    found = asked_meanwhile(fleet, 0.8, lambda at: fleet.ask([*context, *text(at, 16)]), clients=3)
    assert conditions(found) <= {Condition.OVERLOAD}, render(found)
    found = asked_meanwhile(fleet, 0.8, lambda at: fleet.ask([*context[:320], *text(at, 256)]), clients=10)
    assert conditions(found) == {Condition.OVERLOAD}, render(found)


def heard(folder: Path, load: Callable[[list[Light]], None], *, lose: int = 0) -> Watched:
    """The events of two light instances. Of the first one, `lose` batches in the middle never come."""
    endpoint, ear, last, lost = f"ipc://{folder / 'events'}", Ear(CLOCK), {}, 1 << 62

    def take(source: str, sequence: int, payload: bytes) -> None:
        last[source] = sequence
        if not ("@a@" in source and lost <= sequence < lost + lose):
            ear.take(source, sequence, payload)

    with ExitStack() as stack:
        stack.callback(Subscriber([endpoint], take).close)
        lights = [stack.enter_context(Light(folder, name, endpoint, 64)) for name in ("a", "b")]
        for at, light in enumerate(lights):

            def is_heard(light: Light = light, at: int = at) -> bool:
                ask_light(light, text(int(CLOCK.wall() * 1e6), 33))
                return len(last) > at

            assert until(is_heard, 10.0, pause_seconds=0.02)
        lost = 3 + next(at for source, at in last.items() if "@a@" in source)
        load(lights)
        ask_light(lights[0], text(1, 33))
        ask_light(lights[1], text(2, 33))
        assert until(lambda: len(ear.heard()) == len(lights), 10.0, pause_seconds=0.02)
        CLOCK.sleep(0.2)
        return ear.watched("events")


def ask_light(light: Light, tokens: Sequence[int]) -> None:
    """Past any gateway."""
    with closing(http.client.HTTPConnection("127.0.0.1", light.port, timeout=30)) as link:
        body = {"model": "light", "prompt": [int(each) for each in tokens], "max_tokens": 1}
        link.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        link.getresponse().read()


def test_what_two_instances_compute_twice(tmp_path):
    """Events of two instances that compute the same prompts say so."""

    def load(lights: list[Light]) -> None:
        for each in prompts(10, tokens=65):
            for light in lights:
                ask_light(light, each)

    assert conditions(diagnose([heard(tmp_path, load)])) == {Condition.ELSEWHERE}


def test_batches_of_events_that_are_lost(tmp_path):
    """A hole in the numbers of an instance's events is found, and what is behind it is no other finding."""

    def load(lights: list[Light]) -> None:
        for at, each in enumerate(prompts(20, tokens=65)):
            ask_light(lights[at % 2], each)

    assert conditions(diagnose([heard(tmp_path, load, lose=3)])) == {Condition.EVENTS_LOST}


def test_events_that_come_late():
    """Events that arrive later than the next are sent are found; a clock that differs would refute it."""
    server, events = recorded("healthy", late_seconds=60.0)
    found = diagnose([server, events])
    assert conditions(found) == {Condition.EVENTS_LATE}
    assert not found.findings[0].counted


# -- the diagnosis is a pure function ----------------------------------------------------------------------------------


REASONS = st.sampled_from([each for each in Reason if each is not Reason.TAIL])
GAPS = st.lists(
    st.tuples(REASONS, st.sampled_from(["", "left memory 2 min ago", "token 4 differs"])), min_size=1, max_size=20
)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32), GAPS)
def test_order_does_not_matter(seed, gaps):
    """However sources, receipts and series are ordered, the diagnosis is the same."""
    draw = random.Random(seed)  # noqa: S311  # a seed must replay
    receipts = [
        msgspec.structs.replace(SLOW, request=str(at), loaded_tokens=0, by_tier={}, missing=(Missing(0, 63, *gap),))
        for at, gap in enumerate(gaps)
    ]
    node = Watched(kind=Kind.NODE, name="node", receipts=tuple(receipts))
    everything = [node, *(each for name in ("evicted", "memory", "healthy") for each in recorded(name, at=name))]
    mixed = [
        dataclasses.replace(
            each,
            scrapes=tuple(_mixed(one, draw) for one in each.scrapes),
            receipts=None if each.receipts is None else tuple(draw.sample(each.receipts, len(each.receipts))),
        )
        for each in everything
    ]
    draw.shuffle(mixed)
    assert diagnose(mixed) == diagnose(everything) == diagnose(everything)


def _mixed(scrape, draw):
    names = draw.sample(sorted(scrape.series), len(scrape.series))
    return dataclasses.replace(
        scrape, series={name: draw.sample(list(scrape.series[name]), len(scrape.series[name])) for name in names}
    )


NAMES = sorted(
    set(
        re.findall(
            r'"((?:vllm:)?[a-z_]+_(?:total|seconds|perc|sum|count|bucket|open|bytes|info|leases|running|waiting|flight|listening))"',
            inspect.getsource(doctor),
        )
    )
)
LABELS = {
    "tier": ["memory", "disk"],
    "le": ["0.1", "x"],
    "outcome": ["hit", "late"],
    "instance": ["a", "b"],
    "reason": ["evicted"],
    "enable_prefix_caching": ["False"],
    "route": ["/v1/completions"],
    "status": ["200"],
    "source": ["device"],
    "stage": ["index"],
}
SERIES = st.tuples(
    st.sampled_from(NAMES), st.tuples(*(st.sampled_from(LABELS[label]) for label in LABELS)), st.floats(-1e30, 1e30)
)


@pytest.mark.parametrize("figures", [(5.0, -5.0, 1.0), (100.0, 1.0, -101.0), (1.0, -2.0, 1.0)])
def test_figures_below_nothing(figures):
    """A counter below nothing is none: it is passed over, and no share of a whole is taken that adds up to nothing."""
    names = [f"vllm:request_{part}_time_seconds_sum" for part in ("queue", "prefill", "decode")]
    text = "\n".join(f"{name} {value}" for name, value in zip(names, figures, strict=True))
    text += '\nvllm:prompt_tokens_total 1e-308\nvllm:request_success_total{finished_reason="stop"} 100'
    text += '\nvllm:prompt_tokens_cached_by_source_total{source="device"} 5'
    said = render(diagnose([Watched(kind=Kind.SERVER, name="x", scrapes=(parse(text),))]))
    assert "so: " in said
    assert "inf" not in said
    assert "-" not in said.splitlines()[0]


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(Kind), st.lists(st.lists(SERIES, max_size=40), max_size=4))
def test_any_figures_are_diagnosed(kind, scrapes):
    """Whatever figures servers tell, however impossible, the diagnosis is made, and can be shown."""
    texts = ["\n".join(_line(*each) for each in series) for series in scrapes]
    instances = tuple(Routed(name, f"http://{name}", "up", 0, "EXACT") for name in ("a", "b"))
    at = Watched(
        kind=kind,
        name="x",
        scrapes=tuple(parse(text, float(at)) for at, text in enumerate(texts)),
        instances=instances,
        events=(),
    )
    assert "so: " in render(diagnose([at, dataclasses.replace(at, kind=Kind.SERVER, name="http://a")]))


COUNTS = st.one_of(st.integers(0, 40), st.sampled_from([-5, 1 << 41, 10**18, 10**40]))
FIGURES = st.one_of(st.floats(0, 2), st.sampled_from([-1.0, 1e-300, 1e300, math.inf, math.nan]))
RECEIPTS = st.lists(
    st.builds(
        Receipt,
        request=st.just("a"),
        prompt_tokens=COUNTS,
        tokens_per_block=COUNTS,
        loaded_tokens=COUNTS,
        computed_tokens=COUNTS,
        by_tier=st.dictionaries(st.sampled_from(["memory", "disk"]), COUNTS, max_size=2),
        missing=st.lists(st.builds(Missing, COUNTS, COUNTS, st.sampled_from(Reason)), max_size=2).map(tuple),
        **{
            f"{name}_seconds": FIGURES
            for name in ("match", "load", "prefill", "planned_load", "planned_recompute", "planned_cold")
        },
    ),
    max_size=12,
)


@settings(max_examples=300, deadline=None)
@given(RECEIPTS)
def test_any_receipts_are_diagnosed(receipts):
    """Receipts with figures that cannot be are passed over, and that is said; of all others something can be said."""
    source = observe.Source(Kind.NODE, "node", lambda: "thermocline_matches_total 1", lambda: tuple(receipts))
    (at,) = watch([source], 0, CLOCK)
    assert (len(at.receipts) < len(receipts)) == any(what == "receipts" for what, _ in at.untold)
    assert "so: " in render(diagnose([at]))
    assert len(checklist.check([at])) == len(checklist.ITEMS)


def test_loads_that_were_not_timed_are_not_called_slow():
    """A load that took no time was not timed, as vLLM's are: nothing is said of it, whatever was planned."""
    untimed = msgspec.structs.replace(SLOW, load_seconds=0.0, prefill_seconds=0.0, planned_recompute_seconds=0.5)
    at = Watched(kind=Kind.NODE, name="node", receipts=(untimed,) * 3)
    assert conditions(diagnose([at])) == set()


def _line(name, values, value):
    labels = ",".join(f'{label}="{text}"' for label, text in zip(LABELS, values, strict=True))
    return f"{name if name.startswith('vllm:') else 'thermocline_' + name}{{{labels}}} {value!r}"


@pytest.mark.parametrize(("bad", "of", "found"), [(2, 20, False), (3, 20, True), (3, 59, True), (2, 60, False)])
def test_what_is_rare_is_not_claimed(bad, of, found):
    """A reason is claimed from three requests and 5 % of the tokens on."""
    gap = (Missing(0, 62, Reason.EXPIRED), Missing(62, 63, Reason.TAIL))
    cold = msgspec.structs.replace(SLOW, loaded_tokens=0, by_tier={}, missing=gap)
    warm = msgspec.structs.replace(SLOW, load_seconds=0.001)
    receipts = [
        msgspec.structs.replace(cold if at < bad else warm, request=str(at), wall_seconds=at) for at in range(of)
    ]
    named = conditions(diagnose([Watched(kind=Kind.NODE, name="node", receipts=tuple(receipts))]))
    assert named == ({Condition.TTL_TOO_SHORT} if found else set())


def test_events_that_never_come():
    """Where a server answers and no event is heard, that is found."""
    (server, _) = recorded("healthy")
    assert conditions(diagnose([server, Watched(kind=Kind.EVENTS, name="events", events=())])) == {
        Condition.EVENTS_MISSING
    }


def test_every_condition_is_planted():
    """Every condition can be found: none is declared that no test here plants."""
    source = Path(__file__).read_text()
    assert {each for each in Condition if f"Condition.{each.name}" not in source} == set()
