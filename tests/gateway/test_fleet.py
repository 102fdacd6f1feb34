"""Four instances behind a gateway, while things go wrong: requests are answered all the same, and hits come back."""

from __future__ import annotations

import contextlib
import random
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from bench.vllm_server import free_port
from tests.faults.process import CLOCK
from tests.gateway.fleet import Clients, Light, Route
from tests.gateway.serving import until

zmq = pytest.importorskip("zmq", reason="KV events need pyzmq")
pytest.importorskip("uvloop", reason="the gateway runs on uvloop")

BLOCKS = 1500
BACK_SECONDS = 5.0
REQUESTS = 150
BACK_SHARE = 0.9
FOUND = 0.75
ROUGHLY = 0.5
"""What is lost while a replay was asked for a moment ago is not asked for again."""
REPLAYED = 'events_heard_total{stage="socket",outcome="replayed"}'


class Fleet:
    """Four light instances and a gateway. Events go straight to it, or by way of `through`."""

    def __init__(self, folder, stack: ExitStack, *more: str, through=None) -> None:
        listen = f"tcp://127.0.0.1:{free_port()}"
        events = through(listen) if through else listen
        self.instances = [stack.enter_context(Light(folder, name, events, BLOCKS)) for name in "abcd"]
        self.gateway = stack.enter_context(Route(folder, self.instances, "--events-listen", listen, *more))


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@contextlib.contextmanager
def talking(fleet: Fleet) -> Iterator[tuple[Clients, float]]:
    """Clients under way, and the hit rate that they see while nothing is wrong."""
    clients = Clients([fleet.gateway.url])
    try:
        clients.wait_asked(REQUESTS)
        since = CLOCK.now()
        clients.wait_asked(REQUESTS)
        undisturbed = clients.hit_rate(since)
        assert undisturbed > FOUND, "conversations are not found again"
        yield clients, undisturbed
    finally:
        clients.close()


def hit_rate_after(clients: Clients, began: float) -> float:
    """The hit rate of what is asked from five seconds after that on."""
    CLOCK.sleep(max(0.0, began + BACK_SECONDS - CLOCK.now()))
    since = CLOCK.now()
    clients.wait_asked(REQUESTS)
    return clients.hit_rate(since)


def picture_off(fleet: Fleet) -> float:
    """By which share the gateway's picture of an instance's cache is off, of the instance where that is the most."""
    told = fleet.gateway.instances()
    return max(abs(told[each.name]["blocks"]["device"] / max(1, each.held()) - 1) for each in fleet.instances)


def test_an_instance_dies_and_comes_back(folder, stack):
    """No request is lost with an instance, it is left alone, and five seconds after it is back hits are as before."""
    fleet = Fleet(folder, stack)
    with talking(fleet) as (clients, undisturbed):
        fleet.instances[1].kill()
        clients.wait_asked(REQUESTS)
        assert until(lambda: fleet.gateway.instances()["b"]["blocks"]["device"] == 0), "what died is still believed in"
        assert fleet.gateway.instances()["b"]["state"] == "down"
        assert fleet.gateway.counted("retries_total") <= 3 * clients.at_once
        fleet.instances[1].start()
        back = CLOCK.now()
        assert hit_rate_after(clients, back) >= BACK_SHARE * undisturbed
    assert not clients.lost
    assert "b" in {each.instance for each in clients.asked if each.at >= back}
    assert until(lambda: picture_off(fleet) == 0), "what instances hold is not what the gateway says"
    shares = Counter(each.instance for each in clients.asked)
    assert set(shares) == set("abcd")
    assert max(shares.values()) < 0.45 * len(clients.asked)


def test_the_gateway_is_restarted(folder, stack):
    """Killed, a gateway loses no request but those in its hands. A new one soon finds what is held."""
    fleet = Fleet(folder, stack)
    with talking(fleet) as (clients, undisturbed):
        fleet.gateway.kill()
        killed = CLOCK.now()
        fleet.gateway.start()
        assert hit_rate_after(clients, CLOCK.now()) >= BACK_SHARE * undisturbed
    assert fleet.gateway.counted(REPLAYED) >= len(fleet.instances), "what was told before was not asked for"
    assert len(clients.lost) <= clients.at_once
    assert all(each.at <= killed and not each.status for each in clients.lost)
    assert until(lambda: picture_off(fleet) == 0), "what instances hold is not what the gateway says"


def test_the_gateway_is_stopped(folder, stack):
    """A gateway that is asked to end answers what it has in hands, and clients find the next one there."""
    fleet = Fleet(folder, stack)
    with contextlib.closing(Clients([fleet.gateway.url], at_once=3, turn_tokens=20_000, tokens_max=0)) as clients:
        clients.wait_asked(3)
        assert until(lambda: sum(each["in_flight"] for each in fleet.gateway.instances().values()) == clients.at_once)
        fleet.gateway.close()
        fleet.gateway.start()
        clients.wait_asked(3)
    assert not clients.lost


def test_events_are_late_and_some_are_lost(folder, stack):
    """With events a second late, and one in ten lost, no request is lost, and hits are as many as without that."""
    with ExitStack() as other, talking(Fleet(folder, other)) as (_, undisturbed):
        pass
    late = stack.enter_context(contextlib.closing(Late(random.Random(5))))  # noqa: S311  # must replay
    fleet = Fleet(folder, stack, through=late.towards)
    with contextlib.closing(Clients([fleet.gateway.url])) as clients:
        clients.wait_asked(REQUESTS)
        assert hit_rate_after(clients, CLOCK.now()) >= BACK_SHARE * undisturbed
    assert not clients.lost
    assert late.lost > 0
    assert fleet.gateway.counted(REPLAYED) > 0, "what was lost was not asked for"
    assert picture_off(fleet) < ROUGHLY


def test_several_processes_share_an_address(folder, stack):
    """Three gateways that know nothing of each other but what instances tell find conversations, and spread load."""
    fleet = Fleet(folder, stack, "--gateway-processes", "3")
    with talking(fleet) as (clients, _):
        clients.wait_asked(4 * REQUESTS)
    assert not clients.lost
    assert {each.instance for each in clients.asked} == set("abcd")
    assert clients.spread() <= 1.3


class Late:
    """Stands between engines and a gateway: hands events on a second later, and loses one in ten."""

    SECONDS, SHARE = 1.0, 0.1

    def __init__(self, rng: random.Random) -> None:
        self._rng, self._context, self._closing = rng, zmq.Context(), False
        self.lost = 0
        self._thread: threading.Thread | None = None

    def towards(self, listen: str) -> str:
        """Where engines connect, for events to arrive at `listen`."""
        comes, goes = self._context.socket(zmq.SUB), self._context.socket(zmq.PUB)
        port = comes.bind_to_random_port("tcp://127.0.0.1")
        comes.subscribe(b"")
        goes.connect(listen)
        self._thread = threading.Thread(target=self._run, args=(comes, goes))
        self._thread.start()
        return f"tcp://127.0.0.1:{port}"

    def close(self) -> None:
        self._closing = True
        if self._thread is not None:
            self._thread.join()
        self._context.destroy(linger=0)

    def _run(self, comes, goes) -> None:
        waiting: list[tuple[float, list[bytes]]] = []
        while not self._closing:
            if comes.poll(20):
                waiting.append((CLOCK.now() + self.SECONDS, comes.recv_multipart()))
            while waiting and waiting[0][0] <= CLOCK.now():
                _, frames = waiting.pop(0)
                if self._rng.random() < self.SHARE:
                    self.lost += 1
                else:
                    goes.send_multipart(frames)
        comes.close(0)
        goes.close(0)
