"""Events that are handed on reach everybody who listens, and who comes late is told all."""

from __future__ import annotations

import os
from contextlib import closing

from thermocline.clock import until
from thermocline.wire.events import AllBlocksCleared
from thermocline.wire.forward import Forwarder
from thermocline.wire.publisher import Publisher
from thermocline.wire.subscriber import Subscriber

TOPIC = "kv@one@m"
WAIT_SECONDS = 10.0


def test_events_and_subscriptions_pass():
    """Two who listen hear the same in the same order; the second, who comes later, has all that is held told again."""
    comes, goes = (f"ipc://@kv-{os.urandom(6).hex()}" for _ in range(2))
    told: list[int] = []

    def tell_all():
        told.append(len(told))
        publisher.publish(TOPIC, [AllBlocksCleared()])
        yield

    heard: dict[str, list[int]] = {"first": [], "late": []}
    with closing(Forwarder(comes, goes)) as forwarder, closing(Publisher(comes, tell_all=tell_all)) as publisher:
        with closing(Subscriber([f">{goes}"], lambda _, number, __: heard["first"].append(number))):
            assert until(lambda: heard["first"] == [0], WAIT_SECONDS, pause_seconds=0.002), heard
            with closing(Subscriber([f">{goes}"], lambda _, number, __: heard["late"].append(number))):
                assert until(lambda: heard == {"first": [0, 1], "late": [1]}, WAIT_SECONDS, pause_seconds=0.002), heard
        assert forwarder.dropped == 0
        forwarder.close()
    assert told == [0, 1]
