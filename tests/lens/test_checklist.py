"""The production checklist: every item can pass, fail and be unknown, from what really runs."""

from __future__ import annotations

from contextlib import closing

import msgspec
import pytest

from tests.lens.recordings import recorded
from tests.store.making import BLOCK_BYTES
from tests.store.test_receipts import serve, text
from thermocline.clock import ManualClock
from thermocline.costs.measured import Conditions, Measured, Memory, Row
from thermocline.lens import checklist
from thermocline.lens.checklist import State, check, render
from thermocline.lens.diagnosis import Condition
from thermocline.lens.doctor import diagnose
from thermocline.lens.observe import Kind, Watched, parse
from thermocline.store.store import Store
from thermocline.tiers.memory import MemoryTier

ROW = Row(
    prompt_tokens=1024, shared_tokens=0, cached_tokens=0, source="", concurrency=1, requests=3,
    first_token_seconds=0.5, low_seconds=0.4, high_seconds=0.6,
)  # fmt: skip
CONDITIONS = Conditions(date="2026-11-22", url="http://127.0.0.1:8000", model="m", engine="vllm", machine="here")


def _measured(*lengths: int) -> Measured:
    memory = tuple(Memory(context_tokens=each, blocks=each // 16) for each in lengths)
    return Measured(version=1, conditions=CONDITIONS, rows=(ROW,), memory=memory)


@pytest.fixture
def node():
    """A node that was asked for the same prompts several times, as it is seen from outside."""

    def look(ttl_seconds: float | None, load_seconds: float = 0.002) -> Watched:
        clock = ManualClock(1000.0)
        warm = MemoryTier(256 * BLOCK_BYTES, clock=clock)
        warm.wait_ready()
        with closing(Store(warm, [], clock=clock, ttl_seconds=ttl_seconds)) as store:
            receipts = []
            for turn in range(5):
                receipts += [serve(store, f"{turn} {at}", text(at, 200)) for at in range(5)]
                clock.sleep(5.0)
            receipts = [msgspec.structs.replace(each, load_seconds=load_seconds) for each in receipts]
            store.measure()
            scrape = parse(store.metrics.text())
            return Watched(kind=Kind.NODE, name="node", scrapes=(scrape,), receipts=tuple(receipts))

    return look


def _states(watched, measured=None) -> list[State]:
    return [each.state for each in check(watched, measured)]


P, F, U = State.PASS, State.FAIL, State.UNKNOWN


def test_nothing_that_runs_is_all_unknown():
    """Without anything to look at, nothing passes and nothing fails: each item says what it needs."""
    found = check([])
    assert {each.state for each in found} == {U}
    assert all(each.why.startswith("needs ") for each in found)


def test_a_vllm_without_tiers(node):
    """A vLLM alone fails where a tier is asked for, and what its metrics do not tell stays unknown."""
    assert _states(recorded("healthy")) == [U, F, F, U, U, U, U]
    assert _states(recorded("tiers"))[1:3] == [P, U]  # tiers of whom, and what these take, it does not tell


def test_a_node_in_use(node):
    """A node with a time to live, loads and prefills passes by its own figures; who monitors it is unknown."""
    assert _states([node(600.0)], _measured(1024, 4096, 16384)) == [P, P, P, U, P, P, P]
    assert _states([node(None)], _measured(1024)) == [F, P, P, U, P, P, P]
    assert _states([node(None)], _measured())[0] is U
    assert _states([node(None, load_seconds=0.0)])[4] is U


def test_a_profile_of_an_engine_that_tells_no_memory(node):
    """Lengths at which nothing was told of KV memory are none that were profiled: unknown, and no pass."""
    memory = tuple(Memory(context_tokens=each) for each in (512, 1024, 2048))
    silent = Measured(version=1, conditions=CONDITIONS, rows=(ROW,), memory=memory)
    assert _states([node(None)], silent)[0] is U


@pytest.mark.parametrize(
    ("pause_seconds", "returns", "state", "words"),
    [
        (60.0, 60, F, "none came back after 0 s"),
        (60.0, 30, P, "60 receipts of prompts that found something would tell"),
        (60.0, 3, P, "nothing had to leave"),
        (0.0, 60, P, "idle for no longer than sessions have paused"),
    ],
)
def test_idle_sessions_want_an_age_limit(pause_seconds, returns, state, words):
    """Without a limit the item fails where memory is full of what nobody comes back to, as the doctor has it.

    Where too few came back to say so, it is not said that nothing is idle for too long.
    """
    clock = ManualClock(1000.0)
    warm = MemoryTier(256 * BLOCK_BYTES, clock=clock)
    warm.wait_ready()
    with closing(Store(warm, [], clock=clock)) as store:
        receipts = []
        for at in range(returns):
            receipts += [serve(store, f"{at} {again}", text(at, 200)) for again in range(2)]
            clock.sleep(pause_seconds)
        store.measure()
        scrape = parse(store.metrics.text())
        seen = Watched(kind=Kind.NODE, name="node", scrapes=(scrape,), receipts=tuple(receipts))
    assert _states([seen])[5] is state
    assert words in check([seen])[5].why
    found = {each.condition for each in diagnose([seen]).findings}
    assert (Condition.IDLE_SESSIONS in found) == (state is F)


@pytest.mark.parametrize(("others", "seconds", "state"), [(0, 5.0, U), (0, 120.0, F), (2, 5.0, P)])
def test_who_reads_the_metrics(others, seconds, state):
    """Hit rates are monitored where others than the doctor read a server's metrics while it looks, for long enough."""
    series = 'thermocline_requests_total{route="/metrics",status="200"}'
    scrapes = tuple(parse(f"{series} {7 + at + at * others}", at * seconds) for at in range(2))
    server = Watched(kind=Kind.SERVER, name="server", scrapes=scrapes)
    assert _states([server])[3] is state


def test_it_reads_as_a_table(node):
    """Each item is a line with its figures, and the last line counts them."""
    shown = render(check([node(600.0)]))
    assert shown.count("\n") == len(checklist.ITEMS) + 1
    assert "1,000 tokens load in 10.42 ms" in shown
    assert shown.endswith("5 pass, 0 fail, 2 unknown")
