"""Several gateways, each a `thermocline route` apart, in front of the same instances: together they spread load."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from bench.harness import CLOCK
from bench.vllm_server import free_port
from tests.gateway.fleet import Clients, Light, Route
from tests.gateway.serving import until

pytest.importorskip("zmq", reason="KV events need pyzmq")
pytest.importorskip("uvloop", reason="the gateway runs on uvloop")

BLOCKS = 3000
WARM_REQUESTS, REQUESTS = 200, 1200
"""Conversations stay where they begin, so load comes in bursts: over 300 requests one instance may get 1.8 times its
part, over this many no more than 1.2 (six runs)."""
TOKEN_SECONDS = 100e-6
"""So that a prompt takes long beside what a busy machine adds to it, which gateways could not tell from slowness."""
SPREAD_MAX = 1.3


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("g")


@pytest.fixture(scope="module")
def instances(folder) -> Iterator[list[Light]]:
    """Four that listen for whoever wants to hear them."""
    with ExitStack() as stack:
        yield [
            stack.enter_context(
                Light(folder, name, f"@tcp://127.0.0.1:{free_port()}", BLOCKS, token_seconds=TOKEN_SECONDS)
            )
            for name in "abcd"
        ]


@pytest.fixture(scope="module")
def gateways(folder, instances) -> Iterator[list[str]]:
    """Three gateways that hear the same instances, each over connections of its own."""
    with ExitStack() as stack:
        yield [stack.enter_context(Route(folder, instances, name=f"g{number}")).url for number in range(3)]


def test_one_that_comes_later_asks_for_what_it_missed(folder, instances):
    """A gateway that joins knows from replays what all instances hold, once it has heard of each."""
    urls = [each.url for each in instances]
    with contextlib.closing(Clients(urls)) as clients:
        clients.wait_asked(100)
    with Route(folder, instances, name="late") as late:
        with contextlib.closing(Clients(urls, seed=1)) as clients:
            clients.wait_asked(100)
        held = {each.name: each.held() for each in instances}
        assert all(held.values())
        assert until(lambda: {name: each["blocks"]["device"] for name, each in late.instances().items()} == held)


WORKLOADS = {
    "nothing shared": {"tokens_max": 0, "turn_tokens": 400},
    "a system prompt": {"tokens_max": 0, "turn_tokens": 160, "shared_tokens": 640},
    "conversations": {"shared_tokens": 640},
}


@pytest.mark.parametrize("name", WORKLOADS)
def test_load_is_spread(name, gateways, request):
    """However much prompts share, no instance gets more than 1.3 times its part, and what was computed is found."""
    with contextlib.closing(Clients(gateways, **WORKLOADS[name])) as clients:
        clients.wait_asked(WARM_REQUESTS)
        warm = CLOCK.now()
        clients.wait_asked(REQUESTS)
    spread = clients.spread(warm)
    request.node.user_properties += [("spread", spread), ("hit rate", clients.hit_rate(0.0))]
    assert not clients.lost
    assert {each.instance for each in clients.asked} == set("abcd")
    assert spread <= SPREAD_MAX
