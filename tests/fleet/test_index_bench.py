"""Our side of `bench route` in a form too short to mean anything: it hears, finds and decides."""

from __future__ import annotations

import contextlib

import pytest

from bench import dynamo_peer, route

pytest.importorskip("zmq", reason="KV events need pyzmq")


def test_what_is_sent_is_found(monkeypatch):
    """Each kind of prompt finds as much as was announced of it over a real socket, on the instance that has it."""
    for name, value in (("CONVERSATIONS", 4), ("LONG", 1), ("LONG_BLOCKS", 300), ("PROMPTS", 2)):
        for module in (dynamo_peer, route):
            monkeypatch.setattr(module, name, value, raising=False)
    with contextlib.closing(route.Ours(3)) as ours:
        ours.prepare()
        ours.hear(ours.senders.endpoints)
        ours.send(0, 5)
        deadline = route.CLOCK.now() + route.PATIENCE_SECONDS
        while ours.index.blocks < 4 * 256 + 300 and route.CLOCK.now() < deadline:
            route.CLOCK.sleep(route.REST_SECONDS)
        places = dynamo_peer.placed(3)
        held = {"cached": 4096, "shared": 1024, "nothing": 0, "long": 4800}
        for kind, (_, known) in dynamo_peer.KINDS.items():
            found = ours.found(kind)
            assert found[0][1] == held[known]
            if known in {"cached", "long"}:
                assert found[0][0] == places[0 if known == "cached" else 4]
        assert min(ours.decide("4k tokens, nothing cached", "buffer")) > 0
