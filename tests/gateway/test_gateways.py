"""Several gateways, each a `thermocline route` apart, in front of the same instances: together they spread load."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from bench.vllm_server import free_port
from tests.gateway.fleet import Clients, Light, Route

pytest.importorskip("zmq", reason="KV events need pyzmq")
pytest.importorskip("uvloop", reason="the gateway runs on uvloop")

BLOCKS = 3000
REQUESTS = 1000
"""Of fewer, what each gateway has learned of each instance from one or two requests decides where many go."""
SPREAD_MAX = 1.3


@pytest.fixture(scope="module")
def gateways(tmp_path_factory) -> Iterator[list[str]]:
    """Three gateways that hear the same four instances, each over connections of its own."""
    folder = tmp_path_factory.mktemp("g")
    with ExitStack() as stack:
        lights = [
            stack.enter_context(Light(folder, name, f"@tcp://127.0.0.1:{free_port()}", BLOCKS)) for name in "abcd"
        ]
        yield [stack.enter_context(Route(folder, lights, name=f"g{number}")).url for number in range(3)]


WORKLOADS = {
    "nothing shared": {"tokens_max": 0, "turn_tokens": 400},
    "a system prompt": {"tokens_max": 0, "turn_tokens": 160, "shared_tokens": 640},
    "conversations": {"shared_tokens": 640},
}


@pytest.mark.parametrize("name", WORKLOADS)
def test_load_is_spread(name, gateways, request):
    """However much prompts share, no instance gets more than 1.3 times its part, and what was computed is found."""
    with contextlib.closing(Clients(gateways, **WORKLOADS[name])) as clients:
        clients.wait_asked(REQUESTS)
    request.node.user_properties += [("spread", clients.spread()), ("hit rate", clients.hit_rate(0.0))]
    assert not clients.lost
    assert {each.instance for each in clients.asked} == set("abcd")
    assert clients.spread() <= SPREAD_MAX
